"""Keys of page contents: a keyed hash chain, so that a prefix is known by what it says and by whose it is.

    key[0] = H(secret, tenant);  key[i + 1] = H(secret, key[i] + tokens of page i)      H: BLAKE2b, 256 bits
The chain starts from the tenant, so no tenant can find out what another one's prompts were; H is keyed with a
secret of the cluster and collision-proof, so no client can make two prefixes meet.
"""

import hashlib
import struct
from collections.abc import Sequence

from model.inputs import PAGE_SIZE

_DIGEST_BYTES = 32


class PrefixHasher:
    """Makes chains of page keys.

    Args:
        secret: 16 to 64 random bytes, the same for all who exchange pages.
    """

    def __init__(self, secret: bytes) -> None:
        assert 16 <= len(secret) <= hashlib.blake2b.MAX_KEY_SIZE, "a secret of 16 to 64 bytes"
        self._secret = secret

    def extend(self, keys: list[bytes], tenant: str, tokens: Sequence[int], num_pages: int) -> None:
        """Append keys until there is one for each of the first `num_pages` full pages of `tokens`."""
        for page in range(len(keys), num_pages):
            parent = keys[page - 1] if page else self._hash(tenant.encode())
            own = tokens[page * PAGE_SIZE : (page + 1) * PAGE_SIZE]
            assert len(own) == PAGE_SIZE, "only full pages have keys"
            keys.append(self._hash(parent + struct.pack(f"<{PAGE_SIZE}I", *own)))

    def _hash(self, data: bytes) -> bytes:
        return hashlib.blake2b(data, digest_size=_DIGEST_BYTES, key=self._secret).digest()

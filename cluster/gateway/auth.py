"""API keys: known by their SHA-256 alone, compared in constant time."""

import hashlib
import hmac
from collections.abc import Sequence

OPEN_TENANT = ""


class ApiKeys:
    """The keys of this server. Without any, everybody may come in.

    Args:
        hashes: SHA-256 of each key, in hex.
    """

    def __init__(self, hashes: Sequence[str]) -> None:
        self._hashes = tuple(bytes.fromhex(text) for text in hashes)

    @property
    def are_needed(self) -> bool:
        return bool(self._hashes)

    def tenant(self, authorization: str | None) -> str | None:
        """Whose request this is, by its Authorization header; None where the key is missing or wrong."""
        if not self._hashes:
            return OPEN_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        digest = hashlib.sha256(key.strip().encode(errors="surrogateescape")).digest()
        # Every comparison is made, whichever one matches.
        matches = [hmac.compare_digest(digest, known) for known in self._hashes]
        return digest.hex() if any(matches) and scheme.lower() == "bearer" else None

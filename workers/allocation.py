"""Pages for sequences: cached ones of their prefix, new ones for the rest, and back again.

A prompt whose next page another sequence is about to fill waits for it instead of computing it twice. So the
`n` choices of one request, and prompts that begin alike and come together, run their common part once and
share its pages.
"""

from collections import Counter
from enum import Enum

from model.inputs import PAGE_SIZE
from workers.page_pool import PagePool, pages_for
from workers.prefix import PrefixHasher
from workers.sequence import Request, Sequence


class Wait(Enum):
    """Why a sequence cannot start yet."""

    FOR_ROOM = "pages lack"
    FOR_PREFIX = "another sequence is computing its next page"


class PageAllocator:
    """The one who takes pages out of a pool and gives them back.

    Args:
        hasher: names pages by what they hold; its secret is that of all who exchange pages.
    """

    def __init__(self, pool: PagePool, hasher: PrefixHasher) -> None:
        self._pool, self._hasher = pool, hasher
        self._coming: Counter[bytes] = Counter()  # keys of pages that sequences are about to fill

    def keys_of(self, request: Request) -> list[bytes]:
        """Names of a prompt's full pages. Its last token always runs: its logits are the first token's."""
        keys: list[bytes] = []
        num_full = (len(request.prompt_ids) - 1) // PAGE_SIZE
        self._hasher.extend(keys, request.tenant, request.prompt_ids, num_full)
        return keys

    def start(self, request: Request, keys: list[bytes], num_tokens: int) -> Sequence | Wait:
        """A sequence with pages for `num_tokens`; the first ones are shared if their keys are known."""
        shared = self._pool.match(keys)
        if len(shared) < len(keys) and keys[len(shared)] in self._coming:
            return Wait.FOR_PREFIX
        self._pool.share(shared)
        num_new = pages_for(num_tokens) - len(shared)
        if num_new > self._pool.num_free:
            self._pool.give_back(shared)
            return Wait.FOR_ROOM
        sequence = Sequence(request, shared + self._pool.take(num_new), len(shared), keys[: len(shared)])
        sequence.coming_keys = keys[len(shared) :]
        self._coming.update(sequence.coming_keys)
        return sequence

    def publish(self, sequence: Sequence) -> None:
        """Make the pages that became full known, those of the answer too: the next turn starts with them.

        In the MTP layer a page's last row depends on the token behind the page, which is not part of its key:
        after another continuation that one row is another's. Only drafts read it, never an answer.
        """
        num_full = sequence.num_cached // PAGE_SIZE
        known = len(sequence.page_keys)
        self._hasher.extend(sequence.page_keys, sequence.request.tenant, sequence.tokens, num_full)
        for page in range(known, num_full):
            self._pool.publish(sequence.pages[page], sequence.page_keys[page])
        self._expect_less(sequence, num_full - known)

    def end(self, sequence: Sequence) -> None:
        """Give everything back."""
        self._expect_less(sequence, len(sequence.coming_keys))
        self._pool.give_back(sequence.pages)

    def _expect_less(self, sequence: Sequence, num_pages: int) -> None:
        come, sequence.coming_keys = sequence.coming_keys[:num_pages], sequence.coming_keys[num_pages:]
        for key in come:
            self._coming[key] -= 1
            if not self._coming[key]:
                del self._coming[key]

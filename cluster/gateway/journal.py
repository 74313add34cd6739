"""What it takes to answer every open request again: the gateway's share of the system's state.

A request that runs again from its entry (`replay.py`) continues with the tokens that an undisturbed run would
have drawn, because those depend on what is written here and on the weights alone.
"""

from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from cluster.gateway.errors import Overloaded
from workers.sequence import Request


class JournalEntry:
    """One open request: what was asked (its seed included), and the ids that came out so far."""

    def __init__(self, request: Request, digest: str) -> None:
        self.request, self.digest = request, digest
        self.emitted = array("L")

    def record(self, token_id: int) -> None:
        """Notes a token, before it is sent on."""
        self.emitted.append(token_id)

    def resumed(self, uid: str) -> Request:
        """What is left to do, as a request of another name: the answer so far is run like a prompt."""
        known = (*self.request.prompt_ids, *self.emitted)
        return replace(self.request, uid=uid, prompt_ids=known, num_resumed=len(self.emitted))


class Journal:
    """Entries of the open requests, bounded in the tokens that they may come to hold.

    Args:
        max_tokens: prompts and longest answers of all entries together.
    """

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._held = 0
        self._entries: dict[str, JournalEntry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[JournalEntry]:
        return iter(self._entries.values())

    @property
    def num_tokens(self) -> int:
        """Tokens that the open entries may come to hold."""
        return self._held

    @contextmanager
    def entry(self, request: Request, digest: str) -> Iterator[JournalEntry]:
        """An entry for as long as the request is open.

        Raises:
            Overloaded: the journal is full.
        """
        longest = request.longest
        if self._held + longest > self._max_tokens:
            raise Overloaded("too many requests are open; try again a little later")
        assert request.uid not in self._entries, request.uid
        entry = self._entries[request.uid] = JournalEntry(request, digest)
        self._held += longest
        try:
            yield entry
        finally:
            self._held -= longest
            del self._entries[request.uid]

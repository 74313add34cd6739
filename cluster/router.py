"""Which workers run a request: pages that lie ready, and load, counted in tokens and not in requests alone.

Prefill goes where the least is left to compute: prompts that wait there, and what of this one is not cached.
Decode goes where the largest share of pages stays free once the request is in, fewer running sequences first
among equals. A prompt that goes on from an answer (turn two of a chat) lies in the pages of the worker that
decoded it; if only little is new, that worker runs all of it, and no page moves. While there is no prefill
worker so it is with any short prompt.

The router knows what workers tell several times a second, and what it has sent since. A decode worker hears
of a sequence only when its prefill starts, so its pages count here until its tokens come (`settle`). Among
equals, workers take turns. A worker that says it leaves is chosen no more.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from model.inputs import PAGE_SIZE
from workers.load import WorkerLoad
from workers.page_pool import pages_for
from workers.prefix import PrefixHasher
from workers.sequence import Request
from workers.transport.protocol import Address
from workers.wire import Role, WorkerStatus, short_key

# A worker's report covers what was sent to it so long before it came.
_REPORT_SECONDS = 0.3


class NoRoute(Exception):
    """There is no worker of a role."""


@dataclass(frozen=True)
class Route:
    """The worker that starts a request, and the one that goes on after the first token; None for the same."""

    first: str
    decode: Address | None
    num_hit: int


@dataclass
class _Known:
    """A worker as the router sees it.

    Attributes:
        sent: what its report may not cover yet: when, and how many tokens are to be computed.
        coming: pages that requests will take here, by uid, until they are settled.
        promised: pages that will lie here once such requests have been prefilled.
    """

    address: Address
    role: Role
    status: WorkerStatus
    keys: set[str] = field(default_factory=set)
    sent: list[tuple[float, int]] = field(default_factory=list)
    coming: dict[str, int] = field(default_factory=dict)
    promised: dict[str, frozenset[str]] = field(default_factory=dict)
    num_chosen: int = 0
    has_told: bool = False

    @property
    def is_open(self) -> bool:
        """Whether requests may be sent to it: it has said that it is there, and not that it leaves."""
        return self.has_told and not self.status.leaving

    @property
    def queued_tokens(self) -> int:
        return self.status.load.queued_tokens + sum(tokens for _, tokens in self.sent)

    @property
    def used_pages(self) -> int:
        load = self.status.load
        return load.num_pages - load.free_pages + sum(self.coming.values())

    def compute(self, uid: str, keys: Sequence[str], num_tokens: int) -> None:
        """So many tokens of a prompt are sent here."""
        self.sent.append((time.monotonic(), num_tokens))
        self.promised[uid] = frozenset(keys)
        self.num_chosen += 1

    def num_hit(self, keys: Sequence[str]) -> int:
        """Tokens of the longest prefix that lies in pages here, or is being computed."""
        if not keys:
            return 0
        # Prompts that begin alike share their first page.
        alike = [promised for promised in self.promised.values() if keys[0] in promised]
        there = self.keys.union(*alike) if alike else self.keys
        known = next((i for i, key in enumerate(keys) if key not in there), len(keys))
        return known * PAGE_SIZE


class Router:
    """Knows the workers and chooses among them.

    Args:
        hasher: names pages as the workers do.
        local_prefill_tokens: so much of a prompt a decode worker computes itself where it has the rest.
    """

    def __init__(self, hasher: PrefixHasher, local_prefill_tokens: int) -> None:
        self._hasher, self._local_prefill_tokens = hasher, local_prefill_tokens
        self._workers: dict[str, _Known] = {}

    def count(self, role: Role) -> int:
        """Workers of a role that stay."""
        return sum(known.role == role and known.is_open for known in self._workers.values())

    def has(self, role: Role) -> bool:
        """Whether there are any."""
        return self.count(role) > 0

    @property
    def num_open(self) -> int:
        """Requests that decode workers have, whoever sent them, and those that we have sent on their way."""
        workers = [known for known in self._workers.values() if known.role == "decode" and known.is_open]
        loads = [known.status.load for known in workers]
        return sum(load.running + load.parked for load in loads) + sum(len(known.coming) for known in workers)

    @property
    def statuses(self) -> dict[str, WorkerStatus]:
        """The newest report of each worker."""
        return {name: known.status for name, known in self._workers.items()}

    def join(self, address: Address, role: Role) -> None:
        """A worker can be used from now on."""
        self._workers[address.name] = _Known(address, role, WorkerStatus(role, WorkerLoad()))

    def leave(self, name: str) -> None:
        """A worker is gone."""
        self._workers.pop(name, None)

    def report(self, name: str, status: WorkerStatus) -> None:
        """Take note of what a worker says of itself."""
        if (known := self._workers.get(name)) is None:
            return
        known.status, known.has_told = status, True
        if status.is_full:
            known.keys = set()
        known.keys.difference_update(status.keys_removed)
        known.keys.update(status.keys_added)
        horizon = time.monotonic() - _REPORT_SECONDS
        known.sent = [entry for entry in known.sent if entry[0] > horizon]

    def choose(self, request: Request) -> Route:
        """The workers for a request.

        Raises:
            NoRoute: somebody is missing.
        """
        keys = self._keys_of(request)
        prompt, longest = len(request.prompt_ids), request.longest
        decode = self._best_decode(keys, longest)
        hit_there = decode.num_hit(keys)
        is_little = prompt - hit_there <= self._local_prefill_tokens
        prefill = None if is_little and not self.has("prefill") else self._best_prefill(keys, prompt)
        hit_here = prefill.num_hit(keys) if prefill else 0
        decode.coming[request.uid] = pages_for(longest) - hit_there // PAGE_SIZE
        if prefill is None or (is_little and hit_there > hit_here):
            decode.compute(request.uid, keys, prompt - hit_there)
            return Route(decode.address.name, None, hit_there)
        prefill.compute(request.uid, keys, prompt - hit_here)
        decode.num_chosen += 1
        return Route(prefill.address.name, decode.address, hit_here)

    def settle(self, uid: str) -> None:
        """A request decodes, which reports cover, or it has ended."""
        for known in self._workers.values():
            known.coming.pop(uid, None)
            known.promised.pop(uid, None)

    def _best_prefill(self, keys: list[str], num_prompt: int) -> _Known:
        def work(known: _Known) -> tuple[int, int, int, str]:
            # What is left counts twice: the request waits for it, and so does whoever comes after it.
            left = 2 * (num_prompt - known.num_hit(keys))
            waiting = known.status.load.waiting
            return known.queued_tokens + left, waiting, known.num_chosen, known.address.name

        return min(self._of("prefill"), key=work)

    def _best_decode(self, keys: list[str], longest: int) -> _Known:
        def fill(known: _Known) -> tuple[float, int, int, int, str]:
            load = known.status.load
            needed = pages_for(longest) - known.num_hit(keys) // PAGE_SIZE
            share = (known.used_pages + needed) / max(1, load.num_pages)
            return share, known.queued_tokens, load.running, known.num_chosen, known.address.name

        return min(self._of("decode"), key=fill)

    def _of(self, role: Role) -> list[_Known]:
        found = [known for known in self._workers.values() if known.role == role and known.is_open]
        if not found:
            raise NoRoute(f"there is no {role} worker")
        return found

    def _keys_of(self, request: Request) -> list[str]:
        keys: list[bytes] = []
        num_full = (len(request.prompt_ids) - 1) // PAGE_SIZE
        self._hasher.extend(keys, request.tenant, request.prompt_ids, num_full)
        return [short_key(key) for key in keys]

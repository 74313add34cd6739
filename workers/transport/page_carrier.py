"""Whole pages from one GPU's page pools into another's, beside what both compute.

    ours                                           peer's
      push(pools, source, target) -> event           expect(pools, target) -> event
        pages, then an announcement  ---------->       the pages are there
        the source's pages are free  <----------       acknowledged

A page carrier goes one way. Events are of the device: ask `query`, or let a stream wait, and ask the
carrier's `check` before believing them. Both ends name the same pushes in the same order; the receiver when
it is told of one, since its wait has the carrier's deadline. A push may be of any size, but below 4 MiB the
fixed cost of the exchange rules.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from workers.transport.carrier import Carrier, Parcel
from workers.transport.cuda_memory import PeerMemory, copy_many

_NOTE = Parcel((((1,), torch.int32),))


class PageCarrier(Protocol):
    """One end of a way for pages. Pools are named by their number, in the same order at both ends."""

    def push(self, pools: Sequence[int], source: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        """Send pages of some pools as they are after the work before on the current stream.

        Returns:
            When the peer has them: until then the source's pages must not change.
        """
        ...

    def expect(self, pools: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        """Take the peer's next push, which is of these pools into these pages.

        Returns:
            When they are there.
        """
        ...


def runs(source: Sequence[int], target: Sequence[int]) -> list[tuple[int, int, int]]:
    """(source, target, count) of pages that follow each other in both."""
    found: list[tuple[int, int, int]] = []
    for ours, theirs in zip(source, target, strict=True):
        if found and (ours, theirs) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((ours, theirs, 1))
    return found


class MappedPages:
    """A `PageCarrier` that copies straight into the peer's pools, by copy engines.

    The fastest there can be, by which benchmarks measure `StagedPages`. No worker uses it: what is on its way
    when a sender is given up still lands in its target pages, which are nobody else's before the carrier has
    been closed at the other end.

    Args:
        carrier: for announcements and acknowledgements; ours alone.
        num_slots: of it: how many pushes may be under way.
        pools: [pages, ...] each, contiguous; for the peer to write they come from `shared_zeros`.
        theirs: the peer's pools, page for page as large as ours.
    """

    def __init__(
        self, carrier: Carrier, num_slots: int, pools: Sequence[Tensor], theirs: Sequence[PeerMemory]
    ) -> None:
        self._carrier, self._pools, self._theirs = carrier, pools, theirs
        self._courier = _Courier(carrier, num_slots, pools[0].device)
        # [pools, 1] each: where ours and theirs begin, and the bytes of a page
        self._bases = np.array([[pool.data_ptr()] for pool in pools], dtype=np.uint64)
        self._their_bases = np.array([[memory.address] for memory in theirs], dtype=np.uint64)
        self._sizes = np.array([[pool[0].nbytes] for pool in pools], dtype=np.uint64)

    def push(self, pools: Sequence[int], source: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        which, pages = list(pools), np.array(runs(source, target), dtype=np.uint64).reshape(-1, 3)
        sizes = self._sizes[which]
        sources = self._bases[which] + sizes * pages[:, 0]
        targets = self._their_bases[which] + sizes * pages[:, 1]
        slot, stream = self._courier.begin(self._courier.current)
        copy_many(targets.ravel(), sources.ravel(), (sizes * pages[:, 2]).ravel(), stream)
        with torch.cuda.stream(stream):
            self._carrier.post_send(slot, [self._courier.note])
        return self._courier.end_push(slot)

    def expect(self, pools: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        slot, stream = self._courier.begin(self._courier.current)
        with torch.cuda.stream(stream):
            self._carrier.post_wait(slot, _NOTE)
        self._courier.after_message()
        return self._courier.end_expect(slot)

    def close(self) -> None:
        """Unmap the peer's pools. Our streams must be idle."""
        for memory in self._theirs:
            memory.close()


class StagedPages:
    """A `PageCarrier` by messages of any carrier: pages are gathered into one and scattered out of it.

    Nothing but the receiver itself writes its pages.

    Args:
        carrier: ours alone; its slots hold the largest push.
        num_slots: as in `MappedPages`.
        pools: [pages, ...] each, contiguous, a page's bytes a multiple of 8.
    """

    def __init__(self, carrier: Carrier, num_slots: int, pools: Sequence[Tensor]) -> None:
        self._carrier = carrier
        self._pools = [pool.flatten(1).view(torch.int64) for pool in pools]
        self._courier = _Courier(carrier, num_slots, pools[0].device)

    def push(self, pools: Sequence[int], source: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        pages, sizes = self._courier.to_device(source), self._sizes(pools, len(source))
        with torch.cuda.stream(self._courier.local()):
            message = torch.empty(sum(sizes), dtype=torch.int64, device=pages.device)
            for pool, part in zip(pools, message.split(sizes), strict=True):
                torch.index_select(self._pools[pool], 0, pages, out=part.view(len(source), -1))
        slot, stream = self._courier.begin(self._courier.work)
        with torch.cuda.stream(stream):
            self._carrier.post_send(slot, [message])
        pages.record_stream(self._courier.work)
        message.record_stream(stream)
        return self._courier.end_push(slot)

    def expect(self, pools: Sequence[int], target: Sequence[int]) -> torch.cuda.Event:
        pages = self._courier.to_device(target)
        slot, message = self._take(pools, len(target))
        pages.record_stream(self._courier.work)
        with torch.cuda.stream(self._courier.after_message()):
            for pool, part in zip(pools, message.split(self._sizes(pools, len(target))), strict=True):
                self._pools[pool].index_copy_(0, pages, part.view(len(target), -1))
        return self._courier.end_expect(slot)

    def skip(self, pools: Sequence[int], num_pages: int) -> torch.cuda.Event:
        """Take the peer's next push, of so many pages of each pool, and forget it."""
        slot, _ = self._take(pools, num_pages)
        self._courier.after_message()
        return self._courier.end_expect(slot)

    def settle(self) -> None:
        """Hold the current stream until the pages of all pushes have been read, wherever those are."""
        self._courier.current.wait_stream(self._courier.work)

    @property
    def is_idle(self) -> bool:
        """Whether the device has done all that was posted, answers too."""
        return self._courier.is_idle

    def _take(self, pools: Sequence[int], num_pages: int) -> tuple[int, Tensor]:
        """The slot and the message of the next push, int64, for those who follow the courier."""
        slot, stream = self._courier.begin(self._courier.current)
        size = sum(self._sizes(pools, num_pages))
        with torch.cuda.stream(stream):
            (message,) = self._carrier.post_wait(slot, Parcel((((size,), torch.int64),)))
        return slot, message

    def _sizes(self, pools: Sequence[int], num_pages: int) -> list[int]:
        """Words of each pool's part of a message."""
        return [num_pages * self._pools[pool].shape[1] for pool in pools]


class _Courier:
    """The streams of a page carrier, and whose turn it is among its slots.

    Work on our own pages, messages, and the acknowledgements that a sender waits for have a stream each, so
    that a push is gathered while the one before is on its way.
    """

    def __init__(self, carrier: Carrier, num_slots: int, device: torch.device) -> None:
        self._carrier, self._device = carrier, device
        self.work, self._messages, self._answers = (torch.cuda.Stream(device) for _ in range(3))
        self._turns = cycle(range(num_slots))
        self._under_way: dict[int, torch.cuda.Event] = {}
        self.note = torch.ones(1, dtype=torch.int32, device=device)

    @property
    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)

    @property
    def is_idle(self) -> bool:
        return all(stream.query() for stream in (self.work, self._messages, self._answers))

    def to_device(self, pages: Sequence[int]) -> Tensor:
        """Page numbers, int64, by an asynchronous copy on the current stream."""
        return torch.tensor(pages, dtype=torch.int64).pin_memory().to(self._device, non_blocking=True)

    def local(self) -> torch.cuda.Stream:
        """The stream for our own pages, behind the current one."""
        self.work.wait_stream(self.current)
        return self.work

    def begin(self, after: torch.cuda.Stream) -> tuple[int, torch.cuda.Stream]:
        """The next slot, and the stream for its message: behind another stream and the slot's last use."""
        slot = next(self._turns)
        self._messages.wait_stream(after)
        if before := self._under_way.get(slot):
            self._messages.wait_event(before)
        return slot, self._messages

    def after_message(self) -> torch.cuda.Stream:
        """The stream for our own pages, behind the last message."""
        self.work.wait_stream(self._messages)
        return self.work

    def end_push(self, slot: int) -> torch.cuda.Event:
        """When the peer has answered; the next push need not wait for that."""
        self._answers.wait_stream(self._messages)
        with torch.cuda.stream(self._answers):
            self._carrier.post_wait(slot, _NOTE)
            return self._record(slot)

    def end_expect(self, slot: int) -> torch.cuda.Event:
        """When the work on what came is done; then it is acknowledged."""
        with torch.cuda.stream(self.work):
            event = self._record(slot)
            self._carrier.post_send(slot, [self.note])
        return event

    def _record(self, slot: int) -> torch.cuda.Event:
        event = self._under_way[slot] = torch.cuda.Event()
        event.record()
        return event

"""Ways for pages between the GPUs of two attention workers, opened when the first sequence is handed over.

    prefill                                       decode
      RESERVE  ------------------------------->     opens a way for this peer: an endpoint of its own
      <-------------------  GRANT  where it is
      joins it                                      is joined
      both pair their GPUs (transport/pairing.py), in a thread; meanwhile the workers go on
      push     ------------------------------->     expect

Pages travel through staging slots and not straight into the peer's pool: what a sender still writes after
its lease is over must not land in pages that are somebody else's by then.
"""

from collections.abc import Sequence

import torch

from model.pages import PageCache
from workers.handoff import MESSAGE_BYTES, MOST_PUSHES
from workers.transport.carrier import Carrier, CarrierFailed
from workers.transport.config import WayConfig
from workers.transport.page_carrier import StagedPages
from workers.transport.protocol import Deadline
from workers.transport.slots import SlotPlan
from workers.ways import Way
from workers.wire import WayAddress

_WAIT_SECONDS = 5.0  # of a wait on the device: announced pages come at once, or their sender is dead


class PageWay(Way):
    """A way for pages, to or from one peer. All calls belong to the worker's own thread."""

    what = "way for pages"

    def __init__(self, config: WayConfig, number: int, cache: PageCache, joined: WayAddress | None) -> None:
        """Begin to open.

        Args:
            number: of this way among the worker's.
            joined: where the peer waits; None to wait for it.
        """
        self._pools = [pool for layer in cache.layers for pool in (layer.latents, layer.index_keys)]
        super().__init__(config, number, self._pools[0].device, _WAIT_SECONDS)
        self.joined = joined
        self.address = WayAddress(self._endpoint.address, joined.epoch if joined else number)
        self._pages: StagedPages | None = None
        self._under_way: list[torch.cuda.Event] = []
        self.start()

    @property
    def has_room(self) -> bool:
        """Whether a push may be posted now: it is open, and not too many are under way."""
        self._under_way = [event for event in self._under_way if not event.query()]
        return self.is_open and len(self._under_way) < MOST_PUSHES

    def push(self, layer: int, pages: Sequence[int]) -> torch.cuda.Event:
        """Send pages of a layer as they are after the work before; the event: the peer has them."""
        assert self._pages
        event = self._pages.push(_pools_of(layer), pages, pages)
        self._under_way.append(event)
        return event

    def settle(self) -> None:
        """Whatever runs next may write to the pages of earlier pushes, whether the peer has them or not."""
        if pages := self._pages:  # the other thread may just have given it back
            pages.settle()

    def expect(self, layer: int, pages: Sequence[int]) -> torch.cuda.Event:
        """Take the peer's next push into these pages; the event: they are there."""
        assert self._pages
        return self._pages.expect(_pools_of(layer), pages)

    def skip(self, layer: int, num_pages: int) -> None:
        """Take the peer's next push and forget it."""
        assert self._pages
        self._pages.skip(_pools_of(layer), num_pages)

    def _find(self, deadline: Deadline) -> tuple[str, int, SlotPlan]:
        if self.joined:
            peer = self._endpoint.connect(self.joined.address, deadline).name
        else:
            peer = self._wait_for_peer(deadline)
        a_page = sum(pool[0].nbytes for pool in self._pools[:2])
        return peer, self.address.epoch, SlotPlan(MOST_PUSHES, max(MESSAGE_BYTES, a_page))

    def _begin(self, carrier: Carrier) -> None:
        self._pages = StagedPages(carrier, MOST_PUSHES, self._pools)

    def _is_idle(self) -> bool:
        return self._pages is None or self._pages.is_idle

    def _give_back(self) -> None:
        super()._give_back()
        self._pages = None


class PageWays:
    """A worker's ways in one direction, by peer."""

    def __init__(self, config: WayConfig, cache: PageCache) -> None:
        self._config, self._cache = config, cache
        self._ways: dict[str, PageWay] = {}
        self._number = 0

    def open_for(self, peer: str) -> PageWay:
        """The way by which a peer's pages come; it may be joined at its address."""
        return self._way(peer, None)

    def join(self, peer: str, where: WayAddress) -> PageWay:
        """The way to a peer who waits there."""
        return self._way(peer, where)

    def of(self, peer: str) -> PageWay:
        """The newest way that was opened for a peer, or joined.

        Raises:
            CarrierFailed: there is none that works.
        """
        way = self._ways.get(peer)
        if way is None:
            raise CarrierFailed(peer, "there is no way for pages")
        way.check()
        return way

    def end(self, peer: str, reason: str) -> None:
        """The peer is gone, or its way is of no use."""
        if way := self._ways.pop(peer, None):
            way.close(reason)

    def close(self) -> None:
        for peer in list(self._ways):
            self.end(peer, "the worker ends")

    def _way(self, peer: str, joined: WayAddress | None) -> PageWay:
        way = self._ways.get(peer)
        if way and (not _works(way) or (joined and way.joined != joined)):
            self.end(peer, "another takes its place")
            way = None
        if way is None:
            self._number += 1
            way = self._ways[peer] = PageWay(self._config, self._number, self._cache, joined)
        return way


class Ways:
    """A worker's ways: out of its pages, and into them."""

    def __init__(self, config: WayConfig, cache: PageCache) -> None:
        self.out, self.into = (PageWays(config.named(end), cache) for end in ("out", "into"))

    def close(self) -> None:
        self.out.close()
        self.into.close()


def _works(way: PageWay) -> bool:
    try:
        way.check()
    except CarrierFailed:
        return False
    return True


def _pools_of(layer: int) -> tuple[int, int]:
    """Latents and index keys."""
    return 2 * layer, 2 * layer + 1

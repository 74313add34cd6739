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

import logging
import threading
import time
from collections.abc import Sequence

import torch

from model.pages import PageCache
from workers.handoff import MESSAGE_BYTES, MOST_PUSHES, OPENING_SECONDS, WayConfig
from workers.transport.carrier import Carrier, CarrierFailed, CarrierUnavailable
from workers.transport.config import EndpointConfig
from workers.transport.cuda_memory import CudaError
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import TransportError
from workers.transport.page_carrier import StagedPages
from workers.transport.pairing import keep_watch, pair
from workers.transport.protocol import Deadline, DeadlineExceeded
from workers.transport.slots import SlotPlan
from workers.wire import WayAddress

_log = logging.getLogger(__name__)

_WAIT_SECONDS = 5.0  # of a wait on the device: announced pages come at once, or their sender is dead
_POLL_SECONDS = 0.05


class PageWay:
    """A way to or from one peer: opening, then open, then failed, for ever.

    A thread pairs and then watches the connection, whose end is the first that is heard of a peer's death.
    All calls belong to the worker's own thread; only after its `close` does the other give the memory back,
    as what was posted meanwhile may still use it.
    """

    def __init__(self, config: WayConfig, number: int, cache: PageCache, joined: WayAddress | None) -> None:
        """Begin to open.

        Args:
            number: of this way among the worker's.
            joined: where the peer waits; None to wait for it.
        """
        name = f"{config.name}/{number}"
        self._endpoint = PeerEndpoint(EndpointConfig(name, config.token, tcp_host=config.tcp_host))
        self.joined = joined
        self.address = WayAddress(self._endpoint.address, joined.epoch if joined else number)
        self._kind = config.kind
        self._pools = [pool for layer in cache.layers for pool in (layer.latents, layer.index_keys)]
        self._device = self._pools[0].device
        self._pages: StagedPages | None = None
        self._carrier: Carrier | None = None
        self._failure: str | None = None
        self._under_way: list[torch.cuda.Event] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    @property
    def is_open(self) -> bool:
        return self._pages is not None

    @property
    def is_opening(self) -> bool:
        """Whether it may still open; that has a deadline of its own."""
        return not self.is_open and self._failure is None

    @property
    def has_room(self) -> bool:
        """Whether a push may be posted now: it is open, and not too many are under way."""
        self._under_way = [event for event in self._under_way if not event.query()]
        return self.is_open and len(self._under_way) < MOST_PUSHES

    def check(self) -> None:
        """Raises CarrierFailed once anything went wrong."""
        if self._failure is not None:
            raise CarrierFailed(self.address.address.name, self._failure)
        if self._carrier:
            self._carrier.check()

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

    def close(self, reason: str) -> None:
        """End it: whatever waits for the peer goes on. Its memory goes back when the GPU has done with it.

        May be called twice.
        """
        self._fail(reason)
        self._stop.set()

    def _run(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            deadline = Deadline.after(OPENING_SECONDS)
            peer = self._meet(deadline)
            self._pair(peer, deadline)
            assert self._carrier
            keep_watch(self._endpoint, {peer: self._carrier}, self._stop, lambda _: None)
        except (CarrierFailed, CarrierUnavailable, CudaError, TransportError) as error:
            _log.warning("no way for pages: %s", error)
            self._fail(str(error))
        except BaseException as error:
            _log.exception("no way for pages")
            self._fail(type(error).__name__)
        finally:
            self._endpoint.close()  # so the peer hears of it
        self._stop.wait()
        self._give_back()

    def _meet(self, deadline: Deadline) -> str:
        if self.joined:
            return self._endpoint.connect(self.joined.address, deadline).name
        while not self._endpoint.peers:
            if self._stop.is_set():
                raise CarrierFailed(self.address.address.name, "it was closed")
            if deadline.is_over:
                raise DeadlineExceeded("waiting for the peer of a way for pages")
            self._endpoint.pump(_POLL_SECONDS)
        return next(iter(self._endpoint.peers))

    def _pair(self, peer: str, deadline: Deadline) -> None:
        a_page = sum(pool[0].nbytes for pool in self._pools[:2])
        plan = SlotPlan(MOST_PUSHES, max(MESSAGE_BYTES, a_page))
        self._carrier = pair(
            self._endpoint, peer, self._kind, self.address.epoch, plan, self._device,
            timeout=_WAIT_SECONDS, deadline=deadline,
        )  # fmt: skip
        if self._failure is not None:  # it was closed meanwhile
            raise CarrierFailed(peer, self._failure)
        self._pages = StagedPages(self._carrier, MOST_PUSHES, self._pools)

    def _fail(self, reason: str) -> None:
        self._failure = self._failure or reason
        if carrier := self._carrier:
            carrier.abort(reason)

    def _give_back(self) -> None:
        """Close the carrier once nothing on the GPU uses it. However long that takes: until then this thread,
        which has nothing else to do, holds memory that must not be given to others."""
        while self._pages and not self._pages.is_idle:
            time.sleep(_POLL_SECONDS)
        try:
            if self._carrier:
                self._carrier.close()
        except (CudaError, TransportError) as error:
            _log.warning("closing a way for pages: %s", error)
        self._pages = self._carrier = None


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

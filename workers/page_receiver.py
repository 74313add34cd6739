"""The decode side of a hand-over (`handoff.py`): reserves pages, takes what comes, goes on from there."""

import logging
from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.errors import RequestError
from model.pages import PageCache
from workers.allocation import Wait
from workers.engine import Engine
from workers.handoff import MOST_PUSHES, Lease, at_once, sooner, why_over
from workers.page_pool import pages_for
from workers.sequence import Sequence
from workers.transport.carrier import CarrierFailed
from workers.transport.config import OPENING_SECONDS
from workers.transport.message import MalformedMessage, Message, TransportError
from workers.transport.protocol import Deadline, Endpoint, Peer
from workers.wire import Adopted, Drop, Grant, HandOver, Kind, Reserve, pack

if TYPE_CHECKING:
    from workers.page_ways import PageWay, PageWays

_log = logging.getLogger(__name__)

_MOST_ANNOUNCED = 4 * MOST_PUSHES  # by one peer and not taken yet: its way's, and those of ways that failed


@dataclass
class Arrival:
    """A sequence on its way in; `sequence` is None while it waits for pages.

    `arrived` counts its pages by layer; those that are pushed come by `way` alone, and are there with the
    events of `landing`.
    """

    reserve: Reserve
    peer: str
    deadline: Deadline
    lease: int
    expiry: Deadline
    keys: list[bytes] | None = None
    sequence: Sequence | None = None
    way: "PageWay | None" = None
    arrived: list[int] = field(default_factory=list)
    landing: list[torch.cuda.Event] = field(default_factory=list)
    handed: HandOver | None = None

    def is_landing(self) -> bool:
        """Whether a device may still write its pages."""
        self.landing = [event for event in self.landing if not event.query()]
        return bool(self.landing)


class PageReceiver:
    """The decode side: reserves pages, writes what comes into them, and adopts complete sequences.

    Args:
        num_layers: whose pages must have come before a sequence can go on: all that the engine fills.
        ways: from GPU to GPU; None for pages in messages.
    """

    def __init__(
        self,
        engine: Engine,
        cache: PageCache,
        endpoint: Endpoint,
        lease: Lease,
        num_layers: int,
        ways: "PageWays | None" = None,
    ) -> None:
        self._engine, self._cache, self._endpoint = engine, cache, endpoint
        self._lease, self._num_layers, self._ways = lease, num_layers, ways
        self._announced: dict[str, deque[Message]] = defaultdict(deque)  # PUSHED, by peer, not taken yet
        self._limbo: list[tuple[Arrival, Sequence]] = []  # over, but a device may still write their pages
        self._arrivals: dict[int, Arrival] = {}  # by lease, in order of arrival
        self._num_leases = 0
        self.num_stray = 0  # messages with pages under a lease that is over: dropped

    def grant(self) -> None:
        """Reserve pages for those that wait, in order, as far as there is room."""
        for arrival in [arrival for arrival in self._arrivals.values() if arrival.sequence is None]:
            request = arrival.reserve.request
            try:
                sequence = self._engine.reserve(request, arrival.keys)
            except RequestError as error:
                _log.warning("%s asked for what cannot run here: %s", arrival.peer, error)
                self._drop(arrival.lease)
                self._reply(arrival, pack(Kind.DROP, Drop(request.uid, "overloaded")))
                continue
            if isinstance(sequence, Sequence):
                arrival.sequence = sequence
                arrival.arrived = [sequence.num_shared] * len(self._cache.layers)
                arrival.way = self._ways.open_for(arrival.peer) if self._ways else None
                self._renew(arrival)
                where = arrival.way.address if arrival.way else None
                grant = Grant(request.uid, arrival.lease, sequence.num_shared, where)
                self._reply(arrival, pack(Kind.GRANT, grant))
                continue
            arrival.keys = arrival.keys or self._engine.keys_of(request)  # it will be asked again and again
            if sequence is Wait.FOR_ROOM:
                break

    def lost(self, peer: str) -> None:
        """A prefill worker is gone: what it had not handed over will never be complete."""
        if self._ways:
            self._ways.end(peer, "its worker is gone")
        self._announced.pop(peer, None)
        for lease in [lease for lease, arrival in self._arrivals.items() if arrival.peer == peer]:
            self._drop(lease)

    def expire(self) -> None:
        """Leases that are over."""
        for lease in [lease for lease, arrival in self._arrivals.items() if arrival.expiry.is_over]:
            arrival = self._drop(lease)
            why = why_over(arrival.deadline)
            self._reply(arrival, pack(Kind.DROP, Drop(arrival.reserve.request.uid, why)))

    def cancel(self, uid: str) -> None:
        """Forget a request that has not been handed over."""
        for lease in [
            lease for lease, arrival in self._arrivals.items() if arrival.reserve.request.uid == uid
        ]:
            self._drop(lease)

    def reserve(self, peer: Peer, reserve: Reserve, deadline: Deadline) -> None:
        """Take pages, or note who waits for them. `deadline` is the request's."""
        self._num_leases += 1
        arrival = Arrival(reserve, peer.name, deadline, self._num_leases, expiry=deadline)
        if reserve.digest != self._lease.digest:
            self._reply(arrival, pack(Kind.DROP, Drop(reserve.request.uid, "replica_lost")))
            return
        self._arrivals[arrival.lease] = arrival
        self.grant()

    def write(self, peer: Peer, message: Message) -> None:
        """Put pages where they belong.

        Raises:
            MalformedMessage: they do not fit what was reserved.
        """
        arrival = self._arrival(message.sequence, peer.name)
        if arrival is None:
            self.num_stray += 1
            return
        if arrival.way or len(message.tensors) != 2:
            raise MalformedMessage(f"pages in {len(message.tensors)} tensors of a message")
        latents, index_keys = message.tensors
        places = self._places(arrival, message, len(latents) if latents.ndim else 0)
        pages = self._cache.layers[message.layer]
        fits = (
            latents.dtype == pages.latents.dtype
            and index_keys.dtype == pages.index_keys.dtype
            and latents.shape[1:] == pages.latents.shape[1:]
            and index_keys.shape == (len(latents), *pages.index_keys.shape[1:])
        )
        if not fits:
            raise MalformedMessage(f"pages of layer {message.layer} have another shape")
        device = pages.latents.device
        ids = torch.tensor(places).to(device)
        pages.latents[ids], pages.index_keys[ids] = latents.to(device), index_keys.to(device)
        arrival.arrived[message.layer] += len(places)
        self._renew(arrival)

    def announce(self, peer: Peer, message: Message) -> None:
        """Pages come by their own way; `take_pushed` takes them, in the order of their announcements.

        Raises:
            MalformedMessage: that is no announcement, or there is no such way.
        """
        (count,) = message.tensors if len(message.tensors) == 1 else (None,)
        if self._ways is None or count is None or count.dtype != torch.int64 or count.shape != (1,):
            raise MalformedMessage("pages were pushed that nobody asked for")
        if len(self._announced[peer.name]) >= _MOST_ANNOUNCED:
            raise MalformedMessage(f"more than {_MOST_ANNOUNCED} pushes are said to be under way")
        self._announced[peer.name].append(message)

    def adopt(self, peer: Peer, handed: HandOver) -> Arrival | None:
        """Go on with a sequence from here; None if its lease is over, or its pages are still on their way.

        Raises:
            MalformedMessage: pages are missing, or the first token is not that of this request.
        """
        arrival = self._arrival(handed.lease, peer.name)
        if arrival is None:
            return None  # the source was told
        assert arrival.sequence
        uid, num_prompt, first = arrival.reserve.request.uid, arrival.sequence.num_prompt, handed.first
        if (handed.uid, first.uid, first.position, first.finish_reason) != (uid, uid, num_prompt, None):
            raise MalformedMessage(f"{first} is not the first token of {uid}")
        arrival.handed = handed
        if self._ways is None:
            self._go_on(arrival)
            return arrival
        return None

    @property
    def is_busy(self) -> bool:
        """Whether pages are on their way from another GPU that somebody waits for."""
        return bool(self._limbo) or any(arrival.handed for arrival in self._arrivals.values())

    def take_pushed(self) -> list[Arrival]:
        """Take what was announced; those whose pages are all there, and who go on."""
        landed: list[Arrival] = []
        if self._ways is None:
            return landed
        granted = {arrival.peer for arrival in self._arrivals.values() if arrival.way}
        for peer in granted | {peer for peer, announced in self._announced.items() if announced}:
            try:
                way = self._ways.of(peer)
                self._give_up(peer, but_for=way)
                self._expect_announced(peer, way)
                for arrival in self._landed(peer, way):
                    self._go_on(arrival)
                    landed.append(arrival)
            except (CarrierFailed, MalformedMessage) as error:
                _log.warning("pages of %s: %s", peer, error)
                self._ways.end(peer, str(error))
                self._announced.pop(peer, None)
                self._give_up(peer)
        self._leave_limbo()
        return landed

    def _expect_announced(self, peer: str, way: "PageWay") -> None:
        announced = self._announced[peer]
        while announced and way.is_open:
            message = announced.popleft()
            if message.epoch != way.address.epoch:  # a push of a way that has failed
                self.num_stray += 1
                continue
            count, layer = int(message.tensors[0]), message.layer
            layers = self._cache.layers
            if not 0 <= layer < len(layers) or not 0 < count <= at_once(layers[layer]):
                raise MalformedMessage(f"{count} pushed pages of layer {layer}")
            arrival = self._arrival(message.sequence, peer)
            if arrival is None:
                self.num_stray += 1
                way.skip(layer, count)
                continue
            arrival.landing.append(way.expect(layer, self._places(arrival, message, count)))
            arrival.arrived[layer] += count
            self._renew(arrival)

    def _landed(self, peer: str, way: "PageWay") -> list[Arrival]:
        """Those of a peer whose pages are there.

        Raises:
            CarrierFailed: they are not, whatever the device says.
        """
        if self._announced[peer]:
            return []
        handed = [arrival for arrival in self._arrivals.values() if arrival.peer == peer and arrival.handed]
        landed = [arrival for arrival in handed if not arrival.is_landing()]
        way.check()  # after the events: they come after a failure too
        return landed

    def _go_on(self, arrival: Arrival) -> None:
        """Run a sequence that was handed over.

        Raises:
            MalformedMessage: pages are missing, or its first token is none of this model.
        """
        assert arrival.sequence
        assert arrival.handed
        expected = pages_for(arrival.sequence.num_prompt)
        if any(count != expected for count in arrival.arrived[: self._num_layers]):
            raise MalformedMessage(f"{arrival.arrived} pages came of {expected} a layer")
        uid = arrival.handed.uid
        try:
            self._engine.adopt(uid, arrival.handed.first)
        except RequestError as error:
            raise MalformedMessage(str(error)) from error
        del self._arrivals[arrival.lease]
        self._reply(arrival, pack(Kind.ADOPTED, Adopted(uid)))

    def _give_up(self, peer: str, but_for: "PageWay | None" = None) -> None:
        """Nothing more comes from a peer by the ways it had: what came by them may be garbage."""
        for arrival in list(self._arrivals.values()):
            if arrival.peer != peer or arrival.way is None or arrival.way is but_for:
                continue
            self._drop(arrival.lease)
            self._reply(arrival, pack(Kind.DROP, Drop(arrival.reserve.request.uid, "replica_lost")))

    def _arrival(self, lease: int, peer: str) -> Arrival | None:
        """Who has pages under a lease that this peer holds."""
        arrival = self._arrivals.get(lease)
        if arrival is None or arrival.sequence is None or arrival.peer != peer:
            return None
        return arrival

    def _places(self, arrival: Arrival, message: Message, count: int) -> list[int]:
        """The pages for the next `count` of a layer.

        Raises:
            MalformedMessage: it is not these that come.
        """
        assert arrival.sequence
        layer, start = message.layer, message.step
        if not 0 <= layer < len(self._cache.layers):
            raise MalformedMessage(f"pages of layer {layer}")
        stop = start + count
        if start != arrival.arrived[layer] or stop > len(arrival.sequence.pages):
            raise MalformedMessage(f"pages {start} to {stop} of layer {layer} do not fit the lease")
        return arrival.sequence.pages[start:stop]

    def _drop(self, lease: int) -> Arrival:
        arrival = self._arrivals.pop(lease)
        uid = arrival.reserve.request.uid
        if arrival.is_landing() and (sequence := self._engine.detach(uid)):
            self._limbo.append((arrival, sequence))
        self._engine.cancel(uid)
        return arrival

    def _leave_limbo(self) -> None:
        """Free the pages that no device writes any more."""
        over = [(arrival, sequence) for arrival, sequence in self._limbo if not arrival.is_landing()]
        for entry in over:
            self._limbo.remove(entry)
            self._engine.release(entry[1])

    def _renew(self, arrival: Arrival) -> None:
        opening = OPENING_SECONDS if arrival.way and arrival.way.is_opening else 0.0
        arrival.expiry = sooner(Deadline.after(self._lease.seconds + opening), arrival.deadline)

    def _reply(self, arrival: Arrival, message: Message) -> None:
        try:
            self._endpoint.send(arrival.peer, message, Deadline.after(self._lease.seconds))
        except TransportError as error:
            _log.warning("%s did not hear from us: %s", arrival.peer, error)

"""A sequence moves from the engine that prefills it to the one that decodes it.

    prefill                                   decode
      RESERVE   request ------------------->    takes pages, now or when there is room
      <--------------- GRANT  lease, page       pages before that one are known there already
      PAGES     lease, layer, page -------->    written as they come: layer by layer, chunk by chunk
      HAND_OVER lease, first token -------->    checks that nothing is missing, and goes on
      <--------------- ADOPTED                  the source's copy is free to be forgotten

The first token goes to the client as soon as it is drawn; it waits for none of this. Either side may DROP.
Both ends hold their pages under a lease: it ends with the peer, with the request's own deadline, or when
nothing has moved for `lease_seconds`.

PAGES: header: sequence = lease, layer, step = number of the first page within the sequence; tensors: latents
[n, ..] and index keys [n, ..] of n pages, in the cache's own format.
"""

import logging
from dataclasses import dataclass, field

import torch

from model.errors import RequestError
from model.inputs import PAGE_SIZE
from model.pages import PageCache
from workers.allocation import Wait
from workers.engine import Engine
from workers.page_pool import pages_for
from workers.schedule import Batch
from workers.sequence import Request, Sequence, Token
from workers.transport.message import MalformedMessage, Message, TransportError
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Endpoint, Peer
from workers.wire import Adopted, Drop, Grant, HandOver, Kind, Reserve, Why, pack

_log = logging.getLogger(__name__)

_MESSAGE_BYTES = 8 * 2**20  # of pages in one message
_CONNECT_SECONDS = 1.0


@dataclass(frozen=True)
class Lease:
    """What both ends agree on: pages are worth something for the same weights only, and not for ever.

    `seconds` is how long a lease lives in which nothing moves; `digest` names the weights.
    """

    digest: str
    seconds: float


@dataclass(frozen=True)
class Lapse:
    """A request whose hand-over failed, for the client that waits for it."""

    uid: str
    why: Why


@dataclass
class Handoff:
    """A sequence on its way out. `sent` counts the pages that have left, by layer."""

    request: Request
    client: str
    target: Address
    deadline: Deadline
    lease_seconds: float
    expiry: Deadline
    lease: int | None = None
    first: Token | None = None
    sent: list[int] = field(default_factory=list)

    def has_moved(self) -> None:
        """The lease, where there is one, starts anew, within the request's own time."""
        if self.lease is not None:
            self.expiry = _sooner(Deadline.after(self.lease_seconds), self.deadline)


class PageSender:
    """The prefill side: pushes the pages of sequences that are handed over, layer by layer.

    Args:
        num_layers: whose pages travel: all that the engine fills.
    """

    def __init__(
        self, engine: Engine, cache: PageCache, endpoint: Endpoint, lease: Lease, num_layers: int
    ) -> None:
        self._engine, self._cache, self._endpoint = engine, cache, endpoint
        self._lease, self._num_layers = lease, num_layers
        self._handoffs: dict[str, Handoff] = {}
        self._targets: dict[str, Address] = {}  # where we connected, by name
        self.num_pages = 0  # sent, each layer's counted

    def __contains__(self, uid: str) -> bool:
        return uid in self._handoffs

    def add(self, request: Request, client: str, target: Address, deadline: Deadline) -> None:
        """Remember where a request goes; pages are asked for when it starts to run."""
        self._handoffs[request.uid] = Handoff(
            request, client, target, deadline, self._lease.seconds, expiry=deadline
        )

    def on_layer(self, batch: Batch, layer: int) -> None:
        """Push what a layer has completed of each sequence; the MTP layer follows in the next step."""
        for share in batch.shares:
            handoff = self._handoffs.get(share.sequence.request.uid)
            if handoff is None:
                continue
            if not handoff.sent:
                self._ask(handoff)
            if handoff.lease is None or handoff.expiry.is_over:
                continue
            done = share.sequence.num_cached
            if layer == 0:  # what was complete before: the MTP layer's, and all if the grant has just come
                for every in range(self._num_layers):
                    self._push(handoff, share.sequence, every, done // PAGE_SIZE)
            self._push(handoff, share.sequence, layer, (done + share.num_known) // PAGE_SIZE)

    def first_token(self, token: Token) -> None:
        """The prefill is over: the rest of the pages can follow."""
        handoff = self._handoffs.get(token.uid)
        if handoff is None:
            return
        if token.finish_reason:
            self._tell_off(handoff, "replica_lost")
            del self._handoffs[token.uid]
            return
        handoff.first = token
        if handoff.lease is not None and not handoff.expiry.is_over:
            handoff.has_moved()
            self._complete(handoff)

    def adopted(self, peer: Peer, uid: str) -> bool:
        """The other side has everything: our copy is worth no more than any cached page."""
        if not self._goes_to(peer, uid):
            return False
        del self._handoffs[uid]
        self._engine.cancel(uid)
        return True

    def dropped(self, peer: Peer, drop: Drop) -> list[Lapse]:
        """The other side gives up."""
        return [self._give_up(drop.uid, drop.why)] if self._goes_to(peer, drop.uid) else []

    def lost(self, peer: str) -> list[Lapse]:
        """A decode worker is gone, and with it the pages it had reserved."""
        gone = [
            uid for uid, handoff in self._handoffs.items() if handoff.target.name == peer and handoff.sent
        ]
        return [self._give_up(uid, "replica_lost") for uid in gone]

    def expire(self) -> list[Lapse]:
        """Leases that are over."""
        over = [handoff for handoff in self._handoffs.values() if handoff.expiry.is_over]
        lapses = []
        for handoff in over:
            why = _why_over(handoff.deadline)
            _log.warning("hand-over of %s to %s: %s", handoff.request.uid, handoff.target.name, why)
            self._tell_off(handoff, why)
            lapses.append(self._give_up(handoff.request.uid, why))
        return lapses

    def cancel(self, uid: str) -> None:
        """Forget a request, and tell the other side."""
        if handoff := self._handoffs.pop(uid, None):
            self._tell_off(handoff, "replica_lost")

    def _goes_to(self, peer: Peer, uid: str) -> bool:
        """Whether a request is being handed over to this peer; what others say of it is old."""
        return uid in self._handoffs and self._handoffs[uid].target.name == peer.name

    def _give_up(self, uid: str, why: Why) -> Lapse:
        del self._handoffs[uid]
        self._engine.cancel(uid)
        return Lapse(uid, why)

    def _ask(self, handoff: Handoff) -> None:
        target = handoff.target
        if self._targets.setdefault(target.name, target) != target:  # a successor that took its name
            self._part_from(target.name)
            self._targets[target.name] = target
        handoff.sent = [0] * self._num_layers
        body = Reserve(handoff.request, handoff.client, self._lease.digest)
        try:
            self._endpoint.connect(target, Deadline.after(_CONNECT_SECONDS))
        except TransportError as error:
            _log.warning("cannot hand over to %s: %s", target.name, error)
            handoff.expiry = Deadline.after(0)
            return
        self._send(handoff, pack(Kind.RESERVE, body, handoff.deadline.left_us()))

    def granted(self, peer: Peer, grant: Grant) -> None:
        """Pages are reserved: push what is computed."""
        if not self._goes_to(peer, grant.uid):  # cancelled meanwhile
            self._post(peer.name, pack(Kind.DROP, Drop(grant.uid, "replica_lost")))
            return
        handoff = self._handoffs[grant.uid]
        handoff.lease = grant.lease
        handoff.sent = [grant.first_page] * self._num_layers
        handoff.has_moved()
        if handoff.first:
            self._complete(handoff)

    def _complete(self, handoff: Handoff) -> None:
        """Push all that is left and hand over."""
        sequence = self._engine.parked(handoff.request.uid)
        assert sequence, handoff.request.uid
        assert handoff.first
        assert handoff.lease is not None
        for layer in range(self._num_layers):
            self._push(handoff, sequence, layer, pages_for(sequence.num_prompt))
        if handoff.expiry.is_over:
            return
        self._send(handoff, pack(Kind.HAND_OVER, HandOver(handoff.request.uid, handoff.lease, handoff.first)))

    def _push(self, handoff: Handoff, sequence: Sequence, layer: int, stop: int) -> None:
        """Send the pages of a layer up to the number `stop` that have not been sent."""
        pages = self._cache.layers[layer]
        a_page = pages.latents[0].nbytes + pages.index_keys[0].nbytes
        at_once = max(1, _MESSAGE_BYTES // a_page)
        assert handoff.lease is not None
        while handoff.sent[layer] < stop and not handoff.expiry.is_over:
            start = handoff.sent[layer]
            ids = torch.tensor(sequence.pages[start : min(stop, start + at_once)])
            tensors = pages.latents[ids], pages.index_keys[ids]
            self._send(handoff, Message(Kind.PAGES, tensors, sequence=handoff.lease, layer=layer, step=start))
            handoff.sent[layer] += len(ids)
            self.num_pages += len(ids)

    def _send(self, handoff: Handoff, message: Message) -> None:
        try:
            self._endpoint.send(
                handoff.target.name, message, _sooner(Deadline.after(handoff.lease_seconds), handoff.deadline)
            )
            handoff.has_moved()
        except TransportError as error:
            _log.warning("handing over to %s: %s", handoff.target.name, error)
            handoff.expiry = Deadline.after(0)
            if isinstance(error, DeadlineExceeded) and not handoff.deadline.is_over:
                self._part_from(handoff.target.name)

    def _part_from(self, target: str) -> None:
        """Give up a decode worker with all that goes there, which need not be waited for once a sequence."""
        self._endpoint.disconnect(target)
        for handoff in self._handoffs.values():
            if handoff.target.name == target and handoff.sent:
                handoff.expiry = Deadline.after(0)

    def _tell_off(self, handoff: Handoff, why: Why) -> None:
        if handoff.sent:
            self._post(handoff.target.name, pack(Kind.DROP, Drop(handoff.request.uid, why)))

    def _post(self, peer: str, message: Message) -> None:
        try:
            self._endpoint.send(peer, message, Deadline.after(self._lease.seconds))
        except TransportError as error:
            _log.warning("%s did not hear of a dropped hand-over: %s", peer, error)


@dataclass
class Arrival:
    """A sequence on its way in; `sequence` is None while it waits for pages."""

    reserve: Reserve
    peer: str
    deadline: Deadline
    lease: int
    expiry: Deadline
    keys: list[bytes] | None = None
    sequence: Sequence | None = None
    arrived: list[int] = field(default_factory=list)


class PageReceiver:
    """The decode side: reserves pages, writes what comes into them, and adopts complete sequences.

    Args:
        num_layers: whose pages must have come before a sequence can go on: all that the engine fills.
    """

    def __init__(
        self, engine: Engine, cache: PageCache, endpoint: Endpoint, lease: Lease, num_layers: int
    ) -> None:
        self._engine, self._cache, self._endpoint = engine, cache, endpoint
        self._lease, self._num_layers = lease, num_layers
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
                self._renew(arrival)
                self._reply(arrival, pack(Kind.GRANT, Grant(request.uid, arrival.lease, sequence.num_shared)))
                continue
            arrival.keys = arrival.keys or self._engine.keys_of(request)  # it will be asked again and again
            if sequence is Wait.FOR_ROOM:
                break

    def lost(self, peer: str) -> None:
        """A prefill worker is gone: what it had not handed over will never be complete."""
        for lease in [lease for lease, arrival in self._arrivals.items() if arrival.peer == peer]:
            self._drop(lease)

    def expire(self) -> None:
        """Leases that are over."""
        for lease in [lease for lease, arrival in self._arrivals.items() if arrival.expiry.is_over]:
            arrival = self._drop(lease)
            why = _why_over(arrival.deadline)
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
        arrival = self._arrivals.get(message.sequence)
        if arrival is None or arrival.sequence is None or arrival.peer != peer.name:
            self.num_stray += 1
            return
        layer, start = message.layer, message.step
        if not 0 <= layer < len(self._cache.layers) or len(message.tensors) != 2:
            raise MalformedMessage(f"pages of layer {layer} in {len(message.tensors)} tensors")
        pages = self._cache.layers[layer]
        latents, index_keys = message.tensors
        stop = start + (len(latents) if latents.ndim else 0)
        fits = (
            start == arrival.arrived[layer]
            and stop <= len(arrival.sequence.pages)
            and latents.dtype == pages.latents.dtype
            and index_keys.dtype == pages.index_keys.dtype
            and latents.shape[1:] == pages.latents.shape[1:]
            and index_keys.shape == (len(latents), *pages.index_keys.shape[1:])
        )
        if not fits:
            raise MalformedMessage(f"pages {start} to {stop} of layer {layer} do not fit the lease")
        ids = torch.tensor(arrival.sequence.pages[start:stop])
        pages.latents[ids], pages.index_keys[ids] = latents, index_keys
        arrival.arrived[layer] = stop
        self._renew(arrival)

    def adopt(self, peer: Peer, handed: HandOver) -> Arrival | None:
        """Go on with a sequence from here; None if its lease is over.

        Raises:
            MalformedMessage: pages are missing, or the first token is not that of this request.
        """
        arrival = self._arrivals.get(handed.lease)
        if arrival is None or arrival.sequence is None or arrival.peer != peer.name:
            return None  # the source was told
        uid, num_prompt, first = arrival.reserve.request.uid, arrival.sequence.num_prompt, handed.first
        if (handed.uid, first.uid, first.position, first.finish_reason) != (uid, uid, num_prompt, None):
            raise MalformedMessage(f"{first} is not the first token of {uid}")
        expected = pages_for(num_prompt)
        if any(count != expected for count in arrival.arrived[: self._num_layers]):
            raise MalformedMessage(f"{arrival.arrived} pages came of {expected} a layer")
        try:
            self._engine.adopt(uid, first)
        except RequestError as error:
            raise MalformedMessage(str(error)) from error
        del self._arrivals[handed.lease]
        self._reply(arrival, pack(Kind.ADOPTED, Adopted(uid)))
        return arrival

    def _drop(self, lease: int) -> Arrival:
        arrival = self._arrivals.pop(lease)
        self._engine.cancel(arrival.reserve.request.uid)
        return arrival

    def _renew(self, arrival: Arrival) -> None:
        arrival.expiry = _sooner(Deadline.after(self._lease.seconds), arrival.deadline)

    def _reply(self, arrival: Arrival, message: Message) -> None:
        try:
            self._endpoint.send(arrival.peer, message, Deadline.after(self._lease.seconds))
        except TransportError as error:
            _log.warning("%s did not hear from us: %s", arrival.peer, error)


def _why_over(deadline: Deadline) -> Why:
    """Why a lease is over: the request's own time, or somebody who does not go on."""
    return "timeout" if deadline.is_over else "replica_lost"


def _sooner(one: Deadline, other: Deadline) -> Deadline:
    return min(one, other, key=lambda deadline: deadline.at)

"""The prefill side of a hand-over (`handoff.py`): pushes pages, layer by layer and chunk by chunk."""

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.inputs import PAGE_SIZE
from model.pages import PageCache
from workers.engine import Engine
from workers.handoff import Lapse, Lease, at_once, sooner, why_over
from workers.page_pool import pages_for
from workers.schedule import Batch
from workers.sequence import Request, Sequence, Token
from workers.stages import HandedOver
from workers.transport.carrier import CarrierFailed
from workers.transport.config import OPENING_SECONDS
from workers.transport.message import Message, TransportError
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Endpoint, Peer
from workers.wire import Drop, Grant, HandOver, Kind, Reserve, Why, pack

if TYPE_CHECKING:
    from workers.page_ways import PageWay, PageWays

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 1.0


@dataclass
class Handoff:
    """A sequence on its way out. `sent` counts the pages that have left, by layer; `way` is where they go.

    `drawn` is when its first token was there, on `time.perf_counter()`. Pages were asked for and granted when
    `asked_ns` and `granted_ns` say, by the wall clock; those before `first_page` are known there.
    """

    request: Request
    client: str
    target: Address
    deadline: Deadline
    expiry: Deadline
    lease: int | None = None
    way: "PageWay | None" = None
    first: Token | None = None
    drawn: float = 0.0
    asked_ns: int = 0
    granted_ns: int = 0
    first_page: int = 0
    sent: list[int] = field(default_factory=list)
    is_complete: bool = False

    def fail(self) -> None:
        """Let `PageSender.expire` end it."""
        self.expiry = Deadline.after(0)


class PageSender:
    """The prefill side: pushes the pages of sequences that are handed over, layer by layer.

    Args:
        num_layers: whose pages travel: all that the engine fills.
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
        self._handoffs: dict[str, Handoff] = {}
        self._targets: dict[str, Address] = {}  # where we connected, by name
        self.num_pages = 0  # sent, each layer's counted
        self.num_adopted, self.seconds = 0, 0.0  # sequences, and from their first tokens until then

    def __contains__(self, uid: str) -> bool:
        return uid in self._handoffs

    def add(self, request: Request, client: str, target: Address, deadline: Deadline) -> None:
        """Remember where a request goes; pages are asked for when it starts to run."""
        self._handoffs[request.uid] = Handoff(request, client, target, deadline, expiry=deadline)

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
            self.cancel(token.uid)
            return
        handoff.first, handoff.drawn = token, time.perf_counter()
        if handoff.lease is not None and not handoff.expiry.is_over:
            self._renew(handoff)
            self._complete(handoff)

    def adopted(self, peer: Peer, uid: str) -> HandedOver | None:
        """The other side has everything: our copy is worth no more than any cached page."""
        if not self._goes_to(peer, uid):
            return None
        handoff = self._handoffs.pop(uid)
        exposed = time.perf_counter() - handoff.drawn if handoff.first else 0.0
        if handoff.first:
            self.num_adopted += 1
            self.seconds += exposed
        self._engine.cancel(uid)
        num_pages = sum(sent - handoff.first_page for sent in handoff.sent)
        granted_seconds = (handoff.granted_ns - handoff.asked_ns) / 1e9
        return HandedOver(
            handoff.asked_ns,
            time.time_ns(),
            num_pages,
            num_pages * self._page_bytes,
            granted_seconds,
            exposed,
        )

    def dropped(self, peer: Peer, drop: Drop) -> list[Lapse]:
        """The other side gives up."""
        return [self._give_up(drop.uid, drop.why)] if self._goes_to(peer, drop.uid) else []

    @property
    def num_bytes(self) -> int:
        """Of the pages that were sent."""
        return self.num_pages * self._page_bytes

    @property
    def _page_bytes(self) -> int:
        """Of a page of one layer; those of all layers are alike."""
        pages = self._cache.layers[0]
        return pages.latents[0].nbytes + pages.index_keys[0].nbytes

    @property
    def is_busy(self) -> bool:
        """Whether pages wait for room on their way."""
        ready = [handoff for handoff in self._handoffs.values() if _may_complete(handoff)]
        return any(handoff.way and not handoff.way.is_opening for handoff in ready)

    def proceed(self) -> None:
        """Push what found no room before."""
        for handoff in [handoff for handoff in self._handoffs.values() if _may_complete(handoff)]:
            self._complete(handoff)

    def lost(self, peer: str) -> list[Lapse]:
        """A decode worker is gone, and with it the pages it had reserved."""
        if self._ways:
            self._ways.end(peer, "its worker is gone")
        gone = [
            uid for uid, handoff in self._handoffs.items() if handoff.target.name == peer and handoff.sent
        ]
        return [self._give_up(uid, "replica_lost") for uid in gone]

    def expire(self) -> list[Lapse]:
        """Leases that are over."""
        over = [handoff for handoff in self._handoffs.values() if handoff.expiry.is_over]
        lapses = []
        for handoff in over:
            why = why_over(handoff.deadline)
            _log.warning("hand-over of %s to %s: %s", handoff.request.uid, handoff.target.name, why)
            self._tell_off(handoff, why)
            lapses.append(self._give_up(handoff.request.uid, why))
        return lapses

    def cancel(self, uid: str) -> None:
        """Forget a request, and tell the other side."""
        if handoff := self._forget(uid):
            self._tell_off(handoff, "replica_lost")

    def _goes_to(self, peer: Peer, uid: str) -> bool:
        """Whether a request is being handed over to this peer; what others say of it is old."""
        return uid in self._handoffs and self._handoffs[uid].target.name == peer.name

    def _give_up(self, uid: str, why: Why) -> Lapse:
        self._forget(uid)
        self._engine.cancel(uid)
        return Lapse(uid, why)

    def _forget(self, uid: str) -> Handoff | None:
        """Its pages may be somebody else's next, while a device may still read them for the other side."""
        handoff = self._handoffs.pop(uid, None)
        if handoff and handoff.way:
            handoff.way.settle()
        return handoff

    def _renew(self, handoff: Handoff) -> None:
        """The lease, where there is one, starts anew, within the request's own time."""
        if handoff.lease is not None:
            opening = OPENING_SECONDS if handoff.way and handoff.way.is_opening else 0.0
            handoff.expiry = sooner(Deadline.after(self._lease.seconds + opening), handoff.deadline)

    def _ask(self, handoff: Handoff) -> None:
        target = handoff.target
        if self._targets.setdefault(target.name, target) != target:  # a successor that took its name
            self._part_from(target.name)
            self._targets[target.name] = target
        handoff.sent, handoff.asked_ns = [0] * self._num_layers, time.time_ns()
        body = Reserve(handoff.request, handoff.client, self._lease.digest)
        try:
            self._endpoint.connect(target, Deadline.after(_CONNECT_SECONDS))
        except TransportError as error:
            _log.warning("cannot hand over to %s: %s", target.name, error)
            handoff.fail()
            return
        self._send(handoff, pack(Kind.RESERVE, body, handoff.deadline.left_us()))

    def granted(self, peer: Peer, grant: Grant) -> None:
        """Pages are reserved: push what is computed."""
        if not self._goes_to(peer, grant.uid):  # cancelled meanwhile
            self._post(peer.name, pack(Kind.DROP, Drop(grant.uid, "replica_lost")))
            return
        handoff = self._handoffs[grant.uid]
        handoff.lease, handoff.first_page, handoff.granted_ns = grant.lease, grant.first_page, time.time_ns()
        handoff.sent = [grant.first_page] * self._num_layers
        if (self._ways is None) != (grant.way is None):
            _log.error("%s moves pages by another carrier than we do", peer.name)
            handoff.fail()
            return
        if self._ways and grant.way:
            handoff.way = self._ways.join(peer.name, grant.way)
        self._renew(handoff)
        if handoff.first:
            self._complete(handoff)

    def _complete(self, handoff: Handoff) -> None:
        """Push all that is left and hand over, or go on when there is room."""
        sequence = self._engine.parked(handoff.request.uid)
        assert sequence, handoff.request.uid
        assert handoff.first
        assert handoff.lease is not None
        num_pages = pages_for(sequence.num_prompt)
        for layer in range(self._num_layers):
            self._push(handoff, sequence, layer, num_pages)
        if handoff.expiry.is_over or any(sent < num_pages for sent in handoff.sent):
            return
        handoff.is_complete = True
        self._send(handoff, pack(Kind.HAND_OVER, HandOver(handoff.request.uid, handoff.lease, handoff.first)))

    def _push(self, handoff: Handoff, sequence: Sequence, layer: int, stop: int) -> None:
        """Send the pages of a layer below number `stop` that have not been sent, as far as there is room."""
        most = at_once(self._cache.layers[layer])
        while handoff.sent[layer] < stop and not handoff.expiry.is_over:
            start = handoff.sent[layer]
            ids = sequence.pages[start : min(stop, start + most)]
            has_left = (
                self._push_by(handoff.way, handoff, layer, ids)
                if handoff.way
                else self._send(handoff, self._carried(handoff, layer, ids))
            )
            if not has_left:
                return
            handoff.sent[layer] += len(ids)
            self.num_pages += len(ids)

    def _carried(self, handoff: Handoff, layer: int, ids: list[int]) -> Message:
        """Pages in a message."""
        assert handoff.lease is not None
        pages, chosen = self._cache.layers[layer], torch.tensor(ids)
        chosen = chosen.to(pages.latents.device)
        tensors = pages.latents[chosen].cpu(), pages.index_keys[chosen].cpu()
        return Message(Kind.PAGES, tensors, sequence=handoff.lease, layer=layer, step=handoff.sent[layer])

    def _push_by(self, way: "PageWay", handoff: Handoff, layer: int, ids: list[int]) -> bool:
        """Pages by a way of their own, and the word that they come; whether there was room."""
        assert handoff.lease is not None
        try:
            way.check()
        except CarrierFailed as error:
            _log.warning("handing over to %s: %s", handoff.target.name, error)
            way.close(str(error))  # so that the other side hears of it before it grants anything more
            handoff.fail()
            return False
        if not way.has_room:
            return False
        way.push(layer, ids)
        message = Message(
            Kind.PUSHED,
            (torch.tensor([len(ids)]),),
            epoch=way.address.epoch,
            sequence=handoff.lease,
            layer=layer,
            step=handoff.sent[layer],
        )
        is_told = self._send(handoff, message)
        if not is_told:
            way.close("a push was not announced")  # the next would be taken for it
        return is_told

    def _send(self, handoff: Handoff, message: Message) -> bool:
        """Whether it went out; else the hand-over ends."""
        target, deadline = handoff.target.name, sooner(Deadline.after(self._lease.seconds), handoff.deadline)
        try:
            self._endpoint.send(target, message, deadline)
        except TransportError as error:
            _log.warning("handing over to %s: %s", target, error)
            handoff.fail()
            if isinstance(error, DeadlineExceeded) and not handoff.deadline.is_over:
                self._part_from(target)
            return False
        self._renew(handoff)
        return True

    def _part_from(self, target: str) -> None:
        """Give up a decode worker with all that goes there, which need not be waited for once a sequence."""
        self._endpoint.disconnect(target)
        if self._ways:
            self._ways.end(target, "it is given up")
        for handoff in self._handoffs.values():
            if handoff.target.name == target and handoff.sent:
                handoff.fail()

    def _tell_off(self, handoff: Handoff, why: Why) -> None:
        if handoff.sent:
            self._post(handoff.target.name, pack(Kind.DROP, Drop(handoff.request.uid, why)))

    def _post(self, peer: str, message: Message) -> None:
        try:
            self._endpoint.send(peer, message, Deadline.after(self._lease.seconds))
        except TransportError as error:
            _log.warning("%s did not hear of a dropped hand-over: %s", peer, error)


def _may_complete(handoff: Handoff) -> bool:
    """Whether its prompt has been run, and pages are reserved that lack some of it."""
    is_ready = handoff.first is not None and handoff.lease is not None
    return is_ready and not handoff.is_complete and not handoff.expiry.is_over

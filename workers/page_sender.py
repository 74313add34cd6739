"""The prefill side of a hand-over (`handoff.py`): pushes pages, layer by layer and chunk by chunk."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from model.inputs import PAGE_SIZE
from model.pages import PageCache
from workers.engine import Engine
from workers.handoff import MESSAGE_BYTES, Lapse, Lease, sooner, why_over
from workers.page_pool import pages_for
from workers.schedule import Batch
from workers.sequence import Request, Sequence, Token
from workers.transport.carrier import CarrierFailed
from workers.transport.message import Message, TransportError
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Endpoint, Peer
from workers.wire import Drop, Grant, HandOver, Kind, Reserve, Why, pack

if TYPE_CHECKING:
    from workers.page_ways import PageWays

_log = logging.getLogger(__name__)

_CONNECT_SECONDS = 1.0


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
    is_complete: bool = False

    def has_moved(self) -> None:
        """The lease, where there is one, starts anew, within the request's own time."""
        if self.lease is not None:
            self.expiry = sooner(Deadline.after(self.lease_seconds), self.deadline)


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

    @property
    def is_busy(self) -> bool:
        """Whether pages wait for room on their way."""
        return any(_may_complete(handoff) for handoff in self._handoffs.values())

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
        if self._ways and grant.way:
            self._ways.join(peer.name, grant.way)
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
        pages = self._cache.layers[layer]
        at_once = max(1, MESSAGE_BYTES // (pages.latents[0].nbytes + pages.index_keys[0].nbytes))
        while handoff.sent[layer] < stop and not handoff.expiry.is_over:
            start = handoff.sent[layer]
            ids = sequence.pages[start : min(stop, start + at_once)]
            message = self._pushed(handoff, layer, ids) if self._ways else self._carried(handoff, layer, ids)
            if message is None:
                return
            self._send(handoff, message)
            handoff.sent[layer] += len(ids)
            self.num_pages += len(ids)

    def _carried(self, handoff: Handoff, layer: int, ids: list[int]) -> Message:
        """Pages in a message."""
        assert handoff.lease is not None
        pages, chosen = self._cache.layers[layer], torch.tensor(ids)
        chosen = chosen.to(pages.latents.device)
        tensors = pages.latents[chosen].cpu(), pages.index_keys[chosen].cpu()
        return Message(Kind.PAGES, tensors, sequence=handoff.lease, layer=layer, step=handoff.sent[layer])

    def _pushed(self, handoff: Handoff, layer: int, ids: list[int]) -> Message | None:
        """Pages by a way of their own, and the word that they come; None while it has no room."""
        assert self._ways
        assert handoff.lease is not None
        try:
            way = self._ways.of(handoff.target.name)
        except CarrierFailed as error:
            _log.warning("handing over to %s: %s", handoff.target.name, error)
            handoff.expiry = Deadline.after(0)
            return None
        if not way.has_room:
            return None
        way.push(layer, ids)
        count = torch.tensor([len(ids)])
        return Message(Kind.PUSHED, (count,), sequence=handoff.lease, layer=layer, step=handoff.sent[layer])

    def _send(self, handoff: Handoff, message: Message) -> None:
        try:
            self._endpoint.send(
                handoff.target.name, message, sooner(Deadline.after(handoff.lease_seconds), handoff.deadline)
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


def _may_complete(handoff: Handoff) -> bool:
    """Whether its prompt has been run, and pages are reserved that lack some of it."""
    is_ready = handoff.first is not None and handoff.lease is not None
    return is_ready and not handoff.is_complete and not handoff.expiry.is_over

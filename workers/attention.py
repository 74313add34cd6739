"""An attention worker: an engine that takes its orders and moves its pages by messages.

Its whole life is `serve`: read mail, run a step, tell the tokens. It schedules its own sequences, so that a
step costs no message to anybody before it and one afterwards. The same worker prefills, decodes, or does
both; what a request asks for decides (`wire.Generate`).
"""

import logging
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from model.errors import RequestError
from model.pages import PageCache
from workers.dispatch import DispatchError, DispatchStats, WorkerFailed
from workers.engine import Engine, NumericalFailure
from workers.handoff import Lapse, Lease
from workers.page_receiver import Arrival, PageReceiver
from workers.page_sender import PageSender
from workers.schedule import Batch
from workers.sequence import Token
from workers.stages import StageClock
from workers.transport.message import MalformedMessage, Message, TransportError
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, PeerLost, Received
from workers.wire import (
    Adopted,
    Cancel,
    Drop,
    Failed,
    Generate,
    Grant,
    HandOver,
    Kind,
    Reserve,
    Role,
    Why,
    WorkerStatus,
    pack,
    pack_tokens,
    short_key,
    unpack,
)

if TYPE_CHECKING:
    from workers.page_ways import Ways

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05  # how soon a stop, a lease that is over and a due status are seen while nothing runs
_STATUS_SECONDS = 0.1
_MAIL_A_STEP = 4096  # messages read between two steps: a flood waits, 200 hand-overs at once do not
_SEND_SECONDS = 1.0  # for a client that does not read; then it is lost
_MAX_FAILURES = 3  # steps in a row that fail for no known reason, before the worker is given up


@dataclass(frozen=True)
class WorkerConfig:
    """What a worker is told besides its engine.

    `digest` names the weights; `num_layers` is how many layers' pages the engine fills.
    """

    name: str
    role: Role
    digest: str
    num_layers: int
    lease_seconds: float = 10.0


class AttentionWorker:
    """Serves an engine to its peers. Everything happens in the thread that calls `serve`."""

    def __init__(
        self,
        config: WorkerConfig,
        engine: Engine,
        cache: PageCache,
        endpoint: Endpoint,
        dispatch: DispatchStats | None = None,
        ways: "Ways | None" = None,
    ) -> None:
        """`ways` are those of pages that go from GPU to GPU; None for pages in messages."""
        self._config, self._engine, self._endpoint, self._dispatch = config, engine, endpoint, dispatch
        lease = Lease(config.digest, config.lease_seconds)
        self._ways = ways
        out, into = (ways.out, ways.into) if ways else (None, None)
        self._sender = PageSender(engine, cache, endpoint, lease, config.num_layers, out)
        self._receiver = PageReceiver(engine, cache, endpoint, lease, config.num_layers, into)
        self._clients: dict[str, str] = {}  # uid -> who reads its tokens
        self._deadlines: dict[str, Deadline] = {}
        self._stages = StageClock(dispatch)
        self._watchers: set[str] = set()
        self._is_leaving = False
        self._next_status = Deadline.after(0)
        self._failures = 0
        self._is_stuck = False  # requests wait, and only mail or a lease that ends can help them
        self._busy_seconds = self._decode_seconds = 0.0
        self._decode_tokens = 0
        engine.pool.watch()
        self.status = self._status(False, [], [])  # replaced several times a second

    def leave(self) -> None:
        """Say that nothing new is to be sent here; what comes all the same is run. For any thread."""
        self._is_leaving = True

    @property
    def has_left(self) -> bool:
        """Whether it was told to leave and all who could send it anything have taken note. For any thread.

        A gateway disconnects from a worker that leaves as soon as none of its requests needs it any more.
        """
        return self.status.leaving and not self._watchers

    def serve(self, stop: threading.Event) -> None:
        """Work until told to stop.

        Raises:
            Exception: of the last of several steps in a row that failed for no known reason.
        """
        while not stop.is_set():
            self._read_mail()
            if self._next_status.is_over:
                self._tell_status()  # now, so that it covers whatever came before it
            if not self._engine.is_idle:
                self._step()
            self._expire()
            self._sender.proceed()
            for arrival in self._receiver.take_pushed():
                self._adopt(arrival)
            self._receiver.grant()
        if self._ways:
            self._ways.close()

    def _step(self) -> None:
        started = time.perf_counter()
        self._stages.step_begins()
        try:
            tokens = self._engine.step(self._on_layer)
        except NumericalFailure as error:
            _log.error("%s", error)
            self._fail(list(error.uids), "numerical_error")
        except (DispatchError, TransportError) as error:
            _log.warning("a step failed: %s", error)
            # Experts that are away come back; those that answer wrongly would do so again.
            why: Why = "step_failed" if isinstance(error, WorkerFailed) else "experts_lost"
            self._fail(self._engine.running_uids, why)
        except Exception:
            _log.exception("a step failed")
            self._failures += 1
            self._fail(self._engine.running_uids, "step_failed")
            if self._failures >= _MAX_FAILURES:
                self._fail(list(self._clients), "step_failed")
                raise
        else:
            self._failures = 0
            self._is_stuck = not tokens and not self._engine.running_uids
            self._count(tokens, 0.0 if self._is_stuck else time.perf_counter() - started)
            self._stages.step_ends(tokens)
            self._tell_tokens(tokens)

    def _on_layer(self, batch: Batch, layer: int) -> None:
        self._stages.on_layer(batch, layer)
        self._sender.on_layer(batch, layer)

    def _count(self, tokens: list[Token], seconds: float) -> None:
        self._busy_seconds += seconds
        if self._config.role == "decode" and tokens:
            self._decode_seconds += seconds * len({token.uid for token in tokens})
            self._decode_tokens += len(tokens)

    # Mail

    def _read_mail(self) -> None:
        wait = Deadline.after(_POLL_SECONDS if self._engine.is_idle or self._is_stuck else 0)
        if self._sender.is_busy or self._receiver.is_busy:  # a device says nothing when it is done
            wait = Deadline.after(0)
        for _ in range(_MAIL_A_STEP):
            try:
                event = self._endpoint.receive(wait)
            except DeadlineExceeded:
                return
            if isinstance(event, PeerLost):
                self._lost(event.peer)
            else:
                self._take(event)
            wait = Deadline.after(0)

    def _take(self, received: Received) -> None:
        peer, message = received.peer, received.message
        try:
            match message.kind:
                case Kind.WATCH:
                    self._watch(peer.name)
                case Kind.GENERATE:
                    self._generate(peer.name, unpack(Generate, message), received.deadline)
                case Kind.CANCEL:
                    self._cancel(unpack(Cancel, message).uid)
                case Kind.GRANT:
                    self._sender.granted(peer, unpack(Grant, message))
                case Kind.ADOPTED:
                    uid = unpack(Adopted, message).uid
                    if handed_over := self._sender.adopted(peer, uid):
                        self._stages.handed_over(uid, handed_over)
                        self._forget(uid)
                case Kind.DROP:
                    drop = unpack(Drop, message)
                    if drop.uid in self._sender:
                        self._lapse(self._sender.dropped(peer, drop))
                    else:  # it comes to us, or it has come and runs
                        self._cancel(drop.uid)
                case Kind.RESERVE:
                    reserve = unpack(Reserve, message)
                    self._cancel(reserve.request.uid)  # an earlier try of the same request
                    self._receiver.reserve(peer, reserve, received.deadline)
                case Kind.PAGES:
                    self._receiver.write(peer, message)
                case Kind.PUSHED:
                    self._receiver.announce(peer, message)
                case Kind.HAND_OVER:
                    if arrival := self._receiver.adopt(peer, unpack(HandOver, message)):
                        self._adopt(arrival)
                case _:
                    raise MalformedMessage(f"kind {message.kind}")
        except MalformedMessage as error:
            _log.error("%s sent what it should not: %s", peer.name, error)
            self._endpoint.disconnect(peer.name)
            self._lost(peer.name)

    def _generate(self, client: str, order: Generate, deadline: Deadline) -> None:
        uid = order.request.uid
        self._cancel(uid)  # an earlier try of the same request
        try:
            self._engine.add(order.request, hand_over=order.decode is not None)
        except RequestError as error:
            self._send(client, pack(Kind.FAILED, Failed(uid, "invalid", error.field, error.problem)))
            return
        self._clients[uid], self._deadlines[uid] = client, deadline
        self._stages.arrived(order.request)
        if order.decode:
            self._sender.add(order.request, client, order.decode, deadline)

    def _adopt(self, arrival: Arrival) -> None:
        uid, client = arrival.reserve.request.uid, arrival.reserve.client
        if client not in self._endpoint.peers:  # nobody would read it
            self._engine.cancel(uid)
            return
        self._clients[uid], self._deadlines[uid] = client, arrival.deadline
        self._stages.adopted(arrival.reserve.request)

    def _cancel(self, uid: str) -> None:
        self._forget(uid)
        self._sender.cancel(uid)
        self._receiver.cancel(uid)
        self._engine.cancel(uid)

    def _lost(self, peer: str) -> None:
        """A peer is gone: a client's requests end, a prefill worker's pages do not come any more."""
        self._watchers.discard(peer)
        for uid in [uid for uid, client in self._clients.items() if client == peer]:
            self._cancel(uid)
        self._receiver.lost(peer)
        self._lapse(self._sender.lost(peer))

    def _expire(self) -> None:
        self._receiver.expire()
        self._lapse(self._sender.expire())
        self._fail([uid for uid, deadline in self._deadlines.items() if deadline.is_over], "timeout")

    # Reports

    def _tell_tokens(self, tokens: list[Token]) -> None:
        by_client: defaultdict[str, list[Token]] = defaultdict(list)
        for token in tokens:
            if client := self._clients.get(token.uid):
                by_client[client].append(token)
        for client, theirs in by_client.items():
            self._send(client, pack_tokens(theirs))
        for token in tokens:  # after they were sent: the first token does not wait for pages
            self._sender.first_token(token)
            if token.finish_reason:
                self._forget(token.uid)

    def _lapse(self, lapses: list[Lapse]) -> None:
        for lapse in lapses:
            self._fail([lapse.uid], lapse.why)

    def _fail(self, uids: list[str], why: Why) -> None:
        for uid in uids:
            client = self._clients.get(uid)
            self._cancel(uid)
            if client:
                self._send(client, pack(Kind.FAILED, Failed(uid, why)))

    def _forget(self, uid: str) -> None:
        client = self._clients.pop(uid, None)
        self._deadlines.pop(uid, None)
        stages = self._stages.end(uid)
        if stages and client in self._endpoint.peers:
            self._send(client, pack(Kind.STAGES, stages))

    def _send(self, peer: str, message: Message) -> None:
        try:
            self._endpoint.send(peer, message, Deadline.after(_SEND_SECONDS))
        except DeadlineExceeded:
            _log.warning("%s does not read what we send", peer)
            self._endpoint.disconnect(peer)
            self._lost(peer)
        except TransportError as error:
            _log.warning("%s: %s", peer, error)  # its loss is an event, which ends its requests

    # Status

    def _watch(self, peer: str) -> None:
        self._tell_status()
        self._watchers.add(peer)
        self._send(peer, pack(Kind.STATUS, self._status(True, self._engine.pool.keys(), [])))

    def _tell_status(self) -> None:
        self._next_status = Deadline.after(_STATUS_SECONDS)
        added, removed = self._engine.pool.take_changes()
        told = self._status(False, added, removed)
        self.status = replace(told, keys_added=(), keys_removed=())
        if not self._watchers:
            return
        message = pack(Kind.STATUS, told)
        for peer in sorted(self._watchers):
            self._send(peer, message)

    def _status(self, is_full: bool, added: list[bytes], removed: list[bytes]) -> WorkerStatus:
        engine, dispatch = self._engine, self._dispatch or DispatchStats()
        return WorkerStatus(
            self._config.role,
            engine.load(),
            is_full,
            tuple(map(short_key, added)),
            tuple(map(short_key, removed)),
            drafted=tuple(engine.acceptance.drafted),
            accepted=tuple(engine.acceptance.accepted),
            num_drafts=engine.num_drafts,
            steps=engine.num_steps,
            tokens=engine.num_tokens,
            hit_tokens=engine.num_hit_tokens,
            prompt_tokens=engine.num_prompt_tokens,
            dispatched=dispatch.tokens,
            copies_to=tuple(sorted(dispatch.copies_to.items())),
            most_nodes=dispatch.most_nodes,
            sent_pages=self._sender.num_pages,
            sent_bytes=self._sender.num_bytes,
            hand_overs=self._sender.num_adopted,
            hand_over_seconds=self._sender.seconds,
            stray=self._receiver.num_stray,
            leaving=self._is_leaving,
            prefilled_tokens=engine.num_prefilled_tokens,
            busy_seconds=self._busy_seconds,
            decode_seconds=self._decode_seconds,
            decode_tokens=self._decode_tokens,
        )

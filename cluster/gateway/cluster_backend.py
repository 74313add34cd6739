"""The model on a cluster: requests go to attention workers, tokens come back from them, one hop each.

Everything lives in the event loop, the endpoint too: its epoll is a descriptor that the loop can watch. Per
token there is no Ray call, no thread and no queue but the request's own.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from cluster.directory import Directory, DirectorySource, WorkerEntry
from cluster.gateway.backend import ModelFacts, OnStages, Parts, WorkerReport, check_room
from cluster.gateway.errors import ExpertsLost, Overloaded, Refusal, ReplicaLost, StepFailed
from cluster.gateway.errors import Kind as RefusalKind
from cluster.gateway.stream import QueuedStream
from cluster.router import NoRoute, Route, Router
from model.errors import RequestError
from workers.load import WorkerLoad
from workers.sequence import Request, Token
from workers.stages import Stages
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import MalformedMessage, Message, TransportError
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, PeerLost, Received
from workers.wire import Cancel, Failed, Generate, Kind, Why, WorkerStatus, pack, unpack

_log = logging.getLogger(__name__)

_DIRECTORY_SECONDS = 0.5  # how soon a worker that joined is used
_ASK_SECONDS = 5.0
_CONNECT_SECONDS = 1.0
_RETRY_SECONDS = 2.0  # until a worker that could not be reached is tried again: the loop waits for it
_CALLED_RETRY_SECONDS = 10.0  # to whoever waited in vain for an engine to start
_SEND_SECONDS = 0.5  # for a worker whose ring is full: it has not read for long
_MAIL_AT_ONCE = 256  # events handled before others have their turn


@dataclass(frozen=True)
class BackendLimits:
    """What the backend takes on.

    Attributes:
        max_waiting: requests that may wait for a token here, as of `check_room`.
        max_open: requests that may be open for each decode worker, those of other gateways included.
        max_unread: tokens that a reader may be behind before its request is cancelled.
        request_seconds: what a worker may spend on a request; the answer's own budgets are shorter.
        silence_seconds: a worker that says nothing for so long is taken for dead.
        prefill_seconds: where prefill engines go when nobody needs them, how long a request waits for one to
            come; None where there is always one.
    """

    max_waiting: int = 64
    max_open: int = 512
    max_unread: int = 4096
    request_seconds: float = 600.0
    silence_seconds: float = 15.0
    prefill_seconds: float | None = None


class ClusterStream(QueuedStream):
    """The tokens of one request, put back in order: the first may come from another worker than the rest."""

    def __init__(
        self, request: Request, first: str, decode: str | None, cancel: Callable[[str], None]
    ) -> None:
        super().__init__(request.uid, cancel)
        self.first, self.decode = first, decode or first
        self.has_moved = False
        self._early: dict[int, Token] = {}
        self._next = len(request.prompt_ids)

    @property
    def needs(self) -> set[str]:
        """The workers without which it cannot go on; the first one until its token is here."""
        return {self.decode} if self.has_moved and not self._early else {self.first, self.decode}

    def push(self, token: Token, peer: str) -> bool:
        """Take a token in; whether the answer is complete."""
        self.has_started = True
        self.has_moved = self.has_moved or peer == self.decode
        if token.position >= self._next:  # others came before, from a worker that did not know better
            self._early[token.position] = token
        while (ready := self._early.pop(self._next, None)) is not None:
            self._next += 1
            self.queue.put_nowait(ready)
            if ready.finish_reason:
                return True
        return False


@dataclass
class _Met:
    """A worker that we are connected with: where, and until when it must be heard again."""

    address: Address
    silent_until: Deadline


class ClusterBackend:
    """A cluster behind the gateway's seam.

    Args:
        endpoint: nobody else may use it; closed by `stop`.
        directory: asked again and again for who is there.
    """

    def __init__(
        self,
        facts: ModelFacts,
        endpoint: PeerEndpoint,
        router: Router,
        directory: DirectorySource,
        limits: BackendLimits,
    ) -> None:
        self._facts, self._endpoint, self._router = facts, endpoint, router
        self._ask, self._limits = directory, limits
        self.on_stages: OnStages = lambda worker, stages: None
        self.directory = Directory()
        self._streams: dict[str, ClusterStream] = {}
        self._met: dict[str, _Met] = {}
        self._retry: dict[Address, Deadline] = {}  # workers that could not be reached
        self._left: set[Address] = set()  # workers that leave and that we have parted from
        self._num_held = 0  # requests that wait for a prefill worker to come
        self._has_called = False  # whether one was missed since the directory was asked last
        self._prefill_came = asyncio.Event()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def is_ready(self) -> bool:
        has_prefill = self._router.has("prefill") or self._limits.prefill_seconds is not None
        return self._router.has("decode") and has_prefill and not self._stopping

    @property
    def statuses(self) -> dict[str, WorkerStatus]:
        """What each worker said last."""
        return self._router.statuses

    def start(self) -> None:
        """Begins to look for workers; call it in the event loop that requests come from."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._endpoint.fileno(), self._read)
        self._tasks.append(asyncio.create_task(self._keep_up()))

    async def wait_until_ready(self, seconds: float) -> None:
        """Until requests can be run.

        Raises:
            TimeoutError: there were none.
        """
        async with asyncio.timeout(seconds):
            while not self.is_ready:
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """Requests still open fail as retryable. A second time does nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._prefill_came.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._fail(list(self._streams), Overloaded("the server is shutting down; send the request again"))
        asyncio.get_running_loop().remove_reader(self._endpoint.fileno())
        self._endpoint.close()

    async def generate(self, request: Request) -> ClusterStream:
        if not self.is_ready:
            raise Overloaded("the model is not running")
        assert request.uid not in self._streams, request.uid
        try:
            route = await self._route(request)
        except NoRoute:
            raise Overloaded("the model is not running") from None
        budget = Deadline.after(self._limits.request_seconds).left_us()
        order = pack(Kind.GENERATE, Generate(request, route.decode), budget)
        stream = ClusterStream(request, route.first, route.decode.name if route.decode else None, self.cancel)
        self._streams[request.uid] = stream
        self._send(route.first, order)
        if request.uid not in self._streams:  # the worker is gone: whoever reads is told
            raise ReplicaLost
        return stream

    async def _route(self, request: Request) -> Route:
        """Who runs it. Where all prefill engines have gone it calls for one; a long prompt waits for that.

        Raises:
            NoRoute: nobody can.
            Overloaded: no prefill engine came in time.
        """
        if self._router.has("prefill") or self._limits.prefill_seconds is None:
            return self._router.choose(request)
        self._has_called = True
        self._num_held += 1
        try:
            async with asyncio.timeout(self._limits.prefill_seconds):
                while True:
                    try:
                        return self._router.choose(request)
                    except NoRoute:
                        if not self.is_ready:
                            raise
                    self._prefill_came.clear()
                    await self._prefill_came.wait()
        except TimeoutError:
            problem = "the engine that this request needs is still starting; try again later"
            raise Overloaded(problem, _CALLED_RETRY_SECONDS) from None
        finally:
            self._num_held -= 1

    def cancel(self, uid: str) -> None:
        """Drops a request, open or not."""
        if stream := self._close(uid):
            for name in stream.needs:
                self._send(name, pack(Kind.CANCEL, Cancel(uid)))

    def _close(self, uid: str) -> ClusterStream | None:
        self._router.settle(uid)
        return self._streams.pop(uid, None)

    def check_room(self) -> None:
        limits, here = self._limits, len(self._streams) + self._num_held
        max_open = limits.max_open * self._router.count("decode")
        check_room(self.load().waiting, limits.max_waiting, max(here, self._router.num_open), max_open)

    def load(self) -> WorkerLoad:
        started = sum(stream.has_started for stream in self._streams.values())
        decoding = [status.load for status in self._router.statuses.values() if status.role == "decode"]
        return WorkerLoad(
            waiting=len(self._streams) - started + self._num_held,
            running=started,
            free_pages=sum(load.free_pages for load in decoding),
            num_pages=sum(load.num_pages for load in decoding),
        )

    def parts(self) -> Parts:
        statuses = self._router.statuses
        workers = tuple(
            WorkerReport(
                entry.address.name,
                entry.engine,
                entry.node,
                entry.pid,
                replace(statuses[entry.address.name], keys_added=(), keys_removed=()),
            )
            for entry in self.directory.workers
            if entry.address.name in statuses
        )
        known = self.directory
        return Parts(known.epoch, workers, known.experts, known.engines, known.scaling)

    # What workers say

    def _read(self) -> bool:
        """Handle what has come; whether that was all."""
        for _ in range(_MAIL_AT_ONCE):
            try:
                event = self._endpoint.receive(Deadline.after(0))
            except DeadlineExceeded:
                return True
            if not isinstance(event, PeerLost):
                self._take(event)
            elif event.peer not in self._endpoint.peers:  # else it speaks of an earlier connection
                self._lost(event.peer, event.reason)
        asyncio.get_running_loop().call_soon(self._read_unless_stopped)
        return False

    def _read_unless_stopped(self) -> None:
        if not self._stopping:
            self._read()

    def _take(self, received: Received) -> None:
        name, message = received.peer.name, received.message
        if name not in self._met:  # lost meanwhile
            return
        self._met[name].silent_until = Deadline.after(self._limits.silence_seconds)
        try:
            match message.kind:
                case Kind.TOKENS:
                    self._deliver(unpack(list[Token], message), name)
                case Kind.FAILED:
                    failed = unpack(Failed, message)
                    self._fail([failed.uid], _as_error(failed))
                case Kind.STATUS:
                    self._router.report(name, unpack(WorkerStatus, message))
                    if self._num_held and self._router.has("prefill"):
                        self._prefill_came.set()
                case Kind.STAGES:
                    self.on_stages(name, unpack(Stages, message))
                case _:
                    raise MalformedMessage(f"kind {message.kind}")
        except MalformedMessage as error:
            self._lose(name, f"it sent what it should not: {error}")

    def _deliver(self, tokens: list[Token], peer: str) -> None:
        for token in tokens:
            stream = self._streams.get(token.uid)
            if stream is None:  # cancelled while this was on its way
                continue
            had_moved, is_complete = stream.has_moved, stream.push(token, peer)
            if stream.has_moved and not had_moved:
                self._router.settle(token.uid)
            if is_complete:
                self._close(token.uid)
            elif stream.queue.qsize() > self._limits.max_unread:
                self.cancel(token.uid)
                limit = self._limits.max_unread
                problem = f"the answer was not read: {limit} tokens were waiting to be sent"
                stream.queue.put_nowait(Refusal(RefusalKind.SLOW_READER, problem))

    def _fail(self, uids: Iterable[str], error: Exception) -> None:
        for uid in uids:
            if stream := self._streams.get(uid):
                self.cancel(uid)
                stream.queue.put_nowait(error)

    # Who is there

    async def _keep_up(self) -> None:
        while True:
            try:
                calls, self._has_called = self._has_called or self._num_held > 0, False
                async with asyncio.timeout(_ASK_SECONDS):
                    self.directory = await self._ask(calls)
            except Exception as error:  # the supervisor may be starting anew; the workers go on
                _log.warning("nobody says who is there: %s", type(error).__name__)
            if self._read():  # whoever is taken for silent has said nothing that we have not heard
                for name in [name for name, met in self._met.items() if met.silent_until.is_over]:
                    self._lose(name, f"it said nothing for {self._limits.silence_seconds} s")
            self._part()
            self._meet(self.directory.workers)
            self._read()
            await asyncio.sleep(_DIRECTORY_SECONDS)

    def _part(self) -> None:
        """Disconnect from workers that leave, once nothing here needs them: so they know they may end."""
        self._left &= {entry.address for entry in self.directory.workers}
        needed = {name for stream in self._streams.values() for name in stream.needs}
        leaving = {name for name, status in self._router.statuses.items() if status.leaving}
        for name in leaving - needed:
            self._left.add(self._met.pop(name).address)
            self._router.leave(name)
            self._endpoint.disconnect(name)

    def _meet(self, workers: Iterable[WorkerEntry]) -> None:
        for entry in workers:
            address, name = entry.address, entry.address.name
            if address in self._left:
                continue
            if met := self._met.get(name):
                if met.address == address and name in self._endpoint.peers:
                    continue
                self._lose(name, "another took its place")
            if address in self._retry and not self._retry[address].is_over:
                continue
            try:
                self._endpoint.connect(address, Deadline.after(_CONNECT_SECONDS))
                self._endpoint.send(name, Message(Kind.WATCH), Deadline.after(_SEND_SECONDS))
            except TransportError as error:
                _log.warning("worker %s cannot be reached yet: %s", name, error)
                self._endpoint.disconnect(name)
                self._retry[address] = Deadline.after(_RETRY_SECONDS)
                continue
            self._retry.pop(address, None)
            self._met[name] = _Met(address, Deadline.after(self._limits.silence_seconds))
            self._router.join(address, entry.role)

    def _lose(self, name: str, reason: str) -> None:
        self._endpoint.disconnect(name)
        self._lost(name, reason)

    def _lost(self, name: str, reason: str) -> None:
        """A worker is gone, and with it what only it could go on with."""
        if self._met.pop(name, None) is None:
            return
        _log.warning("worker %s is lost: %s", name, reason)
        self._router.leave(name)
        self._fail([uid for uid, stream in self._streams.items() if name in stream.needs], ReplicaLost())

    def _send(self, name: str, message: Message) -> None:
        try:
            self._endpoint.send(name, message, Deadline.after(_SEND_SECONDS))
        except TransportError as error:
            self._lose(name, str(error))


def _as_error(failed: Failed) -> Exception:
    answers: dict[Why, Exception] = {
        "replica_lost": ReplicaLost(),
        "experts_lost": ExpertsLost(),
        "step_failed": StepFailed(),
        "overloaded": Overloaded("the model has no room for this request now; try again a little later"),
        "timeout": Refusal(RefusalKind.TIMEOUT, "the time for this request is spent", None, 1.0),
        "numerical_error": Refusal(
            RefusalKind.NUMERICAL, "the model computed no valid probabilities for this request"
        ),
    }
    if failed.why == "invalid":
        return RequestError(failed.field, failed.problem)
    return answers[failed.why]

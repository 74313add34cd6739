"""The model in this process: an engine in one thread of its own, bridged to asyncio.

Only that thread touches the engine. The event loop hands it orders (`_Order`) under a lock; it hands back the
tokens of each step with one call into the loop.
"""

import asyncio
import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable

from cluster.gateway.backend import ModelFacts, OnStages, Parts, WorkerReport, check_room
from cluster.gateway.errors import (
    ExpertsLost,
    Kind,
    Overloaded,
    Refusal,
    StepFailed,
    as_refusal,
)
from cluster.gateway.stream import QueuedStream
from workers.dispatch import DispatchError, DispatchStats, WorkerFailed
from workers.engine import Engine, NumericalFailure
from workers.load import WorkerLoad
from workers.sequence import Request, Token
from workers.stages import StageClock, Stages
from workers.transport.message import TransportError
from workers.wire import WorkerStatus

_log = logging.getLogger(__name__)

# An engine that fails so many steps in a row is broken for good; one failure may be that of one request.
_MAX_FAILURES = 3

# Experts that went away come back.
_NOT_THE_ENGINES_FAULT = (DispatchError, TransportError)

_NAME = "engine"  # of the only worker

_Order = Callable[[], None]


class EngineStream(QueuedStream):
    """The tokens of one request, which the engine accepts or refuses first."""

    def __init__(self, uid: str, cancel: Callable[[str], None]) -> None:
        super().__init__(uid, cancel)
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class EngineBackend:
    """An engine behind the gateway's seam.

    Args:
        engine: nobody else may use it once this is started.
        facts: of its model.
        max_waiting, max_open: requests that may wait for a token, and be open; as of `check_room`.
        max_unread: tokens that a reader may be behind before its request is cancelled.
        dispatch: of the engine's experts, where they are elsewhere.
    """

    def __init__(
        self,
        engine: Engine,
        facts: ModelFacts,
        *,
        max_waiting: int = 64,
        max_open: int = 512,
        max_unread: int = 4096,
        dispatch: DispatchStats | None = None,
    ) -> None:
        self._engine, self._facts = engine, facts
        self._max_waiting, self._max_open, self._max_unread = max_waiting, max_open, max_unread
        self._streams: dict[str, EngineStream] = {}
        self.on_stages: OnStages = lambda worker, stages: None
        self._held: set[str] = set()  # what the engine has; the thread's own
        self._stages = StageClock(dispatch)  # the thread's own, too
        self._orders: list[_Order] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._broken = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def facts(self) -> ModelFacts:
        return self._facts

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and not self._stopping and not self._broken

    def start(self) -> None:
        """Starts the thread; the running event loop is the one that requests come from."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Ends the thread after its current step. Requests still open fail as retryable."""
        self._order(self._stop)
        if self._thread.ident is not None:
            await asyncio.to_thread(self._thread.join)
        self._fail_all(Overloaded("the server is shutting down; send the request again"))

    async def generate(self, request: Request) -> EngineStream:
        if self._broken:
            raise StepFailed
        if not self.is_ready:
            raise Overloaded("the model is not running")
        assert request.uid not in self._streams, request.uid
        stream = self._streams[request.uid] = EngineStream(request.uid, self.cancel)
        self._order(lambda: self._add(request, stream))
        try:
            await stream.accepted
        except BaseException:  # whoever asked may be cancelled while it waits
            self.cancel(request.uid)
            raise
        return stream

    def cancel(self, uid: str) -> None:
        """Drops a request, open or not."""
        if self._streams.pop(uid, None):
            self._order(lambda: self._drop(uid))

    def check_room(self) -> None:
        check_room(self.load().waiting, self._max_waiting, len(self._streams), self._max_open)

    def load(self) -> WorkerLoad:
        running = sum(stream.has_started for stream in self._streams.values())
        pool = self._engine.pool
        return WorkerLoad(
            waiting=len(self._streams) - running,
            running=running,
            free_pages=pool.num_free,
            num_pages=pool.num_pages,
        )

    def parts(self) -> Parts:
        engine = self._engine
        status = WorkerStatus(
            "decode",
            engine.load(),
            drafted=tuple(engine.acceptance.drafted),
            accepted=tuple(engine.acceptance.accepted),
            num_drafts=engine.num_drafts,
            steps=engine.num_steps,
            tokens=engine.num_tokens,
            hit_tokens=engine.num_hit_tokens,
            prompt_tokens=engine.num_prompt_tokens,
        )
        report = WorkerReport(_NAME, "this process", socket.gethostname(), os.getpid(), status)
        return Parts(0, (report,), ())

    # In the event loop

    def _order(self, order: _Order) -> None:
        with self._changed:
            self._orders.append(order)
            self._changed.notify()

    def _deliver(self, tokens: list[Token]) -> None:
        for token in tokens:
            stream = self._streams.get(token.uid)
            if stream is None:  # cancelled while this step ran
                continue
            stream.has_started = True
            stream.queue.put_nowait(token)
            if token.finish_reason:
                del self._streams[token.uid]
            elif stream.queue.qsize() > self._max_unread:
                self.cancel(token.uid)
                problem = f"the answer was not read: {self._max_unread} tokens were waiting to be sent"
                stream.queue.put_nowait(Refusal(Kind.SLOW_READER, problem))

    def _fail(self, uids: Iterable[str], error: Exception) -> None:
        for uid in uids:
            if stream := self._streams.pop(uid, None):
                _settle(stream.accepted, error)
                stream.queue.put_nowait(error)

    def _tell_stages(self, stages: Stages) -> None:
        self.on_stages(_NAME, stages)

    def _fail_all(self, error: Exception) -> None:
        self._fail(list(self._streams), error)

    # In the engine's thread

    def _run(self) -> None:
        failures = 0
        while self._obey():
            self._stages.step_begins()
            try:
                tokens = self._engine.step(None if self._stages.is_idle else self._stages.on_layer)
            except NumericalFailure as error:
                _log.error("%s", error)
                self._let_go(error.uids)
                self._call(self._fail, error.uids, as_refusal(error))
            except Exception as error:
                _log.exception("a step of the engine failed")
                is_lost = isinstance(error, _NOT_THE_ENGINES_FAULT)
                failures += not is_lost
                self._broken = failures >= _MAX_FAILURES
                is_worth_waiting = is_lost and not isinstance(error, WorkerFailed)
                self._give_up(ExpertsLost() if is_worth_waiting else StepFailed())
                if self._broken:
                    self._call(self._fail_all, StepFailed())
                    return
            else:
                failures = 0
                self._stages.step_ends(tokens)
                self._call(self._deliver, tokens)
                self._let_go(token.uid for token in tokens if token.finish_reason)
        for uid in list(self._held):
            self._drop(uid)

    def _obey(self) -> bool:
        """Carries out orders, waiting for some while there is nothing to run; False is the end."""
        with self._changed:
            while not self._orders and self._engine.is_idle:
                self._changed.wait()
            orders, self._orders = self._orders, []
        for order in orders:
            order()
        return not self._stopping

    def _stop(self) -> None:
        self._stopping = True

    def _add(self, request: Request, stream: EngineStream) -> None:
        try:
            self._engine.add(request)
        except Exception as error:
            self._call(_settle, stream.accepted, error)
        else:
            self._held.add(request.uid)
            self._stages.arrived(request)
            self._call(_settle, stream.accepted, None)

    def _drop(self, uid: str) -> None:
        self._engine.cancel(uid)
        self._let_go([uid])

    def _let_go(self, uids: Iterable[str]) -> None:
        """The engine has done with these."""
        for uid in uids:
            self._held.discard(uid)
            if stages := self._stages.end(uid):
                self._call(self._tell_stages, stages)

    def _give_up(self, error: Exception) -> None:
        """Fails every request that the engine has, and frees their pages."""
        uids = list(self._held)
        for uid in uids:
            self._drop(uid)
        self._call(self._fail, uids, error)

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        assert self._loop, "not started"
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _settle(future: asyncio.Future[None], error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)

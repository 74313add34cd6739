"""Attention workers in threads of this process, and clients and peers that talk to them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from model.pages import PageCache
from workers.attention import AttentionWorker, WorkerConfig
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel
from workers.page_ways import Ways
from workers.sequence import Request, Token
from workers.stages import Stages
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.limits import Limits
from workers.transport.message import Message
from workers.transport.protocol import Deadline, PeerLost, Received
from workers.wire import Cancel, Failed, Generate, Kind, Role, WorkerStatus, pack, unpack

T = TypeVar("T")

TOKEN = b"t" * 32
SECRET = b"s" * 32
SECONDS = 30.0  # for anything at all


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    """Waits for what must come about by itself."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


@dataclass
class Worker:
    """One worker and the thread it lives in."""

    engine: Engine
    endpoint: PeerEndpoint
    worker: AttentionWorker
    thread: threading.Thread
    stop: threading.Event

    @property
    def name(self) -> str:
        return self.endpoint.address.name

    @property
    def holds_nothing(self) -> bool:
        """Whether all its pages are free, and nobody waits for some or moves."""
        pool, worker = self.engine.pool, self.worker
        is_free = pool.num_free == pool.num_pages and self.engine.is_idle
        moves = worker._receiver._arrivals or worker._receiver._limbo or worker._sender._handoffs
        return is_free and not moves

    @property
    def num_parked(self) -> int:
        return self.engine.load().parked

    def end(self) -> None:
        """As when its process ends: whoever is connected sees it go."""
        self.stop.set()
        self.thread.join()
        self.endpoint.close()


@contextmanager
def running(
    model: LocalModel,
    name: str,
    role: Role,
    *,
    config: EngineConfig | None = None,
    num_tokens: int = 16384,
    lease_seconds: float = 10.0,
    digest: str = "",
    ring_bytes: int = 2**21,
    is_idle_at_end: bool = True,
    make_ways: Callable[[PageCache], Ways] | None = None,
) -> Iterator[Worker]:
    """A worker at work; at the end it must hold nothing, unless it was ended in the middle of something."""
    config = config or EngineConfig()
    cache = model.cache(num_tokens)
    engine = Engine(model.decoder, cache, config, SECRET, experts=model.steps)
    num_layers = model.config.num_hidden_layers + bool(config.num_drafts)
    endpoint = PeerEndpoint(EndpointConfig(name, TOKEN, limits=Limits(ring_bytes=ring_bytes)))
    worker = AttentionWorker(
        WorkerConfig(name, role, digest or model.checkpoint.digest, num_layers, lease_seconds),
        engine,
        cache,
        endpoint,
        ways=make_ways(cache) if make_ways else None,
    )
    stop = threading.Event()
    thread = threading.Thread(target=worker.serve, args=(stop,), daemon=True)
    found = Worker(engine, endpoint, worker, thread, stop)
    thread.start()
    try:
        yield found
        if is_idle_at_end:
            assert thread.is_alive(), "it broke down"
            soon(lambda: found.holds_nothing)
    finally:
        found.end()
    if is_idle_at_end:
        engine.pool.check_idle()


@dataclass
class Client:
    """Orders answers and collects them."""

    endpoint: PeerEndpoint
    tokens: dict[str, list[Token]] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)
    status: dict[str, WorkerStatus] = field(default_factory=dict)
    keys: dict[str, set[str]] = field(default_factory=dict)
    heard_from: dict[str, set[str]] = field(default_factory=dict)
    stages: dict[str, Stages] = field(default_factory=dict)
    lost: set[str] = field(default_factory=set)

    def meet(self, *workers: Worker) -> None:
        for worker in workers:
            self.endpoint.connect(worker.endpoint.address, Deadline.after(SECONDS))

    def send(self, worker: Worker, message: Message) -> None:
        self.endpoint.send(worker.name, message, Deadline.after(SECONDS))

    def generate(
        self, request: Request, prefill: Worker, decode: Worker | None, seconds: float = SECONDS
    ) -> None:
        order = Generate(request, decode.endpoint.address if decode else None)
        self.send(prefill, pack(Kind.GENERATE, order, Deadline.after(seconds).left_us()))

    def cancel(self, uid: str, *workers: Worker) -> None:
        for worker in workers:
            self.send(worker, pack(Kind.CANCEL, Cancel(uid)))

    def watch(self, worker: Worker) -> None:
        self.send(worker, Message(Kind.WATCH))

    def read(self, seconds: float = SECONDS) -> None:
        """One event."""
        event = self.endpoint.receive(Deadline.after(seconds))
        if isinstance(event, PeerLost):
            self.lost.add(event.peer)
            return
        match event.message.kind:
            case Kind.TOKENS:
                for token in unpack(list[Token], event.message):
                    self.tokens.setdefault(token.uid, []).append(token)
                    self.heard_from.setdefault(token.uid, set()).add(event.peer.name)
            case Kind.FAILED:
                failed = unpack(Failed, event.message)
                self.failed[failed.uid] = failed
            case Kind.STATUS:
                self._note(event.peer.name, unpack(WorkerStatus, event.message))
            case Kind.STAGES:
                stages = unpack(Stages, event.message)
                self.stages[stages.uid] = stages

    def _note(self, name: str, status: WorkerStatus) -> None:
        keys = set() if status.is_full else self.keys[name]
        self.keys[name] = (keys - set(status.keys_removed)) | set(status.keys_added)
        self.status[name] = status

    def read_until(self, condition: Callable[[], bool], seconds: float = SECONDS) -> None:
        end = time.monotonic() + seconds
        while not condition():
            self.read(end - time.monotonic())

    def read_status(self, worker: Worker) -> WorkerStatus:
        """The next one, of a worker that is watched."""
        self.status.pop(worker.name, None)
        self.read_until(lambda: worker.name in self.status)
        return self.status[worker.name]

    def answers(self, *uids: str) -> dict[str, list[int]]:
        """The ids of complete answers, in order of position."""
        while not all(self.is_complete(uid) for uid in uids):
            self.read()
            assert not self.failed.keys() & set(uids), self.failed
        out = {}
        for uid in uids:
            tokens = sorted(self.tokens[uid], key=lambda token: token.position)
            assert [token.position for token in tokens] == list(
                range(tokens[0].position, tokens[0].position + len(tokens))
            )
            out[uid] = [token.token_id for token in tokens]
        return out

    def why_failed(self, uid: str, seconds: float = 8.0) -> str:
        """Reads on until a request has failed."""
        self.read_until(lambda: uid in self.failed, seconds)
        return self.failed[uid].why

    def is_complete(self, uid: str) -> bool:
        return any(token.finish_reason for token in self.tokens.get(uid, []))


@contextmanager
def client(name: str = "client") -> Iterator[Client]:
    endpoint = PeerEndpoint(EndpointConfig(name, TOKEN))
    try:
        yield Client(endpoint)
    finally:
        endpoint.close()


@dataclass
class Stranger:
    """A peer that speaks message by message, right or wrong, in place of a worker."""

    endpoint: PeerEndpoint

    def send(self, worker: Worker, message: Message) -> None:
        self.endpoint.connect(worker.endpoint.address, Deadline.after(SECONDS))
        self.endpoint.send(worker.name, message, Deadline.after(SECONDS))

    def read(self) -> Received:
        event = self.endpoint.receive(Deadline.after(SECONDS))
        assert isinstance(event, Received), event
        return event

    def expect(self, kind: Kind, body: type[T]) -> T:
        """The next message, of the kind that must come."""
        message = self.read().message
        assert message.kind == kind, Kind(message.kind)
        return unpack(body, message)

    def greet_until(self, condition: Callable[[], bool]) -> None:
        """Answers whoever connects, and reads nothing."""

        def is_so() -> bool:
            self.endpoint.pump(0.01)
            return condition()

        soon(is_so, SECONDS)

    def is_cut_off(self) -> bool:
        """Reads until the connection ends."""
        while True:
            if isinstance(self.endpoint.receive(Deadline.after(SECONDS)), PeerLost):
                return True


@contextmanager
def stranger(name: str, ring_bytes: int = 2**21) -> Iterator[Stranger]:
    endpoint = PeerEndpoint(EndpointConfig(name, TOKEN, limits=Limits(ring_bytes=ring_bytes)))
    try:
        yield Stranger(endpoint)
    finally:
        endpoint.close()

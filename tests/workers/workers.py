"""Attention workers in threads of this process, and a client that reads what they say."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from workers.attention import AttentionWorker, WorkerConfig
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel
from workers.sequence import Request, Token
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Deadline, PeerLost
from workers.wire import Cancel, Failed, Generate, Kind, Role, WorkerStatus, pack, unpack

TOKEN = b"t" * 32
SECRET = b"s" * 32
SECONDS = 30.0  # for anything at all


@dataclass
class Worker:
    """One worker and the thread it lives in."""

    engine: Engine
    endpoint: PeerEndpoint
    worker: AttentionWorker
    thread: threading.Thread
    stop: threading.Event

    def end(self) -> None:
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
) -> Iterator[Worker]:
    """A worker at work; at the end it must hold nothing."""
    config = config or EngineConfig()
    cache = model.cache(num_tokens)
    engine = Engine(model.decoder, cache, config, SECRET)
    num_layers = model.config.num_hidden_layers + bool(config.num_drafts)
    endpoint = PeerEndpoint(EndpointConfig(name, TOKEN))
    worker = AttentionWorker(
        WorkerConfig(name, role, digest or model.checkpoint.digest, num_layers, lease_seconds),
        engine,
        cache,
        endpoint,
    )
    stop = threading.Event()
    thread = threading.Thread(target=worker.serve, args=(stop,), daemon=True)
    found = Worker(engine, endpoint, worker, thread, stop)
    thread.start()
    try:
        yield found
    finally:
        found.end()
    engine.pool.check_idle()


@dataclass
class Client:
    """Orders answers and collects them."""

    endpoint: PeerEndpoint
    tokens: dict[str, list[Token]] = field(default_factory=dict)
    failed: dict[str, Failed] = field(default_factory=dict)
    status: dict[str, WorkerStatus] = field(default_factory=dict)
    heard_from: dict[str, set[str]] = field(default_factory=dict)

    def meet(self, *workers: Worker) -> None:
        for worker in workers:
            self.endpoint.connect(worker.endpoint.address, Deadline.after(SECONDS))

    def generate(self, request: Request, prefill: Worker, decode: Worker | None, seconds: float = SECONDS) -> None:
        order = Generate(request, decode.endpoint.address if decode else None)
        message = pack(Kind.GENERATE, order, Deadline.after(seconds).left_us())
        self.endpoint.send(prefill.endpoint.address.name, message, Deadline.after(SECONDS))

    def cancel(self, uid: str, *workers: Worker) -> None:
        for worker in workers:
            message = pack(Kind.CANCEL, Cancel(uid))
            self.endpoint.send(worker.endpoint.address.name, message, Deadline.after(SECONDS))

    def watch(self, worker: Worker) -> None:
        from workers.transport.message import Message

        self.endpoint.send(worker.endpoint.address.name, Message(Kind.WATCH), Deadline.after(SECONDS))

    def read(self, seconds: float = SECONDS) -> None:
        """One event."""
        event = self.endpoint.receive(Deadline.after(seconds))
        assert not isinstance(event, PeerLost), event
        match event.message.kind:
            case Kind.TOKENS:
                for token in unpack(list[Token], event.message):
                    self.tokens.setdefault(token.uid, []).append(token)
                    self.heard_from.setdefault(token.uid, set()).add(event.peer.name)
            case Kind.FAILED:
                failed = unpack(Failed, event.message)
                self.failed[failed.uid] = failed
            case Kind.STATUS:
                self.status[event.peer.name] = unpack(WorkerStatus, event.message)

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

    def is_complete(self, uid: str) -> bool:
        return any(token.finish_reason for token in self.tokens.get(uid, []))


@contextmanager
def client(name: str = "client") -> Iterator[Client]:
    endpoint = PeerEndpoint(EndpointConfig(name, TOKEN))
    try:
        yield Client(endpoint)
    finally:
        endpoint.close()

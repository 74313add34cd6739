"""A gateway of its own, in a thread of this process, over the demo's real engine."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, TypeVar

import grpc
import httpx2
from openai import OpenAI

from cluster.config import ClusterConfig
from cluster.gateway.backend import Backend, ModelFacts
from cluster.gateway.engine_backend import EngineBackend
from cluster.gateway.server import GatewayServer
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from cluster.telemetry.start import start_tracing
from model.text import load_text
from tests.checkpoints import DEMO
from workers.engine import Engine
from workers.local import LocalModel

T = TypeVar("T")

ANY_PORTS = ClusterConfig.model_validate({"gateway": {"http_port": 0, "grpc_port": 0}})
HARBOR = [{"role": "user", "content": 'What does "harbor" mean?'}]
HARBOR_ANSWER = "Noun: a person who is harbor of a woman."
# Hot enough never to end by itself within the test.
ENDLESS = {"model": "demo", "messages": HARBOR, "ignore_eos": True, "max_tokens": 6000, "stream": True}


class Served:
    """A running server and ways to talk to it."""

    def __init__(self, server: GatewayServer, engine: Engine, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.engine, self._loop = server, engine, loop
        scheme = "https" if server.certificates else "http"
        self.url = f"{scheme}://127.0.0.1:{server.http_port}"
        self.target = f"127.0.0.1:{server.grpc_port}"

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs something in the server's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def openai(self, **options: Any) -> OpenAI:
        return OpenAI(
            **{"base_url": f"{self.url}/v1", "api_key": "none", "timeout": 30.0, "max_retries": 0} | options
        )

    @contextmanager
    def stub(self) -> Iterator[InferenceServiceStub]:
        with grpc.insecure_channel(self.target) as channel:
            yield InferenceServiceStub(channel)

    def post(self, body: object, path: str = "/v1/chat/completions") -> httpx2.Response:
        return httpx2.post(self.url + path, json=body, timeout=30, trust_env=False)

    def is_idle(self) -> bool:
        pool = self.engine.pool
        return pool.num_free == pool.num_pages and not len(self.server.gateway.journal)


def wait_until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """Waits for a condition; returns how long that took."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < seconds, "waited in vain"
        time.sleep(0.01)
    return time.perf_counter() - started


@contextmanager
def in_thread(
    started: AbstractAsyncContextManager[Backend], engine: Engine, config: ClusterConfig = ANY_PORTS
) -> Iterator[Served]:
    """A server over a backend, for as long as the context lasts; nothing may be left open at its end.

    Args:
        started: the backend, entered and left in the server's event loop.
        engine: whose pages must be free at the end.
        config: the ports must be 0.
    """
    ready: list[Served] = []
    is_up, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()
    tracing = start_tracing(config.tracing, "demo", "test")

    async def life() -> None:
        async with started as backend:
            server = GatewayServer(backend, "demo", config.gateway, "test", tracing)
            await server.start()
            ready.append(Served(server, engine, loop))
            is_up.set()
            await stop.wait()
            await server.stop()

    def thread() -> None:
        try:
            loop.run_until_complete(life())
        finally:
            is_up.set()
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()

    serving = threading.Thread(target=thread)
    serving.start()
    try:
        assert is_up.wait(30)
        assert ready, "the server did not start"
        yield ready[0]
        wait_until(ready[0].is_idle)
    finally:
        loop.call_soon_threadsafe(stop.set)
        serving.join(30)
        tracing.close()


@contextmanager
def serve(
    model: LocalModel,
    config: ClusterConfig = ANY_PORTS,
    wrap: Callable[[Backend], Backend] = lambda backend: backend,
) -> Iterator[Served]:
    """A server over the model, for as long as the context lasts; nothing may be left open at its end.

    Args:
        model: what it serves.
        config: its limits; the ports must be 0.
        wrap: what stands between the gateway and the model.
    """
    tokens = config.engine.tokens or 65536
    engine = model.engine(config.engine.config(), tokens)
    context = min(model.config.max_position_embeddings, tokens)
    facts = ModelFacts(model.config, *load_text(DEMO, model.config), model.checkpoint.digest, context)
    backend = EngineBackend(
        engine, facts, max_waiting=config.engine.max_waiting, max_open=config.engine.max_open,
        max_unread=config.gateway.limits.max_unread_tokens,
    )  # fmt: skip

    @asynccontextmanager
    async def started() -> AsyncIterator[Backend]:
        backend.start()
        try:
            yield wrap(backend)
        finally:
            await backend.stop()

    with in_thread(started(), engine, config) as served:
        yield served
    engine.pool.check_idle()

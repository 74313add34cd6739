"""A cluster of the test's own: Ray, supervisor, experts, engines; the gateway in a thread of this process."""

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import ray

from cluster.commands.serve import EMBEDDED
from cluster.config import ClusterConfig, GatewaySection
from cluster.gateway.cluster_backend import ClusterBackend
from cluster.gateway.server import GatewayServer
from cluster.launch import start_backend
from cluster.telemetry.start import start_tracing

SECONDS = 120.0  # for anything at all


class Cluster:
    """A running cluster and ways to talk to it and to hurt it."""

    def __init__(
        self, server: GatewayServer, backend: ClusterBackend, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.server, self.backend, self._loop = server, backend, loop
        self.url = f"http://127.0.0.1:{server.http_port}"

    def complete(
        self, prompt_ids: tuple[int, ...], headers: dict[str, str] | None = None, **options: Any
    ) -> httpx2.Response:
        body = {"model": "demo", "prompt": list(prompt_ids), "temperature": 0, "ignore_eos": True}
        url = f"{self.url}/v1/completions"
        return httpx2.post(url, json=body | options, headers=headers, timeout=SECONDS, trust_env=False)

    def pid(self, title: str) -> int:
        """A process of this cluster whose title contains a text."""
        return next(pid for pid in _descendants(os.getpid()) if title in _title(pid))

    @property
    def pids(self) -> list[int]:
        """Of this process and of all that it started, however indirectly."""
        return [os.getpid(), *_descendants(os.getpid())]

    @property
    def session(self) -> str:
        """Ray's folder, with its logs and sockets."""
        return str(ray._private.worker._global_node.get_session_dir_path())

    @contextmanager
    def another_gateway(self, config: GatewaySection) -> Iterator[GatewayServer]:
        """One more, in front of the same workers."""

        async def start() -> GatewayServer:
            server = GatewayServer(self.backend, "demo", config, "test")
            await server.start()
            return server

        server = asyncio.run_coroutine_threadsafe(start(), self._loop).result(SECONDS)
        try:
            yield server
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), self._loop).result(SECONDS)

    @property
    def num_decoding(self) -> int:
        """Sequences that decode workers run."""
        statuses = self.backend.statuses.values()
        return sum(status.load.running for status in statuses if status.role == "decode")

    @property
    def pages_in_use(self) -> int:
        loads = [status.load for status in self.backend.statuses.values()]
        return sum(load.num_pages - load.free_pages for load in loads)


def wait_until(condition: Callable[[], bool], seconds: float = SECONDS) -> float:
    """Wait for a condition; returns how long that took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds, "waited in vain"
        time.sleep(0.05)
    return time.monotonic() - started


@contextmanager
def running(config: ClusterConfig | None = None) -> Iterator[Cluster]:
    """A cluster for as long as the context lasts."""
    config = config or ClusterConfig.load(EMBEDDED)
    config = config.model_copy(
        update={"gateway": config.gateway.model_copy(update={"http_port": 0, "grpc_port": 0})}
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with ExitStack() as stack:
        tracing = start_tracing(config.tracing, "demo", "test")
        stack.callback(tracing.close)
        backend = start_backend(config, stack, lambda _: None)
        assert isinstance(backend, ClusterBackend)

        async def start() -> GatewayServer:
            backend.start()
            await backend.wait_until_ready(SECONDS)
            server = GatewayServer(backend, "demo", config.gateway, "test", tracing)
            await server.start()
            return server

        server = asyncio.run_coroutine_threadsafe(start(), loop).result(SECONDS)
        try:
            yield Cluster(server, backend, loop)
        finally:
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result(SECONDS)
            asyncio.run_coroutine_threadsafe(backend.stop(), loop).result(SECONDS)
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has just ended
                continue
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        mine = children.get(todo.pop(), [])
        found += mine
        todo += mine
    return sorted(found)


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

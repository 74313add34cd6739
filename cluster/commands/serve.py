"""`eightfold serve`: the model behind HTTP and gRPC, until Ctrl-C."""

import asyncio
import logging
import os
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cluster.cli import EXIT_FAILED, EXIT_INTERRUPTED
from cluster.config import ClusterConfig
from cluster.gateway.cluster_backend import ClusterBackend
from cluster.gateway.engine_backend import EngineBackend
from cluster.gateway.server import GatewayServer
from cluster.gateway.tracing import Tracing
from cluster.launch import ClusterError, Say, start_backend
from cluster.telemetry.start import start_tracing
from model.inputs import PAGE_SIZE

EMBEDDED = Path(__file__).parent.parent / "embedded.yaml"
_CONNECT_SECONDS = 30.0

Start = Callable[[ClusterConfig, ExitStack, Say], EngineBackend | ClusterBackend]


def run(options: Namespace) -> int:
    """Load, serve, drain."""
    return serve("serve", ClusterConfig.load(options.config or EMBEDDED), start_backend)


def serve(command: str, config: ClusterConfig, start: Start) -> int:
    """Serve whatever `start` starts until the command is interrupted; returns its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Says of every cut stream that its response is incomplete, which is the purpose.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    started = time.perf_counter()
    with ExitStack() as stack:
        tracing = start_tracing(config.tracing, config.model.served_name, program_version())
        stack.callback(tracing.close)
        try:
            backend = start(config, stack, _say)
        except ClusterError as error:
            print(f"eightfold {command}: {error}", file=sys.stderr)
            return EXIT_FAILED
        return asyncio.run(_serve(config, backend, tracing, started))


async def _serve(
    config: ClusterConfig, backend: EngineBackend | ClusterBackend, tracing: Tracing, started: float
) -> int:
    backend.start()
    try:
        if isinstance(backend, ClusterBackend):
            await backend.wait_until_ready(_CONNECT_SECONDS)
        name = config.model.served_name
        server = GatewayServer(backend, name, config.gateway, program_version(), tracing)
        await server.start()
        _say(f"ready after {time.perf_counter() - started:.1f} s")
        print(banner(server, config), flush=True)
        return await _until_interrupted(server)
    finally:
        await backend.stop()


async def _until_interrupted(server: GatewayServer) -> int:
    interrupted = asyncio.Event()

    def interrupt() -> None:
        if interrupted.is_set():
            print("stopped at once; open requests are cut", file=sys.stderr, flush=True)
            # Threads and servers are not asked: whoever presses Ctrl-C twice does not want to wait.
            os._exit(EXIT_INTERRUPTED)
        interrupted.set()

    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(signum, interrupt)
    await interrupted.wait()
    _say("taking no more requests; Ctrl-C again stops at once")
    is_complete = await server.drain(
        lambda left, num_open: _say(f"{num_open} requests are open, {left:.0f} s left for them")
    )
    await server.stop()
    _say("stopped" if is_complete else "stopped; the requests still open were cut")
    return 0


def banner(server: GatewayServer, config: ClusterConfig) -> str:
    """Where the server is, what it serves, and lines that work by copy."""
    facts, load, gateway = server.gateway.backend.facts, server.gateway.backend.load(), config.gateway
    name = config.model.served_name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(gateway.host, gateway.host)
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if gateway.tls else "http"
    http, grpc = f"{scheme}://{host}:{server.http_port}", f"{host}:{server.grpc_port}"
    has_keys = bool(gateway.api_key_hashes)
    header = " -H 'Authorization: Bearer '$KEY" if has_keys else ""
    key = 'os.environ["KEY"]' if has_keys else '"none"'
    imports = "import openai, os" if has_keys else "import openai"
    message = '[{"role": "user", "content": "What does harbor mean?"}]'
    body = f'"model": "{name}", "messages": {message}'
    arguments = f'model="{name}", messages={message}, temperature=0'
    client = f'openai.OpenAI(base_url="{http}/v1", api_key={key})'
    grpcurl = "grpcurl" if gateway.tls else "grpcurl -plaintext"
    room = f"room for {load.num_pages * PAGE_SIZE:,} in {load.num_pages:,} pages"
    return f"""
  HTTP     {http}/v1      metrics {http}/metrics
  gRPC     {grpc}   TLS {"on" if gateway.tls else "off"}, API keys {"on" if has_keys else "off"}
  model    {name}, weights {facts.digest[:12]}, {config.model.dtype}, pages {config.model.pages}
  context  {facts.context:,} tokens a request, {room}

  curl -N {http}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
    -d '{{{body}, "temperature": 0, "stream": true}}'

  {grpcurl}{header} -d '{{{body}, "sampling": {{"temperature": 0}}}}' \\
    {grpc} eightfold.v1.InferenceService/Chat

  python3 -c '{imports}; print({client}.chat.completions.create({arguments}).choices[0].message.content)'

  Ctrl-C lets open requests finish, twice stops at once.
"""


def program_version() -> str:
    """Of the installed package; a checkout that is not installed has none."""
    try:
        return version("eightfold")
    except PackageNotFoundError:
        return "0"


def _say(text: str) -> None:
    print(f"eightfold: {text}", file=sys.stderr, flush=True)

"""`eightfold serve`: the model behind HTTP and gRPC, until Ctrl-C."""

import asyncio
import logging
import os
import signal
import sys
import time
from argparse import Namespace
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version

from cluster.cli import EXIT_INTERRUPTED
from cluster.config import ClusterConfig, ConfigError
from cluster.gateway.backend import ModelFacts
from cluster.gateway.engine_backend import EngineBackend
from cluster.gateway.server import GatewayServer
from model.config import ModelConfig
from model.inputs import PAGE_SIZE
from model.moe import Experts
from model.text import load_text
from workers.dispatch import RemoteExperts
from workers.local import LocalModel
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint

_DEFAULT_CONTEXTS = 8  # so many of the longest sequences have room where the description does not say


def run(options: Namespace) -> int:
    """Load, serve, drain."""
    config = ClusterConfig.load(options.config) if options.config else ClusterConfig()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Says of every cut stream that its response is incomplete, which is the purpose.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    with ExitStack() as stack:
        return asyncio.run(_serve(config, start_experts(config, stack)))


def start_experts(config: ClusterConfig, stack: ExitStack) -> Experts | None:
    """The expert pool of a description, started; the stack ends it. None for experts in this process.

    Raises:
        ConfigError, CheckpointError: there is no such model, or it has fewer groups than nodes are asked for.
    """
    directory = config.model.directory
    if not directory.is_dir():
        raise ConfigError("", "model.directory", f"is {str(directory)!r}; there is no such directory")
    if config.experts.placement == "local":
        return None
    from cluster.expert_pool import ExpertPool  # loads Ray, which only a pool needs
    from cluster.ray_runtime import local_ray

    model = ModelConfig.load(directory)
    if config.experts.nodes > model.n_group:
        raise ConfigError(
            "", "experts.nodes", f"is {config.experts.nodes}; this model has {model.n_group} expert groups"
        )
    _say("starting Ray")
    stack.enter_context(local_ray(num_cpus=os.cpu_count() or 1))
    _say(f"starting {config.experts.nodes} expert actors")
    pool = ExpertPool(directory, config.experts.nodes, dtype=config.model.dtype, kernels=config.model.kernels)
    stack.callback(pool.close)
    endpoint = PeerEndpoint(EndpointConfig("attention-0", pool.token))
    stack.callback(endpoint.close)
    return RemoteExperts(
        endpoint, pool, topk_group=model.topk_group, layer_seconds=config.experts.layer_seconds
    )


def load_backend(config: ClusterConfig, experts: Experts | None) -> EngineBackend:
    """The model of a description, loaded and not started yet.

    Raises:
        ConfigError, CheckpointError: it cannot be served.
    """
    directory = config.model.directory
    model = LocalModel(directory, config.model.options(), experts=experts, progress=True)
    tokenizer, encoding = load_text(directory, model.config)
    longest = model.config.max_position_embeddings
    num_tokens = config.engine.tokens or _DEFAULT_CONTEXTS * longest
    engine = model.engine(config.engine.config(), num_tokens)
    context = min(longest, engine.pool.num_pages * PAGE_SIZE)
    facts = ModelFacts(model.config, tokenizer, encoding, model.checkpoint.digest, context)
    return EngineBackend(
        engine,
        facts,
        max_waiting=config.engine.max_waiting,
        max_unread=config.gateway.limits.max_unread_tokens,
    )


async def _serve(config: ClusterConfig, experts: Experts | None) -> int:
    started = time.perf_counter()
    _say(f"loading {config.model.directory.name} as {config.model.dtype}")
    backend = load_backend(config, experts)
    _say(f"loaded in {time.perf_counter() - started:.1f} s; opening ports")
    backend.start()
    try:
        server = GatewayServer(backend, config.model.served_name, config.gateway, program_version())
        await server.start()
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

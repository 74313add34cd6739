"""Many streams at once, half of them cancelled at random points, over HTTP and gRPC mixed.

    python -m benchmarks.streams [--streams 200] [--rounds 10] [--seed 0] [--config CLUSTER.yaml]

Starts a gateway over the demo in this process, or over the cluster of a description, and prints JSON: errors
among the streams that were let run, how long after the last one it took until every page was free again, and
the memory after each round, that of a cluster's processes included. Of a cluster, workers tell their pages
ten times a second.
"""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import h11
import torch

from cluster.config import ClusterConfig
from cluster.gateway.server import GatewayServer
from cluster.launch import start_backend
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub

QUESTION = 'What does "harbor" mean?'
TOKENS = 24
IDLE_SECONDS = 30.0  # gives up on pages that do not come back
STREAM_SECONDS = 300.0


@dataclass(frozen=True)
class Plan:
    """One stream. `cancel_after` counts events; None lets it run to its end."""

    protocol: str
    seed: int
    cancel_after: int | None


@dataclass(frozen=True)
class Round:
    """What one round came to; `seconds_to_baseline` counts from the end of its last stream."""

    outcomes: dict[str, int]
    seconds: float
    seconds_to_baseline: float
    rss_mib: float


def plans(count: int, generator: random.Random) -> list[Plan]:
    """Half of them are cancelled, half go over each protocol, in an order of their own."""
    made = [
        Plan(
            ("http", "grpc")[i % 2],
            generator.getrandbits(32),
            generator.randint(0, TOKENS - 1) if i % 4 < 2 else None,
        )
        for i in range(count)
    ]
    generator.shuffle(made)
    return made


async def by_grpc(stub: InferenceServiceStub, plan: Plan) -> bool:
    """Runs a stream; returns whether it came whole."""
    sampling = pb.Sampling(ignore_eos=True, max_tokens=TOKENS, seed=plan.seed)
    request = pb.GenerateRequest(model="demo", text=QUESTION, sampling=sampling)
    call: Any = stub.Generate(request)
    num_events = num_tokens = 0
    while plan.cancel_after is None or num_events < plan.cancel_after:
        response = await call.read()
        if response is grpc.aio.EOF:
            return num_tokens == TOKENS
        num_events += 1
        num_tokens += len(response.delta.tokens)
    call.cancel()
    return False


async def by_http(port: int, plan: Plan) -> bool:
    """Runs a stream over a connection of its own; returns whether it came whole."""
    body = {
        "model": "demo", "prompt": QUESTION, "ignore_eos": True, "max_tokens": TOKENS, "seed": plan.seed,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    data = json.dumps(body).encode()
    connection = h11.Connection(h11.CLIENT)
    headers = [
        ("Host", "localhost"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(data))),
    ]
    head = connection.send(h11.Request(method="POST", target="/v1/completions", headers=headers))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write((head or b"") + data)
        await writer.drain()
        return await _read_http(connection, reader, plan.cancel_after)
    finally:
        writer.close()


async def _read_http(
    connection: h11.Connection, reader: asyncio.StreamReader, cancel_after: int | None
) -> bool:
    text = b""
    while cancel_after is None or text.count(b"data: ") < cancel_after:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(65536))
        elif isinstance(event, h11.Response):
            if event.status_code != 200:
                raise RuntimeError(f"status {event.status_code}")
        elif isinstance(event, h11.Data):
            text += event.data
        elif isinstance(event, h11.EndOfMessage):
            return text.endswith(b"data: [DONE]\n\n") and f'"completion_tokens":{TOKENS}'.encode() in text
    return False


async def outcome(plan: Plan, port: int, stub: InferenceServiceStub) -> str:
    """`whole`, `cancelled`, or what went wrong with a stream that was let run."""
    try:
        async with asyncio.timeout(STREAM_SECONDS):
            is_whole = await (by_http(port, plan) if plan.protocol == "http" else by_grpc(stub, plan))
    except (grpc.RpcError, OSError, RuntimeError, TimeoutError, h11.RemoteProtocolError) as error:
        return f"{plan.protocol}: {type(error).__name__}: {error}"[:200]
    if plan.cancel_after is not None:
        return "cancelled"
    return "whole" if is_whole else f"{plan.protocol}: not whole"


async def round_(server: GatewayServer, num_held: Callable[[], int], streams: list[Plan]) -> Round:
    """Runs streams at once and waits until the server is as it was before."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = InferenceServiceStub(channel)
        started = time.perf_counter()
        outcomes = await asyncio.gather(*(outcome(plan, server.http_port, stub) for plan in streams))
        ended = time.perf_counter()
        while len(server.gateway.journal) or num_held():
            if time.perf_counter() - ended > IDLE_SECONDS:
                raise RuntimeError(f"{num_held()} pages are still in use")
            await asyncio.sleep(0.005)
        to_baseline = time.perf_counter() - ended
    return Round(dict(Counter(outcomes)), ended - started, to_baseline, rss_mib())


def rss_mib() -> float:
    """Memory in use now, of this process (what is free has been handed back first) and all it started."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    total = 0
    for pid in [os.getpid(), *_descendants(os.getpid())]:
        with contextlib.suppress(OSError):  # it has just ended
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return total * os.sysconf("SC_PAGE_SIZE") / 2**20


def _descendants(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            for child in (task / "children").read_text().split():
                yield int(child)
                yield from _descendants(int(child))


async def measure(
    num_streams: int, num_rounds: int, seed: int, config: ClusterConfig | None = None
) -> list[Round]:
    """Rounds against one gateway; the engines' memory is the same all along."""
    config = config or ClusterConfig.model_validate({"engine": {"tokens": 32768}})
    config = config.model_copy(
        update={
            "engine": config.engine.model_copy(update={"max_waiting": num_streams}),
            "gateway": config.gateway.model_copy(update={"http_port": 0, "grpc_port": 0}),
        }
    )
    with ExitStack() as stack:
        backend = start_backend(config, stack, lambda _: None)
        backend.start()
        while not backend.is_ready:
            await asyncio.sleep(0.1)
        server = GatewayServer(backend, "demo", config.gateway, "benchmark")
        await server.start()
        generator = random.Random(seed)

        def num_held() -> int:
            loads = [worker.status.load for worker in backend.parts().workers]
            return sum(load.num_pages - load.free_pages for load in loads)

        try:
            return [await round_(server, num_held, plans(num_streams, generator)) for _ in range(num_rounds)]
        finally:
            await server.stop()
            await backend.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", type=Path, metavar="CLUSTER.yaml", help="without one, one process")
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = ClusterConfig.load(options.config) if options.config else None
    rounds = asyncio.run(measure(options.streams, options.rounds, options.seed, config))
    failed = Counter[str]()
    for one in rounds:
        failed.update({name: n for name, n in one.outcomes.items() if name not in ("whole", "cancelled")})
    report = {
        "streams": options.streams,
        "rounds": [asdict(one) for one in rounds],
        "errors": dict(failed),
        "slowest_to_baseline_seconds": max(one.seconds_to_baseline for one in rounds),
        "rss_growth_mib_from_second_round": rounds[-1].rss_mib - rounds[min(1, len(rounds) - 1)].rss_mib,
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""Hops between processes of this machine, and one layer's dispatch to expert workers.

    python benchmarks/hops.py [--rounds 20] [--hops 200] [--layers 20]

A hop is half a round trip to a process that sends back what it gets. The bare primitives (`bare_hops.py`)
move the same 64 KiB and do nothing else. Rounds alternate between all paths, so that whatever else the
machine does hits all of them; what counts are the ratios within one run. Prints a table and writes JSON
beside the other results.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_hops import BARE, SIZE, Hop, bare
from cluster.cli import DEMO
from kernels.gate_topk import gate_topk
from model.checkpoint import Checkpoint
from model.moe import DispatchPlan, LocalExperts
from workers.dispatch import RemoteExperts
from workers.experts import ExpertWorker, GroupedExperts
from workers.placement import ExpertPlacement
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.local import LocalSwitch
from workers.transport.message import Message
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, Received

RESULTS = Path(__file__).parent / "results"
TOKEN = b"nothing secret in a benchmark..."
LAYER = 3
NUM_WORKERS = 8
Forward = Callable[[int, torch.Tensor, DispatchPlan], torch.Tensor]


def soon() -> Deadline:
    return Deadline.after(60)


# The transport.


def new_endpoint(name: str, **offers: Any) -> PeerEndpoint:
    return PeerEndpoint(EndpointConfig(name, TOKEN, **{"same_host": False, **offers}))


def echo(endpoint: Endpoint) -> None:
    while True:
        with suppress(DeadlineExceeded):
            event = endpoint.receive(soon())
            if isinstance(event, Received):
                endpoint.send(event.peer.name, event.message, soon())


def echo_process(pipe: Connection, offers: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    endpoint = new_endpoint("echo", **offers)
    pipe.send(endpoint.address)
    echo(endpoint)


def worker_process(pipe: Connection, index: int) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(DEMO)
    groups = groups_of(index)
    endpoint = new_endpoint(f"worker {index}", same_host=True)
    experts = GroupedExperts.load(checkpoint, groups, torch.float32, "reference")
    pipe.send(endpoint.address)
    worker = ExpertWorker(f"worker {index}", checkpoint.config, experts, pipe.recv(), torch.float32)
    pipe.send("ready")
    worker.serve(endpoint, threading.Event())


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *args), daemon=True)
    child.start()
    try:
        yield ours
    finally:
        child.kill()
        child.join()


@contextmanager
def transport(offers: dict[str, Any]) -> Iterator[Hop]:
    with process(echo_process, offers) as pipe:
        endpoint = new_endpoint("asker", same_host=True)
        endpoint.connect(pipe.recv(), soon())
        message = Message(1, (torch.zeros(SIZE, dtype=torch.uint8),))

        def hop() -> None:
            endpoint.send("echo", message, soon())
            endpoint.receive(soon())

        yield hop
        endpoint.close()


# One layer.


def groups_of(worker: int) -> range:
    size = Checkpoint.open(DEMO).config.n_group // NUM_WORKERS
    return range(worker * size, (worker + 1) * size)


def one_token() -> tuple[torch.Tensor, DispatchPlan]:
    """A token whose experts lie in `topk_group` groups, as the demo's router chooses them."""
    config = Checkpoint.open(DEMO).config
    generator = torch.Generator().manual_seed(0)
    experts, weights = gate_topk(
        torch.randn(1, config.n_routed_experts, generator=generator),
        torch.zeros(config.n_routed_experts),
        num_groups=config.n_group,
        topk_group=config.topk_group,
        k=config.num_experts_per_tok,
        normalize=True,
        scale=2.5,
        backend="reference",
    )
    return torch.randn(1, config.hidden_size, generator=generator), DispatchPlan(experts, weights)


class Placed:
    """A control plane whose placement does not change."""

    def __init__(self, placement: ExpertPlacement) -> None:
        self._placement = placement

    def current(self) -> ExpertPlacement:
        return self._placement


def placement_of(addresses: list[Any]) -> ExpertPlacement:
    config = Checkpoint.open(DEMO).config
    return ExpertPlacement.even(1, config.n_routed_experts, config.n_group, addresses)


def timed(forward: Forward) -> Hop:
    """The layer of one token, again and again."""
    x, plan = one_token()

    @torch.inference_mode()
    def run() -> None:
        forward(LAYER, x, plan)

    return run


def dispatcher(endpoint: PeerEndpoint, placement: ExpertPlacement) -> Hop:
    x, plan = one_token()
    experts = RemoteExperts(endpoint, Placed(placement), topk_group=4, layer_seconds=60)
    expected = whole_layer("grouped")(LAYER, x, plan)
    assert torch.equal(experts.forward(LAYER, x, plan), expected), "the split changed the result"
    return timed(experts.forward)


@contextmanager
def in_processes() -> Iterator[Hop]:
    with ExitStack() as stack:
        pipes = [stack.enter_context(process(worker_process, index)) for index in range(NUM_WORKERS)]
        placement = placement_of([pipe.recv() for pipe in pipes])
        for pipe in pipes:
            pipe.send(placement)
        assert [pipe.recv() for pipe in pipes] == ["ready"] * NUM_WORKERS
        endpoint = new_endpoint("model", same_host=True)
        yield dispatcher(endpoint, placement)
        endpoint.close()


@contextmanager
def in_threads() -> Iterator[Hop]:
    checkpoint, switch, stop = Checkpoint.open(DEMO), LocalSwitch(), threading.Event()
    endpoints = [new_endpoint(f"worker {index}", switch=switch) for index in range(NUM_WORKERS)]
    placement = placement_of([endpoint.address for endpoint in endpoints])
    threads = []
    for index, endpoint in enumerate(endpoints):
        experts = GroupedExperts.load(checkpoint, groups_of(index), torch.float32, "reference")
        worker = ExpertWorker(f"worker {index}", checkpoint.config, experts, placement, torch.float32)
        threads.append(threading.Thread(target=worker.serve, args=(endpoint, stop)))
        threads[-1].start()
    asker = new_endpoint("model", switch=switch)
    try:
        yield dispatcher(asker, placement)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for endpoint in (asker, *endpoints):
            endpoint.close()


def whole_layer(kind: str) -> Forward:
    """All experts of the demo in this process."""
    checkpoint = Checkpoint.open(DEMO)
    if kind == "grouped":
        return GroupedExperts.load(checkpoint, range(8), torch.float32, "reference").forward
    weights = checkpoint.load(lambda spec: spec.expert >= 0, dtype=torch.float32)
    return LocalExperts(checkpoint.config, weights, range(32), "reference").forward


@contextmanager
def colocated(kind: str) -> Iterator[Hop]:
    yield timed(whole_layer(kind))


LAYERS: dict[str, Callable[[], Any]] = {
    "layer in one call": lambda: colocated("plain"),
    "layer in groups, here": lambda: colocated("grouped"),
    "layer on 8 processes": in_processes,
    "layer on 8 threads": in_threads,
}
HOPS: dict[str, Callable[[], Any]] = {
    **{name: (lambda kind=kind: bare(kind)) for name, kind in BARE.items()},
    "shared memory": lambda: transport({"same_host": True}),
    "TCP": lambda: transport({"tcp_host": "127.0.0.1"}),
}
COMPARED = (
    ("shared memory", "bare memory + eventfd"),
    ("shared memory", "bare memory + semaphore"),
    ("TCP", "bare TCP"),
    ("layer on 8 processes", "layer in one call"),
    ("layer on 8 processes", "layer in groups, here"),
    ("layer on 8 threads", "layer in one call"),
)


def alternate(paths: dict[str, Callable[[], Any]], rounds: int, count: int) -> dict[str, list[float]]:
    """Microseconds of every round trip, path by path in turn."""
    times: dict[str, list[float]] = {name: [] for name in paths}
    with ExitStack() as stack:
        runs = {name: stack.enter_context(path()) for name, path in paths.items()}
        for index in range(rounds + 1):
            for name, run in runs.items():
                for _ in range(count):
                    started = time.perf_counter()
                    run()
                    if index:  # the first round warms up
                        times[name].append((time.perf_counter() - started) * 1e6)
    return times


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "p50_us": round(statistics.median(ordered), 1),
        "p99_us": round(ordered[int(len(ordered) * 0.99)], 1),
        "least_us": round(ordered[0], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hops", type=int, default=200)
    parser.add_argument("--layers", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hops = alternate(HOPS, options.rounds, options.hops)
    rows = {name: summary([one / 2 for one in times]) for name, times in hops.items()}
    layers = alternate(LAYERS, options.rounds, options.layers)
    rows.update((name, summary(times)) for name, times in layers.items())
    print(f"{'':<26}{'p50 us':>9}{'p99 us':>9}{'least us':>10}")
    for name, row in rows.items():
        print(f"{name:<26}{row['p50_us']:>9}{row['p99_us']:>9}{row['least_us']:>10}")
    ratios = {
        f"{ours} / {theirs}": round(rows[ours]["p50_us"] / rows[theirs]["p50_us"], 2)
        for ours, theirs in COMPARED
    }
    for name, ratio in ratios.items():
        print(f"{name}: {ratio}")
    report = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "message_bytes": SIZE,
        "rounds": options.rounds,
        "paths": rows,
        "ratios": ratios,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"hops_cpu_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


if __name__ == "__main__":
    main()

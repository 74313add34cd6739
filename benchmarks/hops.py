"""What messages cost: hops between processes of this machine, and what is made of them.

    python -m benchmarks.hops [--rounds 20] [--hops 200] [--layers 20] [--steps 60] [--tokens 400]

A hop is half a round trip to a process that sends back what it gets. The bare primitives (`bare_hops.py`)
move the same 64 KiB and do nothing else. Then come one layer's dispatch to expert workers, a control message
and its answer (`control.py`), decode steps with experts elsewhere (`decode_steps.py`), the gateway's work for
a token (`gateway_tokens.py`), and how often a token is sent (`copies.py`). What is compared takes turns, so
that whatever else the machine does hits all of it; what counts are the ratios within one run. Prints tables
and writes JSON beside the other results.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.bare_hops import BARE, SIZE, Hop, bare
from benchmarks.control import CONTROL
from benchmarks.copies import copies
from benchmarks.decode_steps import decode_steps
from benchmarks.expert_layer import LAYERS
from benchmarks.gateway_tokens import gateway_tokens
from benchmarks.processes import new_endpoint, process, soon
from workers.transport.message import Message
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, Received

RESULTS = Path(__file__).parent / "results"


def echo(endpoint: Endpoint, pipe: Connection) -> None:
    """Send everything back until the pipe ends."""
    while True:
        try:
            event = endpoint.receive(Deadline.after(0.5))
        except DeadlineExceeded:
            if pipe.poll():
                return
        else:
            if isinstance(event, Received):
                endpoint.send(event.peer.name, event.message, soon())


def echo_process(pipe: Connection, core: int, offers: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {core})
    endpoint = new_endpoint("echo", **offers)
    pipe.send(endpoint.address)
    echo(endpoint, pipe)
    endpoint.close()


@contextmanager
def transport(offers: dict[str, Any], core: int) -> Iterator[Hop]:
    with process(echo_process, core, offers) as pipe:
        endpoint = new_endpoint("asker", same_host=True)
        endpoint.connect(pipe.recv(), soon())
        message = Message(1, (torch.zeros(SIZE, dtype=torch.uint8),))

        def hop() -> None:
            endpoint.send("echo", message, soon())
            endpoint.receive(soon())

        yield hop
        endpoint.close()


HOPS: dict[str, Callable[[int], Any]] = {
    **{name: partial(bare, kind) for name, kind in BARE.items()},
    "shared memory": partial(transport, {"same_host": True}),
    "TCP": partial(transport, {"tcp_host": "127.0.0.1"}),
}
CORES = {"one core": 0, "two cores": 1}  # where the answering process runs; the asking one is on core 0
COMPARED = (
    *((f"shared memory, {cores}", f"bare memory + eventfd, {cores}") for cores in CORES),
    *((f"TCP, {cores}", f"bare TCP, {cores}") for cores in CORES),
    *((f"layer on 8 {what}", "layer, here") for what in ("processes", "threads")),
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


def paths(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Times of hops, layers and control messages."""
    rows = {}
    for cores, core in CORES.items():
        os.sched_setaffinity(0, {0})  # left to itself, the scheduler chooses differently from run to run
        hops = {name: partial(path, core) for name, path in HOPS.items()}
        for name, times in alternate(hops, options.rounds, options.hops).items():
            rows[f"{name}, {cores}"] = summary([one / 2 for one in times])
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    for group, count in ((LAYERS, options.layers), (CONTROL, options.hops)):
        for name, times in alternate(group, options.rounds, count).items():
            rows[name] = summary(times)
    return rows


def measure(options: argparse.Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "message_bytes": SIZE,
        "rounds": options.rounds,
        "paths": (rows := paths(options)),
        "ratios": {
            f"{ours} / {theirs}": round(rows[ours]["p50_us"] / rows[theirs]["p50_us"], 2)
            for ours, theirs in COMPARED
        },
        "decode_steps": decode_steps(options.steps),
        "gateway_cpu_us_a_token": gateway_tokens(options.tokens),
        "copies_a_token": copies(),
    }
    return report | {"load_at_end": os.getloadavg()[0]}


def print_report(report: dict[str, Any]) -> None:
    table = {"": report["paths"], **report["decode_steps"], "copies a token": report["copies_a_token"]}
    for title, rows in table.items():
        print(f"\n{title}")
        for name, row in rows.items():
            print(f"{name:<36}", "  ".join(f"{key} {value}" for key, value in row.items()))
    for title in ("ratios", "gateway_cpu_us_a_token"):
        print(f"\n{title}")
        for name, value in report[title].items():
            print(f"{name:<60}{value}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--hops", type=int, default=200)
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60, help="decode steps of each side and batch")
    parser.add_argument("--tokens", type=int, default=400, help="of each stream through the gateway")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = measure(options)
    print_report(report)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"hops_cpu_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


if __name__ == "__main__":
    main()

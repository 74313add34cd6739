"""The routed experts of one layer for one token: here, and on expert workers."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.bare_hops import Hop
from benchmarks.processes import new_endpoint, process
from cluster.demo import DEMO
from model.checkpoint import Checkpoint
from model.moe import DispatchPlan
from tests.workers.expert_pool import routed
from workers.dispatch import RemoteExperts
from workers.experts import ExpertWorker, load_experts
from workers.placement import ExpertPlacement
from workers.transport.endpoint import PeerEndpoint
from workers.transport.local import LocalSwitch

LAYER = 3
NUM_WORKERS = 8
Forward = Callable[[int, torch.Tensor, DispatchPlan], torch.Tensor]


def groups_of(worker: int) -> range:
    size = Checkpoint.open(DEMO).config.n_group // NUM_WORKERS
    return range(worker * size, (worker + 1) * size)


def one_token() -> tuple[torch.Tensor, DispatchPlan]:
    """A token whose experts lie in `topk_group` groups, as the demo's router chooses them."""
    config = Checkpoint.open(DEMO).config
    generator = torch.Generator().manual_seed(0)
    plan = routed(torch.randn(1, config.n_routed_experts, generator=generator))
    return torch.randn(1, config.hidden_size, generator=generator), plan


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
    expected = whole_layer()(LAYER, x, plan)
    assert torch.equal(experts.forward(LAYER, x, plan), expected), "the split changed the result"
    return timed(experts.forward)


def worker_process(pipe: Connection, index: int) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(DEMO)
    groups = groups_of(index)
    endpoint = new_endpoint(f"worker {index}", same_host=True)
    experts = load_experts(checkpoint, groups, torch.float32, "reference")
    pipe.send(endpoint.address)
    worker = ExpertWorker(f"worker {index}", checkpoint.config, experts, pipe.recv(), torch.float32)
    pipe.send("ready")
    stop = threading.Event()
    threading.Thread(target=stop_with, args=(pipe, stop), daemon=True).start()
    worker.serve(endpoint, stop)
    endpoint.close()


def stop_with(pipe: Connection, stop: threading.Event) -> None:
    with suppress(EOFError, ConnectionResetError):
        pipe.recv()
    stop.set()


@contextmanager
def expert_processes() -> Iterator[ExpertPlacement]:
    """A worker for each group, in processes of their own."""
    with ExitStack() as stack:
        pipes = [stack.enter_context(process(worker_process, index)) for index in range(NUM_WORKERS)]
        placement = placement_of([pipe.recv() for pipe in pipes])
        for pipe in pipes:
            pipe.send(placement)
        assert [pipe.recv() for pipe in pipes] == ["ready"] * NUM_WORKERS
        yield placement


@contextmanager
def in_processes() -> Iterator[Hop]:
    with expert_processes() as placement:
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
        experts = load_experts(checkpoint, groups_of(index), torch.float32, "reference")
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


def whole_layer() -> Forward:
    """All experts of the demo in this process."""
    return load_experts(Checkpoint.open(DEMO), range(8), torch.float32, "reference").forward


@contextmanager
def colocated() -> Iterator[Hop]:
    yield timed(whole_layer())


LAYERS: dict[str, Callable[[], Any]] = {
    "layer, here": colocated,
    "layer on 8 processes": in_processes,
    "layer on 8 threads": in_threads,
}

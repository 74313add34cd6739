"""The demo's experts split over workers, for tests: in threads, or in processes."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.connection import Connection

import torch

from kernels.gate_topk import gate_topk
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.moe import DispatchPlan, LocalExperts
from tests.checkpoints import DEMO
from tests.workers.transport.processes import PeerProcess, new_endpoint, peer_process
from workers.dispatch import RemoteExperts
from workers.experts import ExpertWorker, load_experts
from workers.placement import ExpertPlacement
from workers.transport.endpoint import PeerEndpoint
from workers.transport.local import LocalSwitch
from workers.transport.protocol import Address, Endpoint

LAYER = 3


@cache
def demo_config() -> ModelConfig:
    return Checkpoint.open(DEMO).config


@cache
def all_experts() -> LocalExperts:
    """All experts of the demo in this process; the threads share it, each using its own groups."""
    return load_experts(Checkpoint.open(DEMO), range(demo_config().n_group), torch.float32, "reference")


def routed(logits: torch.Tensor) -> DispatchPlan:
    """The plan that the demo's router makes of `logits` [T, n_routed_experts]."""
    config = demo_config()
    experts, weights = gate_topk(
        logits,
        torch.zeros(config.n_routed_experts),
        num_groups=config.n_group,
        topk_group=config.topk_group,
        k=config.num_experts_per_tok,
        normalize=True,
        scale=2.5,
        backend="reference",
    )
    return DispatchPlan(experts, weights)


def rows(num_tokens: int, seed: int = 0) -> tuple[torch.Tensor, DispatchPlan]:
    """Random rows, and a plan as the demo's router would make it."""
    config = demo_config()
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, config.hidden_size, generator=generator)
    return x, routed(torch.randn(num_tokens, config.n_routed_experts, generator=generator))


def place(addresses: list[Address], epoch: int = 1) -> ExpertPlacement:
    config = demo_config()
    return ExpertPlacement.even(epoch, config.n_routed_experts, config.n_group, addresses)


@dataclass
class Source:
    """A control plane that knows one placement."""

    placement: ExpertPlacement

    def current(self) -> ExpertPlacement:
        return self.placement


@dataclass
class Pool:
    """Workers, and a model's side of them."""

    endpoint: PeerEndpoint
    source: Source
    experts: RemoteExperts
    workers: list[ExpertWorker] = field(default_factory=list)


@contextmanager
def thread_pool(num_workers: int, layer_seconds: float = 30.0) -> Iterator[Pool]:
    """Workers in threads of this process."""
    config, switch, stop = demo_config(), LocalSwitch(), threading.Event()
    endpoints = [new_endpoint(f"worker {i}", "local", switch=switch) for i in range(num_workers)]
    placement = place([endpoint.address for endpoint in endpoints])
    workers = [
        ExpertWorker(endpoint.address.name, config, all_experts(), placement, torch.float32)
        for endpoint in endpoints
    ]
    threads = [
        threading.Thread(target=worker.serve, args=(endpoint, stop))
        for worker, endpoint in zip(workers, endpoints, strict=True)
    ]
    for thread in threads:
        thread.start()
    endpoint = new_endpoint("model", "local", switch=switch)
    source = Source(placement)
    experts = RemoteExperts(endpoint, source, topk_group=config.topk_group, layer_seconds=layer_seconds)
    try:
        yield Pool(endpoint, source, experts, workers)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for one in (endpoint, *endpoints):
            one.close()


def serve_share(endpoint: Endpoint, pipe: Connection) -> None:
    """A worker process: it is told the placement, loads its groups, and says when it is ready."""
    torch.set_num_threads(1)
    placement = pipe.recv()
    share = placement.share_of(endpoint.address.name)
    assert share is not None
    experts = load_experts(Checkpoint.open(DEMO), share.groups, torch.float32, "reference")
    worker = ExpertWorker(share.peer, demo_config(), experts, placement, torch.float32)
    pipe.send("ready")
    worker.serve(endpoint, threading.Event())


@contextmanager
def process_pool(
    carriers: list[str], layer_seconds: float = 30.0, first: int = 0, epoch: int = 1
) -> Iterator[tuple[Pool, list[PeerProcess]]]:
    """Workers in processes of their own, each reached by its carrier, and numbered from `first` on."""
    with ExitStack() as stack:
        processes = [
            stack.enter_context(peer_process(serve_share, f"worker {i}", carrier))
            for i, carrier in enumerate(carriers, first)
        ]
        source = Source(place([process.address for process in processes], epoch))
        for process in processes:
            process.pipe.send(source.placement)
        for process in processes:
            assert process.pipe.recv() == "ready"
        endpoint = new_endpoint("model")
        stack.callback(endpoint.close)
        experts = RemoteExperts(
            endpoint, source, topk_group=demo_config().topk_group, layer_seconds=layer_seconds
        )
        yield Pool(endpoint, source, experts), processes

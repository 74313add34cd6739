"""Expert hosts and attention that pair as on GPUs: all is real but the carriers, which join threads."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.block_sum import block_sum
from kernels.group_tree import blocks_of
from kernels.list_rows import RoutedRows
from model.checkpoint import Checkpoint
from model.config import ModelConfig
from model.decoder import Decoder
from model.fused.feed_forward import Quantized
from model.graphs import DecodeGraphs
from model.moe import DispatchPlan, Done, PendingSum
from model.pages import PageCache
from tests.checkpoints import DEMO
from tests.workers.expert_pool import Source, place
from tests.workers.gpu_carriers import DirectRunner, ThreadCarrier, carrier_pair
from tests.workers.test_gpu_dispatch import decoder_with, demo_config, experts_of_groups, new_cache
from tests.workers.workers import TOKEN
from workers import ways
from workers.engine import Engine, EngineConfig
from workers.expert_seats import ExpertHost
from workers.expert_ways import PairedExperts
from workers.placement import ExpertPlacement
from workers.transport.config import EndpointConfig, WayConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Deadline

SECONDS = 20.0


class Meeting:
    """In place of `pair`: two threads that pair get the two ends of a carrier."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._waiting: dict[frozenset[str], ThreadCarrier] = {}
        self.carriers: list[ThreadCarrier] = []

    def pair(
        self, endpoint: Any, peer: str, kind: str, epoch: int, *rest: Any, timeout: float, deadline: Deadline
    ) -> ThreadCarrier:
        names = endpoint.address.name, peer
        with self._lock:
            if theirs := self._waiting.pop(frozenset(names), None):
                self._lock.notify_all()
                return theirs
            ours, theirs = carrier_pair(names, 3, timeout)
            ours.epoch = theirs.epoch = epoch
            self.carriers += [ours, theirs]
            self._waiting[frozenset(names)] = theirs
            assert self._lock.wait_for(lambda: frozenset(names) not in self._waiting, deadline.left())
            return ours


@dataclass
class Host:
    """One expert actor, without Ray."""

    endpoint: PeerEndpoint
    groups: range
    stop: threading.Event = field(default_factory=threading.Event)
    host: ExpertHost | None = None
    thread: threading.Thread | None = None
    urgent: list[bool] = field(default_factory=list)  # of each seat

    def adopt(self, placement: ExpertPlacement) -> None:
        if self.host:
            self.host.adopt(placement)
            return
        name = self.endpoint.address.name
        config = WayConfig("ipc", f"{name}/rows", TOKEN)
        experts = experts_of_groups(self.groups)
        self.host = ExpertHost(name, demo_config(), experts, placement, config, self.runner)
        self.thread = threading.Thread(target=self.host.serve, args=(self.endpoint, self.stop))
        self.thread.start()

    def runner(self, *, is_urgent: bool) -> DirectRunner:
        self.urgent.append(is_urgent)
        return DirectRunner()

    @property
    def seats(self) -> list[Any]:
        assert self.host
        return self.host._seats

    def end(self) -> None:
        """As when its process ends: whoever is connected sees it go."""
        self.stop.set()
        if self.thread:
            self.thread.join()
        self.endpoint.close()


def new_host(number: int, groups: range) -> Host:
    return Host(PeerEndpoint(EndpointConfig(f"experts-{number}", TOKEN)), groups)


@dataclass
class Pool:
    """Expert actors and the placement that everybody learns."""

    hosts: list[Host]
    source: Source

    def next_epoch(self) -> None:
        placement = place([host.endpoint.address for host in self.hosts], self.source.placement.epoch + 1)
        for host in self.hosts:
            host.adopt(placement)
        self.source.placement = placement

    def replace(self, number: int) -> None:
        """As the pool does it when an actor has died."""
        self.hosts[number].end()
        self.hosts[number] = new_host(number, self.hosts[number].groups)
        self.next_epoch()


@contextmanager
def pool(num_hosts: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Pool, Meeting]]:
    meeting = Meeting()
    monkeypatch.setattr(ways, "pair", meeting.pair)
    size = demo_config().n_group // num_hosts
    hosts = [new_host(i, range(i * size, (i + 1) * size)) for i in range(num_hosts)]
    found = Pool(hosts, Source(place([host.endpoint.address for host in hosts])))
    found.next_epoch()
    try:
        yield found, meeting
    finally:
        for host in found.hosts:
            host.end()


def paired(pool: Pool, name: str, config: EngineConfig, layer_seconds: float = SECONDS) -> PairedExperts:
    """The experts of a pool, as an attention actor knows them."""
    return PairedExperts(
        demo_config(),
        pool.source,
        WayConfig("ipc", f"{name}/rows", TOKEN),
        max_rows=config.most_rows(demo_config()),
        num_slots=config.micro_batches,
        device=torch.device("cpu"),
        backend="reference",
        layer_seconds=layer_seconds,
        is_urgent=name != "second",
    )


@contextmanager
def attention(
    pool: Pool, name: str, config: EngineConfig, layer_seconds: float = SECONDS, *, records: bool = True
) -> Iterator[tuple[Engine, PairedExperts, DecodeGraphs | None]]:
    """An engine whose experts are in a pool."""
    experts = paired(pool, name, config, layer_seconds)
    decoder, cache = decoder_with(experts), new_cache()
    graphs = DecodeGraphs(decoder, cache, later, experts, config.micro_batches) if records else None
    try:
        yield Engine(decoder, cache, config, graphs=graphs, experts=experts), experts, graphs
    finally:
        experts.close()


@dataclass(frozen=True)
class Model:
    """The part of a `LocalModel` that attention workers are made of, by twins of the fused kernels."""

    steps: PairedExperts

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(DEMO)

    @property
    def config(self) -> ModelConfig:
        return demo_config()

    @cached_property
    def decoder(self) -> Decoder:
        return decoder_with(self.steps)

    def cache(self, num_tokens: int) -> PageCache:
        return new_cache()


def later(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """In place of a recording, which does not run what it records."""
    assert isinstance(run, partial)
    model, rows = run.args[:2]
    result = torch.zeros(rows.bucket.num_rows, model.config.hidden_size, dtype=model.dtype)
    return lambda: result.copy_(run()), result


@dataclass(frozen=True)
class Rounding:
    """All experts in this process; their sums are rounded as those of several hosts are."""

    held: tuple[range, ...]

    @property
    def listed(self) -> range:
        return range(demo_config().n_routed_experts)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        raise NotImplementedError

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        parts: list[tuple[range, Tensor]] = []
        for groups in self.held:
            there = experts_of_groups(groups)
            sums = there.block_sums(layer, x, there.list_rows(plan.experts, plan.weights))
            parts.extend(zip(blocks_of(groups), sums, strict=True))
        return Done(block_sum(parts, shared(), dtype=torch.bfloat16, backend="reference"))


def alone(pool: Pool, config: EngineConfig) -> Engine:
    """An engine with all experts in this process, and the bits of that pool."""
    decoder = decoder_with(Rounding(tuple(host.groups for host in pool.hosts)))
    cache: PageCache = new_cache()
    return Engine(decoder, cache, config)

"""Experts and attention in processes with a GPU each, as Ray gives it to actors, but without Ray."""

import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch import Tensor

from kernels.block_sum import block_sum
from kernels.group_tree import blocks_of
from model.graphs import DecodeGraphs
from model.moe import Done
from tests.checkpoints import DEMO
from tests.workers.expert_pool import Source, place
from tests.workers.workers import TOKEN
from workers.actors import ExpertActor, ExpertActorConfig, way_config
from workers.dispatch import WorkerLost
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions, open_checkpoint
from workers.placement import ExpertPlacement
from workers.sequence import Request
from workers.transport.config import CarrierKind
from workers.transport.protocol import Address, Deadline

OPTIONS = ModelOptions(dtype="bfloat16", pages="fp8", kernels="triton", device="cuda")
NUM_TOKENS = 4096
SECONDS = 90.0  # kernels are compiled first


def serve_experts(pipe: Connection, gpu: int, kind: CarrierKind, number: int, groups: range) -> None:
    """An expert actor; adopts the placements that it hears."""
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    actor = ExpertActor(
        ExpertActorConfig(f"experts-{number}", DEMO, groups, OPTIONS, TOKEN, row_carrier=kind)
    )
    pipe.send(actor.address())
    try:
        while True:
            actor.adopt(pipe.recv())
            pipe.send("adopted")
    except EOFError:
        actor.stop()


class Rounding:
    """All experts in this process; their sums are rounded as those of several actors are."""

    def __init__(self, held: list[range]) -> None:
        from workers.expert_seats import load_fused_experts

        checkpoint = open_checkpoint(DEMO, OPTIONS)
        self._experts = [load_fused_experts(checkpoint, groups, "triton", "cuda") for groups in held]
        self.listed = range(checkpoint.config.n_routed_experts)

    def submit(self, layer: int, x: Tensor, plan: Any) -> Any:
        raise NotImplementedError

    def submit_quantized(self, layer: int, x: Any, plan: Any, shared: Any) -> Done:
        parts: list[tuple[range, Tensor]] = []
        for there in self._experts:
            sums = there.block_sums(layer, x, there.list_rows(plan.experts, plan.weights))
            parts.extend(zip(blocks_of(there.groups), sums, strict=True))
        return Done(block_sum(parts, shared(), dtype=torch.bfloat16, backend="triton"))


def attend(
    pipe: Connection, gpu: int, kind: CarrierKind, config: EngineConfig, requests: list[Request]
) -> None:
    """Answers all requests in one process, then with the experts of the placements that it hears.

    Says what came out each time, or "lost" where experts are.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    from workers.expert_ways import paired_experts

    placement: ExpertPlacement = pipe.recv()
    source = Source(placement)
    one = LocalModel(DEMO, OPTIONS, experts=Rounding([share.groups for share in placement.shares]))
    cache = one.cache(NUM_TOKENS)
    graphs = DecodeGraphs(one.decoder, cache, micro_batches=config.micro_batches)
    pipe.send(answers(Engine(one.decoder, cache, config, graphs=graphs), requests))
    ways = way_config(kind, "attention/rows", TOKEN, None)
    experts = paired_experts(DEMO, OPTIONS, config, source, ways, SECONDS / 3)
    engine = LocalModel(DEMO, OPTIONS, experts=experts).engine(config, NUM_TOKENS)
    experts.meet(Deadline.after(SECONDS))
    pipe.recv()
    try:
        while True:
            try:
                pipe.send(answers(engine, requests))
            except WorkerLost as error:
                for request in requests:
                    engine.cancel(request.uid)
                pipe.send(("lost", str(error)))
            source.placement = pipe.recv() or source.placement
    except EOFError:
        experts.close()


def answers(engine: Engine, requests: list[Request]) -> tuple[dict[str, list[int]], float]:
    """Tokens by request, and the seconds that they took."""
    started = time.perf_counter()
    for request in requests:
        engine.add(request)
    out: dict[str, list[int]] = {request.uid: [] for request in requests}
    while not engine.is_idle:
        for token in engine.step():
            out[token.uid].append(token.token_id)
    engine.pool.check_idle()
    return out, time.perf_counter() - started


@dataclass
class Process:
    """One of them, as the parent sees it."""

    process: BaseProcess
    pipe: Connection

    def hear(self, seconds: float = SECONDS) -> Any:
        assert self.pipe.poll(seconds), f"{self.process.name} says nothing"
        return self.pipe.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


@dataclass
class Split:
    """Expert actors, and attention that is told of them."""

    kind: CarrierKind
    held: list[range]
    gpus: tuple[int, int]
    attention: Process
    experts: list[Process] = field(default_factory=list)
    addresses: list[Address] = field(default_factory=list)
    epoch: int = 0

    def start(self, number: int) -> None:
        """An expert actor, in place of one that was killed."""
        process = _process(serve_experts, self.gpus[1], self.kind, number, self.held[number])
        self.experts[number : number + 1] = [process]
        self.addresses[number : number + 1] = [process.hear()]

    def next_epoch(self) -> ExpertPlacement:
        """All experts have adopted it; attention is to be told."""
        self.epoch += 1
        placement = place(self.addresses, self.epoch)
        for process in self.experts:
            process.pipe.send(placement)
            assert process.hear() == "adopted"
        return placement


def _process(target: Any, *arguments: Any) -> Process:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), name=target.__name__, daemon=True)
    process.start()
    theirs.close()
    return Process(process, ours)


@contextmanager
def split(
    kind: CarrierKind, num_actors: int, config: EngineConfig, requests: list[Request], gpus: tuple[int, int]
) -> Iterator[Split]:
    """All processes, which are gone at the end whatever they do."""
    size = 8 // num_actors
    held = [range(i * size, (i + 1) * size) for i in range(num_actors)]
    found = Split(kind, held, gpus, _process(attend, gpus[0], kind, config, requests))
    try:
        for number in range(num_actors):
            found.start(number)
        yield found
    finally:
        for each in (found.attention, *found.experts):
            each.kill()

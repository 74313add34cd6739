"""Decode steps with the experts in 8 processes, and how much of them is not the model's own arithmetic.

arithmetic   CPU time of a step with the experts in this process: the same rows, nothing sent
cpu          CPU time of a step of all nine processes: attention's, and the eight with experts
outside      the share of `cpu` that is no arithmetic: dispatch, transport, waking, colder caches, and the
             weights that two micro-batches read twice
waiting      the share of a step's wall time in which the attention process has nothing to do; what two
             micro-batches are to fill
"""

import multiprocessing
import statistics
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.expert_layer import Placed, expert_processes
from benchmarks.processes import new_endpoint
from cluster.demo import DEMO
from model.checkpoint import Checkpoint
from model.moe import DispatchPlan, Done, LocalExperts
from model.sampling_params import SamplingParams
from workers.dispatch import RemoteExperts
from workers.engine import Engine, EngineConfig
from workers.experts import load_experts
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request
from workers.transport.protocol import Deadline

BATCHES = (1, 8, 32)
_AWAY_SECONDS = 0.005
_PROMPT_TOKENS = 20


@dataclass(frozen=True)
class Late(Done):
    """A result that comes at a certain time."""

    arrival: Deadline

    def result(self) -> Tensor:
        time.sleep(self.arrival.left())
        return self.value


@dataclass(frozen=True)
class Away:
    """Experts of this process, as if they were far from it."""

    experts: LocalExperts

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> Late:
        value = self.experts.forward(layer, x, plan)
        return Late(value, Deadline.after(_AWAY_SECONDS))


@dataclass
class Side:
    """One way to run the steps, and what they took: seconds of wall, of this process and of its children."""

    engine: Engine
    wall: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    children: list[float] = field(default_factory=list)

    def step(self) -> None:
        before = time.perf_counter(), time.process_time(), children_seconds()
        self.engine.step()
        self.wall.append(time.perf_counter() - before[0])
        self.own.append(time.process_time() - before[1])
        self.children.append(children_seconds() - before[2])


def children_seconds() -> float:
    """CPU time of the processes that this one started."""
    # The clock of another process, as clock_getcpuclockid(3) makes its number.
    clocks = [(~child.pid << 3) | 2 for child in multiprocessing.active_children() if child.pid]
    return sum(map(time.clock_gettime, clocks))


def decoding(model: LocalModel, batch: int, micro_batches: int, num_steps: int) -> Side:
    """An engine whose sequences are past their prompts."""
    longest = _PROMPT_TOKENS + num_steps + 3
    engine = model.engine(EngineConfig(micro_batches=micro_batches), batch * (longest + 64))
    params = SamplingParams(max_tokens=num_steps + 2, temperature=0, ignore_eos=True)
    for number in range(batch):
        prompt = tuple(range(1000 + 30 * number, 1000 + 30 * number + _PROMPT_TOKENS))
        engine.add(Request(f"{number}", prompt, params))
    engine.step()
    return Side(engine)


def rows_of(sides: dict[str, Side]) -> dict[str, dict[str, float]]:
    """Medians of the steps, in milliseconds, and shares."""
    here = sides["experts here"]
    arithmetic = statistics.median(here.own)
    rows = {}
    for name, side in sides.items():
        wall, own = statistics.median(side.wall), statistics.median(side.own)
        row = {"wall_ms": wall * 1e3, "own_cpu_ms": own * 1e3}
        if side is not here:
            row |= {"waiting": 1 - own / wall, "wall / here": wall / statistics.median(here.wall)}
        if name.startswith("8 processes"):
            cpu = own + statistics.median(side.children)
            row |= {"cpu_ms": cpu * 1e3, "outside": 1 - arithmetic / cpu}
        rows[name] = {key: round(value, 3) for key, value in row.items()}
    return rows


def decode_steps(num_steps: int) -> dict[str, dict[str, dict[str, float]]]:
    """By batch and by side; the sides take turns, one step each."""
    report: dict[str, Any] = {}
    with ExitStack() as stack:
        placement = stack.enter_context(expert_processes())
        endpoint = new_endpoint("model", same_host=True)
        stack.callback(endpoint.close)
        remote = RemoteExperts(endpoint, Placed(placement), topk_group=4, layer_seconds=60)
        here = LocalModel(DEMO, ModelOptions())
        there = LocalModel(DEMO, ModelOptions(), experts=remote)
        experts = load_experts(Checkpoint.open(DEMO), range(8), torch.float32, "reference")
        away = LocalModel(DEMO, ModelOptions(), experts=Away(experts))
        for batch in BATCHES:
            sides = {"experts here": decoding(here, batch, 1, num_steps)}
            for name, model in (("8 processes", there), ("5 ms away", away)):
                sides[f"{name}, one micro-batch"] = decoding(model, batch, 1, num_steps)
                sides[f"{name}, two micro-batches"] = decoding(model, batch, 2, num_steps)
            for _ in range(num_steps):
                for side in sides.values():
                    side.step()
            report[f"batch of {batch}"] = rows_of(sides)
    return report

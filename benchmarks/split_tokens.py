"""Are the tokens of attention on one GPU and experts on another those of one process, and what do they cost?

    python -m benchmarks.split_tokens [--kinds ipc copy nccl] [--gpus 0 1] [--seconds 300] [--out FILE.json]

The demo checkpoint by the kernels for GPUs, in processes that have a GPU each, as Ray gives it to an actor:
the plain classes of the actors, without Ray. The reference is one process that rounds the sums of experts as
those that travel are rounded, so every token must be the same. Then an expert actor is killed in the middle
of a step, and its successor goes on. Exits with 1 if any token differs.
"""

import argparse
import faulthandler
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from cluster.demo import DEMO
from kernels.block_sum import block_sum
from kernels.group_tree import blocks_of
from kernels.list_rows import RoutedRows
from model.config import ModelConfig
from model.fused.feed_forward import Quantized
from model.graphs import DecodeGraphs
from model.moe import DispatchPlan, Done, PendingSum
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from workers.actors import ExpertActor, ExpertActorConfig, way_config
from workers.dispatch import WorkerLost
from workers.engine import Engine, EngineConfig
from workers.expert_seats import load_fused_experts
from workers.expert_ways import PairedExperts, paired_experts
from workers.local import LocalModel, ModelOptions, open_checkpoint
from workers.placement import ExpertPlacement
from workers.sequence import Request
from workers.transport.config import CarrierKind
from workers.transport.protocol import Address, Deadline

OPTIONS = ModelOptions(dtype="bfloat16", pages="fp8", kernels="triton", device="cuda")
TOKEN = b"t" * 32
NUM_TOKENS = 4096  # of room in pages
LAYER_SECONDS = 30.0  # kernels are compiled on the way
SECONDS = 240.0  # of silence
CASES: dict[CarrierKind, list[tuple[int, EngineConfig]]] = {  # actors, engine
    "ipc": [
        (2, EngineConfig(100, 0, micro_batches=1, sequences=8)),
        (2, EngineConfig(100, 2, micro_batches=2, sequences=8)),
    ],
    "copy": [(1, EngineConfig(100, 3, micro_batches=3, sequences=8))],
    "nccl": [
        (1, EngineConfig(100, 0, micro_batches=2, sequences=8)),
        (1, EngineConfig(100, 1, micro_batches=1, sequences=8)),
    ],
}

Answers = dict[str, list[int]]


@dataclass(frozen=True)
class Order:
    """What attention is to do: answer all requests again and again, in one process where `kind` is None."""

    kind: CarrierKind | None
    placement: ExpertPlacement
    config: EngineConfig
    requests: tuple[Request, ...]
    times: int = 1


@dataclass
class Newest:
    """A `PlacementSource` that is told."""

    placement: ExpertPlacement

    def current(self) -> ExpertPlacement:
        return self.placement


class Rounding:
    """All experts in this process; their sums are rounded as those of several actors are."""

    def __init__(self, placement: ExpertPlacement) -> None:
        checkpoint = open_checkpoint(DEMO, OPTIONS)
        self._experts = [
            load_fused_experts(checkpoint, share.groups, OPTIONS.kernels, OPTIONS.device)
            for share in placement.shares
        ]
        self.listed = range(checkpoint.config.n_routed_experts)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        raise NotImplementedError("a fused layer sends what is quantised")

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        parts: list[tuple[range, Tensor]] = []
        for there in self._experts:
            sums = there.block_sums(layer, x, there.list_rows(plan.experts, plan.weights))
            parts.extend(zip(blocks_of(there.groups), sums, strict=True))
        return Done(block_sum(parts, shared(), dtype=torch.bfloat16, backend=OPTIONS.kernels))


def serve_experts(pipe: Connection, kind: CarrierKind, number: int, groups: range) -> None:
    """An expert actor's process; adopts the placements that it hears."""
    config = ExpertActorConfig(f"{kind}-experts-{number}", DEMO, groups, OPTIONS, TOKEN, row_carrier=kind)
    actor = ExpertActor(config)
    pipe.send(actor.address())
    try:
        while True:
            actor.adopt(pipe.recv())
            pipe.send(None)
    except EOFError:
        actor.stop()


def attend(pipe: Connection) -> None:
    """The attention's process; says what came of each order, in how many seconds the last time."""
    engines: dict[tuple[CarrierKind, EngineConfig], tuple[Engine, PairedExperts, Newest]] = {}
    try:
        while True:
            order: Order = pipe.recv()
            if order.kind is None:
                pipe.send(answer(in_one_process(order.placement, order.config), order))
                continue
            key = order.kind, order.config
            if key not in engines:
                engines[key] = _split(order)
            engine, _, source = engines[key]
            source.placement = order.placement
            pipe.send(answer(engine, order))
    except EOFError:
        for _, experts, _ in engines.values():
            experts.close()


def in_one_process(placement: ExpertPlacement, config: EngineConfig, num_tokens: int = NUM_TOKENS) -> Engine:
    """An engine with all experts here, and the rounding of a placement's."""
    model = LocalModel(DEMO, OPTIONS, experts=Rounding(placement))
    cache = model.cache(num_tokens)
    graphs = DecodeGraphs(model.decoder, cache, micro_batches=config.micro_batches)
    return Engine(model.decoder, cache, config, graphs=graphs)


def _split(order: Order) -> tuple[Engine, PairedExperts, Newest]:
    assert order.kind
    source = Newest(order.placement)
    name = f"{order.kind}-{order.config.num_drafts}-{order.config.micro_batches}"
    ways = way_config(order.kind, f"attention/{name}/rows", TOKEN, None)
    experts = paired_experts(DEMO, OPTIONS, order.config, source, ways, LAYER_SECONDS)
    engine = LocalModel(DEMO, OPTIONS, experts=experts).engine(order.config, NUM_TOKENS)
    started = time.perf_counter()
    experts.meet(Deadline.after(SECONDS))
    say(f"paired by {order.kind} in {time.perf_counter() - started:.2f} s")
    return engine, experts, source


def answer(engine: Engine, order: Order) -> tuple[Answers, float] | str:
    """Tokens by request and seconds, or who was lost."""
    out: Answers = {}
    seconds = 0.0
    try:
        for _ in range(order.times):
            started = time.perf_counter()
            for request in order.requests:
                engine.add(request)
            out = {request.uid: [] for request in order.requests}
            while not engine.is_idle:
                for token in engine.step():
                    out[token.uid].append(token.token_id)
            engine.pool.check_idle()
            seconds = time.perf_counter() - started
            say(f"{order.kind or 'one process'}: {sum(map(len, out.values()))} tokens in {seconds:.3f} s")
    except WorkerLost as error:
        for request in order.requests:
            engine.cancel(request.uid)
        return str(error)
    return out, seconds


def requests(max_tokens: int) -> tuple[Request, ...]:
    """Greedy and sampled ones, two with prompts of several chunks."""
    tokenizer = Tokenizer.load(DEMO)
    prompts = {
        each["name"]: each["prompt"] for each in json.loads((DEMO / "oracle.json").read_text())["prompts"]
    }
    return tuple(
        Request(
            name,
            tuple(tokenizer.encode(prompts[name])),
            SamplingParams(max_tokens=max_tokens + n, temperature=0.8 * (n % 2), seed=n, ignore_eos=True),
        )
        for n, name in enumerate(("chat", "lookup_300", "code", "lookup_1000"))
    )


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {multiprocessing.current_process().name}: {text}", flush=True)


@dataclass
class Child:
    """A process, as the parent sees it."""

    process: BaseProcess
    pipe: Connection

    def hear(self) -> Any:
        if not self.pipe.poll(SECONDS):
            raise TimeoutError(f"{self.process.name} says nothing")
        return self.pipe.recv()


@dataclass
class Split:
    """Attention and the expert actors of one carrier."""

    kind: CarrierKind
    num_actors: int
    gpu: int  # of the experts
    attention: Child
    experts: list[Child] = field(default_factory=list)
    addresses: dict[int, Address] = field(default_factory=dict)
    epoch: int = 0

    def start(self, number: int) -> None:
        """An expert actor, in place of one that was killed; it loads meanwhile."""
        size = ModelConfig.load(DEMO).n_group // self.num_actors
        groups = range(number * size, (number + 1) * size)
        child = _child(f"{self.kind}-experts-{number}", self.gpu, serve_experts, self.kind, number, groups)
        self.experts[number : number + 1] = [child]
        self.addresses.pop(number, None)

    def kill(self, number: int) -> None:
        self.experts[number].process.kill()
        self.experts[number].process.join()

    def ask(
        self, config: EngineConfig, asked: tuple[Request, ...], *, in_one: bool = False, times: int = 1
    ) -> None:
        """Tell attention what to do, under the newest placement."""
        order = Order(None if in_one else self.kind, self.placement(), config, asked, times)
        self.attention.pipe.send(order)

    def placement(self) -> ExpertPlacement:
        """Of all experts as they are now; a new one where somebody is new."""
        for number, child in enumerate(self.experts):
            if number not in self.addresses:
                self.addresses[number] = child.hear()
                self._placement = None
        if self._placement is None:
            self.epoch += 1
            config = ModelConfig.load(DEMO)
            addresses = [self.addresses[number] for number in range(self.num_actors)]
            self._placement = ExpertPlacement.even(
                self.epoch, config.n_routed_experts, config.n_group, addresses
            )
            for child in self.experts:
                child.pipe.send(self._placement)
                child.hear()
        return self._placement

    _placement: ExpertPlacement | None = None


def _run(name: str, gpu: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    faulthandler.enable()  # who is aborted says where it was
    torch.set_num_threads(1)
    say("started")
    target(*arguments)


def _child(name: str, gpu: int, target: Callable[..., None], *arguments: Any) -> Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_run, args=(name, gpu, target, (theirs, *arguments)), name=name, daemon=True
    )
    process.start()
    theirs.close()
    return Child(process, ours)


@contextmanager
def splits(kinds: list[tuple[CarrierKind, int]], gpus: tuple[int, int]) -> Iterator[list[Split]]:
    """Attention, and expert actors for each carrier; all processes are gone at the end."""
    attention = _child("attention", gpus[0], attend)
    found = [Split(kind, num_actors, gpus[1], attention) for kind, num_actors in kinds]
    try:
        for each in found:
            for number in range(each.num_actors):
                each.start(number)
        yield found
    except BaseException:
        for child in _children(attention, found):
            if child.process.pid and child.process.is_alive():
                os.kill(child.process.pid, signal.SIGABRT)
                child.process.join(1)
        raise
    finally:
        for child in _children(attention, found):
            child.process.kill()
            child.process.join()


def _children(attention: Child, found: list[Split]) -> list[Child]:
    return [attention, *(child for each in found for child in each.experts)]


def compare(split: Split, config: EngineConfig, asked: tuple[Request, ...]) -> dict[str, Any]:
    """Both ways, twice: the first time kernels are compiled and steps recorded."""
    split.ask(config, asked, in_one=True, times=2)
    expected, alone = split.attention.hear()
    split.ask(config, asked, times=2)
    found, seconds = split.attention.hear()
    return {
        "carrier": split.kind,
        "expert_actors": split.num_actors,
        "drafts": config.num_drafts,
        "micro_batches": config.micro_batches,
        "requests": len(asked),
        "same": sum(found[uid] == expected[uid] for uid in expected),
        "tokens": sum(map(len, expected.values())),
        "one_process_seconds": round(alone, 3),
        "split_seconds": round(seconds, 3),
    }


def killed(split: Split, config: EngineConfig, asked: tuple[Request, ...]) -> dict[str, Any]:
    """The last expert actor dies in the middle of steps; a step is lost, and its successor goes on."""
    split.ask(config, asked, times=2)
    expected, seconds = split.attention.hear()
    split.ask(config, asked)
    time.sleep(seconds / 2)
    at, last = time.monotonic(), split.num_actors - 1
    split.kill(last)
    lost = split.attention.hear()
    seen = time.monotonic() - at
    assert isinstance(lost, str), "it had come to its end before"
    split.start(last)
    split.ask(config, asked)
    found, _ = split.attention.hear()
    return {
        "carrier": split.kind,
        "killed": last,
        "seen_after_seconds": round(seen, 3),
        "lost": lost,
        "requests": len(asked),
        "same": sum(found[uid] == expected[uid] for uid in expected),
        "back_after_seconds": round(time.monotonic() - at, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=list(CASES), choices=get_args(CarrierKind))
    parser.add_argument("--gpus", nargs=2, type=int, default=[0, 1], help="of attention, of experts")
    parser.add_argument("--seconds", type=float, default=300, help="nothing is begun after so long")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    report: list[dict[str, Any]] = []
    asked, long = requests(24), requests(300)
    kinds = [(kind, CASES[kind][0][0]) for kind in options.kinds]
    with splits(kinds, (options.gpus[0], options.gpus[1])) as found:
        work = [(compare, each, config, asked) for each in found for _, config in CASES[each.kind]]
        work += [(killed, each, CASES[each.kind][0][1], long) for each in found if each.kind != "copy"]
        for what, each, config, those in work:
            if time.monotonic() > end:
                say("no time for the rest")
                break
            report.append(what(each, config, those))
            print(json.dumps(report[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(entry["same"] < entry["requests"] for entry in report))


if __name__ == "__main__":
    sys.exit(main())

"""Attention on one GPU, experts on another: what a layer of a decode step costs, beside both GPUs colocated.

    python -m benchmarks.split [--out FOLDER]             every case: table, JSON and PNG
    python -m benchmarks.split --experts 8 --batch 64     one GPU's share of a pool of 64, at one batch
    python -m benchmarks.split --draw RESULT.json         the picture of an earlier run

A full-width layer with experts, random weights, is run so often that it makes a step, captured whole in a
CUDA graph on either GPU. `--experts 256` is the layer as it is: one GPU reads 11.3 GB when all are touched.
With `--experts 8` each has the load that one GPU of 64 has (32 of attention and 32 with 8 experts each, or 64
colocated with 4 each): as many experts, and as many rows for each of them.

Before it times anything it compares what a stack of layers gives: split, colocated, and in one process.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.gpu_pairs import End, gpu_pair
from benchmarks.split_layers import LAYER, Layers, Settings
from benchmarks.split_report import Case, Compared, Row, draw, from_json, table, to_json
from benchmarks.split_sides import MOST_MICRO_BATCHES, STEP_SECONDS, Side
from cluster.demo import OFFICIAL_671B
from kernels.quantize_rows import quantize_rows
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts
from model.inputs import PAGE_SIZE
from workers.gpu_experts import Step, StreamRunner, rows_parcel, sums_parcel
from workers.transport.carrier import Carrier
from workers.transport.message import Message
from workers.transport.pairing import CarrierKind
from workers.transport.protocol import Deadline, Received
from workers.transport.slots import SlotPlan

_SILENT_SECONDS = 600.0  # of both sides, with 256 experts to make and kernels to compile
MOST_PAGES = 1 << 17


@dataclass(frozen=True)
class Job:
    """What both sides are to do."""

    experts: tuple[int, ...]
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    kinds: tuple[CarrierKind, ...]
    micro_batches: tuple[int, ...]
    colocated: tuple[int, ...]
    depth: int
    replays: int
    until: float  # of the clock that all processes share

    def cases(self, experts: int) -> list[Case]:
        return [Case(experts, context, batch) for context in self.contexts for batch in self.batches]


def main() -> None:
    options = _options()
    if options.draw:
        rows, _, about = from_json(options.draw.read_text())
        draw(rows, options.draw.with_suffix(".png"), about["title"])
        return
    job = Job(
        tuple(options.experts),
        tuple(options.context),
        tuple(options.batch),
        tuple(options.carriers),
        tuple(options.micro_batches),
        tuple(options.colocated),
        options.depth,
        options.replays,
        time.monotonic() + options.seconds,
    )
    compile_all(job, options.compilers)
    rows, compared = run(job)
    print(table(rows))
    if options.out and rows:
        title = f"A layer of a decode step on two GPUs: {torch.cuda.get_device_name(0)}"
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{options.name}.json").write_text(to_json(rows, compared, {"title": title}))
        draw(rows, options.out / f"{options.name}.png", title)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, nargs="*", default=[8, 256], help="routed ones of the layer")
    parser.add_argument("--context", type=int, nargs="*", default=[4096, 32768])
    parser.add_argument("--batch", type=int, nargs="*", default=[16, 64, 128, 256], help="on both GPUs")
    parser.add_argument("--carriers", nargs="*", default=get_args(CarrierKind), choices=get_args(CarrierKind))
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[1, 2, 3], help="of the split")
    parser.add_argument("--colocated", type=int, nargs="*", default=[1, 2], help="micro-batches of that")
    parser.add_argument("--depth", type=int, default=12, help="layers of a step")
    parser.add_argument("--replays", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=600, help="no case is begun after so long")
    parser.add_argument("--compilers", type=int, default=12, help="processes that compile kernels before")
    parser.add_argument("--out", type=Path, help="folder for JSON and PNG")
    parser.add_argument("--name", default="split_h100", help="of the files there")
    parser.add_argument("--draw", type=Path)
    return parser.parse_args()


def config_of(experts: int) -> ModelConfig:
    """The official model with so many routed experts, and groups as far as there are experts for them."""
    config = ModelConfig.load(OFFICIAL_671B)
    groups = min(config.n_group, experts // 2)
    return config.model_copy(
        update={
            "num_hidden_layers": LAYER + 1,
            "num_nextn_predict_layers": 0,
            "n_routed_experts": experts,
            "n_group": groups,
            "topk_group": min(config.topk_group, groups),
        }
    )


def run(job: Job) -> tuple[list[Row], list[Compared]]:
    """Both sides in processes of their own, each with its GPU alone, as Ray gives it to an actor."""
    rows: list[Row] = []
    compared: list[Compared] = []
    with gpu_pair(work, job) as pair:
        while (found := pair.hear(0, _SILENT_SECONDS)) is not None:
            if isinstance(found, Row):
                rows.append(found)
                print(table([found]).split("\n")[1], flush=True)
            else:
                compared.append(found)
                print(found, flush=True)
    return rows, compared


def work(end: End, job: Job) -> None:
    """One side; what side 0 finds goes to the parent as it comes."""
    carriers, runner = _pair(end, job), GpuRunner(end.device)
    for experts in job.experts:
        settings = _settings(job, end.device)
        side = Side(end.rank, config_of(experts), settings, EndpointWire(end), carriers, runner)
        for compared in _compare(side, job, experts):
            end.pipe.send(("ok", compared))
        for case in job.cases(experts):
            if not side.barrier(time.monotonic() < job.until):
                break
            for row in side.rows(case, job.kinds, job.micro_batches, job.colocated):
                end.pipe.send(("ok", row))
        del side
        torch.cuda.empty_cache()


def _settings(job: Job, device: torch.device) -> Settings:
    pages = min(MOST_PAGES, max(job.batches) * (max(job.contexts) // PAGE_SIZE))
    return Settings(job.depth, job.replays, max(job.batches), pages, device, "triton")


def _pair(end: End, job: Job) -> dict[str, Carrier]:
    config, most = config_of(max(job.experts)), max(job.batches)
    sums = sums_parcel(config, range(config.n_group), most)
    room = max(rows_parcel(config, most).num_bytes, sums.num_bytes)
    slots = SlotPlan(2 * MOST_MICRO_BATCHES, room)
    return {kind: end.pair(kind, slots, STEP_SECONDS) for kind in job.kinds}


def _compare(side: Side, job: Job, experts: int) -> Iterable[Compared]:
    """One layer deep and several; side 1 says nothing."""
    case = Case(experts, min(job.contexts), min(64, max(job.batches)))
    for depth in (1, 4):
        found = side.outputs(case, job.kinds, 2, depth, colocated=bool(job.colocated))
        expected = found.pop("one process", None)
        for name, value in found.items():
            yield Compared(experts, depth, name, _error(value, expected))


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


class EndpointWire:
    """A `Wire` over the endpoint by which the carriers were paired."""

    def __init__(self, end: End) -> None:
        self._end = end

    def tell(self, message: Message) -> None:
        self._end.endpoint.send(self._end.peer, message, Deadline.after(STEP_SECONDS))

    def hear(self) -> Message:
        event = self._end.endpoint.receive(Deadline.after(2 * STEP_SECONDS), self._end.peer)
        if not isinstance(event, Received):
            raise event
        return event.message


class GpuRunner(StreamRunner):
    """A `TimedRunner`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._zero: torch.cuda.Event | None = None
        self._last: torch.cuda.Event | None = None

    def launch(self, step: Step) -> torch.cuda.Event:
        self._last = super().launch(step)
        return self._last

    def finish(self) -> None:
        end = time.monotonic() + STEP_SECONDS
        while self._last and not self._last.query():
            if time.monotonic() > end:
                raise TimeoutError("a step on the GPU")
            time.sleep(50e-6)

    def stamp(self) -> Callable[[], float]:
        event = torch.cuda.Event(enable_timing=True)
        self.launch(event.record)
        first = self._zero = self._zero or event
        return lambda: first.elapsed_time(event) * 1e3


def compile_all(job: Job, processes: int) -> None:
    """Load Triton's disk cache with the kernels of all shapes, in processes side by side."""
    if not processes:
        return
    rows = {-(-batch // m) for batch in job.batches for m in job.micro_batches}
    rows |= {batch // m for batch in job.batches for m in job.micro_batches}
    rows |= {-(-batch // 2 // m) for batch in job.batches for m in job.colocated}
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=_choose_gpu) as pool:
        for failure in pool.map(partial(_compile, job), sorted(rows)):
            if failure:
                print(failure, flush=True)


def _choose_gpu() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = str(os.getpid() % 2)


def _compile(job: Job, num_rows: int) -> str:
    """Run attention, and experts of both layouts, once; of the fewest experts, as the weights take memory."""
    try:
        layers, everything, half = _small(job)
        config = layers.config
        for context in job.contexts:
            layers.switch.inner = everything
            layers.run(layers.parts(range(num_rows), context, 1), 1)
        for held, count in ((everything, num_rows), (half, 2 * num_rows)):
            x = torch.randn(count, config.hidden_size, device="cuda").to(torch.bfloat16)
            chosen = torch.arange(8, dtype=torch.int32, device="cuda").repeat(count, 1)
            plan = held.list_rows(chosen, torch.ones_like(chosen, dtype=torch.float32))
            held.block_sums(LAYER, quantize_rows(x, backend="triton"), plan)
        torch.cuda.synchronize()
    except Exception as failure:
        return f"{num_rows} rows: {failure!r}"[:300]
    return ""


@lru_cache
def _small(job: Job) -> tuple[Layers, FusedExperts, FusedExperts]:
    config = config_of(min(job.experts))
    layers = Layers(config, replace(_settings(job, torch.device("cuda", 0)), num_pages=1024))
    return layers, layers.experts(range(config.n_group)), layers.experts(range(config.n_group // 2))


if __name__ == "__main__":
    main()

"""Decode steps of an engine on a GPU: eagerly, as graphs, and as graphs that are launched ahead.

    python -m benchmarks.engine_steps                          5 layers of full width, 1, 16 and 64 sequences
    python -m benchmarks.engine_steps --batch 64 --drafts 1

Weights are random, and so is the context in the pages: nothing is prefilled. A step is what `Engine.step`
takes, from schedule to tokens.

step      milliseconds, the median of three runs
launch    of these, the host's until the step is launched
device    milliseconds of kernels and copies in a step
busy      their share of the steps' time while the profiler watches
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.layer import fill_pages
from model.graphs import DecodeGraphs
from model.pages import PageCache
from model.sampling_params import SamplingParams
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.runner import Flight
from workers.sequence import Request, Token

Mode = Literal["eager", "graphs", "ahead"]
DRAWN: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "top_k 40": {"top_k": 40}, "whole": {}}
MODEL = Path(__file__).resolve().parent.parent / "model" / "deepseek_v32"
_RUNS, _STEPS, _WATCHED, _ANSWER = 3, 15, 6, 256


@dataclass(frozen=True)
class Steps:
    """What steps of one kind take; times in milliseconds a step."""

    batch: int
    context: int
    drafts: int
    drawn: str
    mode: Mode
    step: float
    launch: float
    device: float
    busy: float


class InTurn(Engine):
    """Every step waits for the one before it."""

    def _launch_ahead(self, flight: Flight) -> Flight | None:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=5, help="decoder layers, the first three dense")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 16, 64], help="sequences that decode")
    parser.add_argument("--context", type=int, default=4096, help="tokens of each")
    parser.add_argument("--drafts", type=int, nargs="*", default=[0, 1], help="that each verifies a step")
    parser.add_argument("--out", type=Path, help="folder for the figures as JSON and PNG")
    options = parser.parse_args()
    bench = Bench(options.layers, options.context, max(options.batch))
    about = {"layers": options.layers, "device": torch.cuda.get_device_name()}
    results: list[Steps] = []
    for batch in options.batch:
        for drafts in options.drafts:
            for drawn in DRAWN if not drafts else ["greedy"]:
                found = bench.measure(batch, drafts, drawn)
                print(table(found), flush=True)
                results += found
                if options.out:
                    save(options.out, results, about)
    print(table(results))
    if options.out:
        draw(results, options.out / "engine_steps.png", f"{options.layers} layers, {about['device']}")


class Bench:
    """A model of some layers, and pages full of something."""

    def __init__(self, layers: int, context: int, most: int) -> None:
        options = ModelOptions(
            dtype="bfloat16", pages="fp8", kernels="triton", device="cuda", weights="random", layers=layers
        )
        self.model, self.context = LocalModel(MODEL, options), context
        self.cache: PageCache = self.model.cache(most * (context + _ANSWER + 64))
        for pages in self.cache.layers:
            fill_pages(pages, self.model.config)

    def measure(self, batch: int, drafts: int, drawn: str) -> list[Steps]:
        """All modes; with drafts a step needs the host's own arithmetic before the next one."""
        graphs = self.model.graphs(self.cache)
        assert graphs
        graphs.warm_up(batch, self.context + _ANSWER, 1 + drafts)
        modes: list[Mode] = ["eager", "graphs", "ahead"] if not drafts else ["eager", "graphs"]
        found, tokens = [], []
        for mode in modes:
            engine = self._engine(mode, batch, drafts, drawn, None if mode == "eager" else graphs)
            steps, answers = self._measure(engine)
            found.append(Steps(batch, self.context, drafts, drawn, mode, *steps))
            tokens.append(answers)
        if not drafts:
            for uid, answer in tokens[1].items():
                assert answer == tokens[2][uid][: len(answer)], "launched ahead, other tokens"
        return found

    def _engine(self, mode: Mode, batch: int, drafts: int, drawn: str, graphs: DecodeGraphs | None) -> Engine:
        kind = Engine if mode == "ahead" else InTurn
        engine = kind(self.model.decoder, self.cache, EngineConfig(num_drafts=drafts), b"s" * 32, graphs)
        generator = torch.Generator().manual_seed(0)
        for number in range(batch):
            ids = torch.randint(self.model.config.vocab_size, (self.context,), generator=generator).tolist()
            params: dict[str, Any] = {"max_tokens": _ANSWER, "seed": number, "ignore_eos": True}
            request = Request(str(number), tuple(ids), SamplingParams(**params, **DRAWN[drawn]))
            engine.reserve(request)
            engine.adopt(request.uid, Token(request.uid, ids[0], self.context))
        return engine

    def _measure(self, engine: Engine) -> tuple[tuple[float, float, float, float], dict[str, list[int]]]:
        tokens = [token for _ in range(4) for token in engine.step()]  # kernels and graphs are made
        seconds = []
        for _ in range(_RUNS):
            torch.cuda.synchronize()
            started = time.perf_counter()
            tokens += [token for _ in range(_STEPS) for token in engine.step()]
            seconds.append((time.perf_counter() - started) / _STEPS)
        launch, device, busy = _watch(engine)
        answers: dict[str, list[int]] = {}
        for token in tokens:
            answers.setdefault(token.uid, []).append(token.token_id)
        return (statistics.median(seconds) * 1e3, launch, device, busy), answers


def _watch(engine: Engine) -> tuple[float, float, float]:
    """Milliseconds of launching and of the device, and the share of the time in which the device works."""
    launches: list[float] = []

    def timed(launch: Callable[..., Flight], *args: Any) -> Flight:
        started = time.perf_counter()
        flight = launch(*args)
        launches.append(time.perf_counter() - started)
        return flight

    for name in ("launch", "launch_ahead"):
        setattr(engine._runner, name, partial(timed, getattr(engine._runner, name)))
    for _ in range(_WATCHED):
        engine.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True
    ) as profile:
        started = time.perf_counter()
        for _ in range(_WATCHED):
            engine.step()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    ranges = [e.time_range for e in profile.events() if e.device_type == DeviceType.CUDA]
    device = sum(each.end - each.start for each in ranges) / 1e6
    return statistics.median(launches[:_WATCHED]) * 1e3, device / _WATCHED * 1e3, device / seconds


def table(results: Sequence[Steps]) -> str:
    head = f"{'batch':>5} {'context':>7} {'drafts':>6} {'drawn':>9} {'mode':>7}"
    lines = [f"{head} {'step ms':>8} {'launch ms':>9} {'device ms':>9} {'busy':>5}"]
    for r in results:
        case = f"{r.batch:>5} {r.context:>7} {r.drafts:>6} {r.drawn:>9} {r.mode:>7}"
        lines.append(f"{case} {r.step:>8.2f} {r.launch:>9.2f} {r.device:>9.2f} {r.busy:>5.0%}")
    return "\n".join(lines)


def save(folder: Path, results: Sequence[Steps], about: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"about": about, "steps": [asdict(each) for each in results]}
    (folder / "engine_steps.json").write_text(json.dumps(facts, indent=1))


def draw(results: Sequence[Steps], path: Path, title: str) -> None:
    """Bars: each case's steps by mode, and what the device needs of them."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    cases = list(dict.fromkeys((r.batch, r.drafts, r.drawn) for r in results))
    figure = Figure(figsize=(10, 0.6 * len(cases) + 1.5), layout="constrained")
    axes = figure.add_subplot()
    for offset, (mode, color) in enumerate(
        (("eager", "#b0b7c0"), ("graphs", "#6f9bd1"), ("ahead", "#2b5c9e"))
    ):
        chosen = [(cases.index((r.batch, r.drafts, r.drawn)), r) for r in results if r.mode == mode]
        places = [place + 0.27 * (offset - 1) for place, _ in chosen]
        axes.barh(places, [r.step for _, r in chosen], 0.25, color=color, label=mode)
        axes.plot([r.device for _, r in chosen], places, "k|", markersize=9)
    axes.plot([], [], "k|", label="device")
    axes.set_yticks(range(len(cases)), [f"{b} x {1 + d} rows, {drawn}" for b, d, drawn in cases])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds a step")
    axes.set_title(title)
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()

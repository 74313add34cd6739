"""Several times more requests than a cluster can bear: what it still does well, and how it refuses the rest.

    python -m benchmarks.overload [--config manifests/overload.yaml] [--seconds 300] [--times 4] [--rate 2]
                                  [--ttft 1.0] [--tpot 0.1] [--out benchmarks/results]

Starts `eightfold serve`, searches the highest rate at which 99 % of the requests meet the objectives,
measures the goodput at whichever rate of the search had the most of it, and offers `times` that rate, open
loop, half of it over HTTP and half over gRPC. Goodput counts whole answers within the objectives that ended
while the load was offered, after its first seconds.

Writes `overload.json` and `overload.png`, and exits with 1 where an asked-for figure is not met: goodput of
90 % of the peak, refusals within 100 ms at the median and each with its Retry-After, memory that does not
grow.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.served import ROOT, Served, served
from cluster.bench.arrivals import Arrivals, RateProfile
from cluster.bench.capacity import Trial, find_capacity
from cluster.bench.distribution import Distribution
from cluster.bench.load import LoadLimits
from cluster.bench.measure import Objectives, Percentiles
from cluster.bench.outcome import Outcome
from cluster.bench.plan import Shapes, make_plan
from cluster.bench.reading import Asking
from cluster.bench.run import Run, Setup, probe, run_once

REFUSALS = ("http 503", "grpc UNAVAILABLE")
GOODPUT, REFUSAL_SECONDS, GROWTH = 0.9, 0.1, 0.05  # what is asked for
ATTAINMENT, PRECISION, TRIALS = 0.99, 0.15, 8
SETTLE_SECONDS = 5.0  # of each load, which do not count
PAUSE_SECONDS = 3.0  # between two loads, for the first to be gone
SHAPES = Shapes(
    prompt_tokens=Distribution.parse("32..200", "prompt_tokens", 1),
    answer_tokens=Distribution.parse("32..64", "answer_tokens", 1),
    turns=Distribution.parse("1", "turns", 1),
    think=Distribution.parse("0", "think", 0),
)


@dataclass(frozen=True)
class Refusals:
    """Requests that were refused: their latency, and how many of them did not say when to come again."""

    count: int
    seconds: Percentiles | None
    without_retry_after: int


@dataclass(frozen=True)
class Figures:
    """One load.

    Attributes:
        rate: offered, requests a second.
        goodput: whole answers within the objectives that ended while it was offered, a second.
        attainment: share of all requests that met the objectives.
        refusals: by protocol.
        errors: all that were not answered, by kind.
        late: by how much the generator was.
    """

    rate: float
    seconds: float
    due: int
    goodput: float
    attainment: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    refusals: dict[str, Refusals]
    errors: dict[str, int]
    late: Percentiles | None


def figures(runs: dict[str, Run], rate: float, seconds: float, objectives: Objectives) -> Figures:
    """What came of the loads of both protocols together."""
    outcomes = [outcome for run in runs.values() for outcome in run.progress.outcomes]
    counted = [outcome for outcome in outcomes if outcome.planned >= SETTLE_SECONDS]
    met = [outcome for outcome in outcomes if objectives.met(outcome)]
    errors: defaultdict[str, int] = defaultdict(int)
    for outcome in counted:
        if outcome.error:
            errors[outcome.error] += 1
    return Figures(
        rate=rate,
        seconds=seconds,
        due=len(counted),
        goodput=sum(SETTLE_SECONDS <= one.ended < seconds for one in met) / (seconds - SETTLE_SECONDS),
        attainment=sum(one.planned >= SETTLE_SECONDS for one in met) / max(1, len(counted)),
        ttft=Percentiles.of(one.ttft for one in counted if one.error is None and one.ttft is not None),
        tpot=Percentiles.of(one.tpot for one in counted if one.error is None and one.tpot is not None),
        refusals={kind: refusals(counted, kind) for kind in REFUSALS},
        errors=dict(errors),
        late=Percentiles.of(
            [delay for run in runs.values() for delay in run.progress.loop_delays]
            + [outcome.late for outcome in outcomes if outcome.late is not None]
        ),
    )


def refusals(outcomes: Sequence[Outcome], kind: str) -> Refusals:
    """Those of one kind; an answer that broke off after its first token is none."""
    found = [one for one in outcomes if one.error == kind and not one.moments and one.sent is not None]
    return Refusals(
        len(found),
        Percentiles.of(one.ended - one.sent for one in found if one.sent is not None),
        sum(one.retry_after is None for one in found),
    )


def growth(samples: Sequence[float]) -> float:
    """By which share the last fifth is above the second: the first one fills caches."""
    fifth = max(1, len(samples) // 5)
    early, late = samples[fifth : 2 * fifth] or samples, samples[-fifth:]
    return (sum(late) / len(late)) / (sum(early) / len(early)) - 1


def misses(peak: Figures, over: Figures, memory: dict[str, list[float]]) -> list[str]:
    """Which of the figures asked for are not met."""
    found = []
    if over.goodput < GOODPUT * peak.goodput:
        found.append(f"goodput is {over.goodput / peak.goodput:.0%} of the peak; {GOODPUT:.0%} is asked for")
    for kind, refused in over.refusals.items():
        if not refused.seconds:
            found.append(f"nothing was refused ({kind})")
            continue
        if refused.seconds.p50 > REFUSAL_SECONDS:
            found.append(f"{kind}: {refused.seconds.p50 * 1e3:.0f} ms at the median")
        if refused.without_retry_after:
            found.append(
                f"{kind}: {refused.without_retry_after} of {refused.count} do not say when to come again"
            )
    for part, samples in memory.items():
        if growth(samples) > GROWTH:
            found.append(f"memory of {part} grew by {growth(samples):.1%}")
    return found


# Memory


def memory_by_part(root: int) -> dict[str, float]:
    """Resident MiB of a process and all below it, by what they are."""
    parents, found = {}, defaultdict(float)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
    for pid in parents:
        if part := _part(pid, root, parents):
            try:
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            except OSError:
                continue
            found[part] += pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return dict(found)


def _part(pid: int, root: int, parents: dict[int, int]) -> str | None:
    if pid == root:
        return "gateway"
    above = pid
    while above in parents and above != root:
        above = parents[above]
    if above != root:
        return None
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return None
    names = {"AttentionActor": "attention", "ExpertActor": "experts"}
    return next((part for name, part in names.items() if name in title), "Ray and engines")


# Loads


class Load:
    """Offers loads to one cluster, each with other texts."""

    def __init__(self, cluster: Served, objectives: Objectives) -> None:
        self._cluster, self._objectives = cluster, objectives
        self._seed = 0

    async def offer(self, rate: float, seconds: float) -> Figures:
        """Half of the rate over each protocol."""
        self._seed += 1
        setups = {name: self._setup(url) for name, url in self._urls().items()}
        known = {name: await probe(setup, self._seed) for name, setup in setups.items()}
        plans = {
            name: make_plan(
                Arrivals("poisson", RateProfile(((0.0, rate / 2),)), seconds),
                SHAPES,
                100 * self._seed + index,
            )
            for index, name in enumerate(setups)
        }
        runs = await asyncio.gather(
            *(
                run_once(setup, known[name], plans[name], 100 * self._seed + index, lambda progress: None)
                for index, (name, setup) in enumerate(setups.items())
            )
        )
        return figures(dict(zip(setups, runs, strict=True)), rate, seconds, self._objectives)

    def trial(self, rate: float, seconds: float) -> Trial:
        time.sleep(PAUSE_SECONDS)
        found = asyncio.run(self.offer(rate, seconds))
        print(row("trial", found), flush=True)
        is_met = found.attainment >= ATTAINMENT
        return Trial(rate=rate, attainment=found.attainment, goodput=found.goodput, is_met=is_met)

    async def watched(self, rate: float, seconds: float) -> tuple[Figures, dict[str, list[float]]]:
        """The same, with the memory of each part in MiB, once a second."""
        memory: defaultdict[str, list[float]] = defaultdict(list)

        async def watch() -> None:
            while True:
                for part, mib in (await asyncio.to_thread(memory_by_part, self._cluster.pid)).items():
                    memory[part].append(mib)
                await asyncio.sleep(1.0)

        watching = asyncio.create_task(watch())
        try:
            return await self.offer(rate, seconds), dict(memory)
        finally:
            watching.cancel()

    def _urls(self) -> dict[str, str]:
        return {"http": self._cluster.http, "grpc": self._cluster.grpc}

    def _setup(self, url: str) -> Setup:
        asking = Asking(api="completions", temperature=0.0, ignore_eos=True, key=None)
        limits = LoadLimits(timeout=120.0, max_open=10_000)
        return Setup(
            url=url, status_url=None, asking=asking, model=None, shared_tokens=0, limits=limits, processes=1
        )


# Report

HEAD = (
    f"{'':10}{'offered/s':>10}{'goodput/s':>10}{'met':>8}"
    f"{'TTFT p50':>10}{'p99':>8}{'TPOT p50':>10}{'p99':>8}  ms"
)


def row(name: str, found: Figures) -> str:
    """A line of the table."""
    times = "".join(
        f"{getattr(one, rank) * 1e3:{width}.0f}" if one else " " * width
        for one in (found.ttft, found.tpot)
        for rank, width in (("p50", 10), ("p99", 8))
    )
    return f"{name:10}{found.rate:10.2f}{found.goodput:10.2f}{found.attainment:8.1%}{times}"


def table(peak: Figures, over: Figures, memory: dict[str, list[float]]) -> str:
    """All of it for people."""
    lines = [HEAD, row("peak", peak), row("overload", over), ""]
    lines.append(f"goodput under overload: {over.goodput / max(peak.goodput, 1e-9):.0%} of the peak")
    for kind, refused in over.refusals.items():
        if refused.seconds:
            p50, p99 = refused.seconds.p50 * 1e3, refused.seconds.p99 * 1e3
            told = f"{refused.without_retry_after} without Retry-After"
            lines.append(
                f"refused, {kind}: {refused.count} in {p50:.0f} ms (p50), {p99:.0f} ms (p99); {told}"
            )
    lines.append(f"all that was not answered: {over.errors}")
    for part, samples in sorted(memory.items()):
        span = f"{samples[0]:,.0f} MiB at first, {samples[-1]:,.0f} at last, {max(samples):,.0f} at most"
        lines.append(f"memory of {part}: {span}; {growth(samples):+.1%}")
    if over.late:
        lines.append(f"the generator was {over.late.p99 * 1e3:.0f} ms late (p99)")
    return "\n".join(lines)


def draw(peak: Figures, over: Figures, memory: dict[str, list[float]], path: Path) -> None:
    """Rates beside each other, and memory over time."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, sizes = figure.subplots(1, 2)
    names = ["peak", f"{over.rate / peak.rate:g} times"]
    places = range(len(names))
    rates.bar([at - 0.2 for at in places], [peak.rate, over.rate], 0.4, label="offered")
    rates.bar([at + 0.2 for at in places], [peak.goodput, over.goodput], 0.4, label="goodput")
    rates.set_xticks(list(places), names)
    rates.set_ylabel("requests a second")
    for part, samples in sorted(memory.items()):
        sizes.plot(samples, label=part)
    sizes.set_ylim(bottom=0)
    sizes.set_xlabel("seconds of overload")
    sizes.set_ylabel("resident MiB")
    for axes in (rates, sizes):
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "manifests" / "overload.yaml")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--times", type=float, default=4.0)
    parser.add_argument("--rate", type=float, default=2.0, help="of the first trial")
    parser.add_argument("--trial-seconds", type=float, default=25.0)
    parser.add_argument("--peak-seconds", type=float, default=60.0)
    parser.add_argument("--ttft", type=float, default=1.0)
    parser.add_argument("--tpot", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--name", default="overload")
    options = parser.parse_args()
    objectives = Objectives(ttft=options.ttft, tpot=options.tpot)
    loaded = os.getloadavg()
    with served(options.config) as cluster:
        load = Load(cluster, objectives)
        asyncio.run(load.offer(options.rate, SETTLE_SECONDS + 5.0))  # compiles, fills caches
        print(HEAD)
        found = find_capacity(
            lambda rate: load.trial(rate, options.trial_seconds), options.rate, PRECISION, TRIALS
        )
        if found.highest is None:
            raise SystemExit("no rate meets the objectives here")
        time.sleep(PAUSE_SECONDS)
        best = max(found.trials, key=lambda trial: trial.goodput).rate
        peak = asyncio.run(load.offer(best, options.peak_seconds))
        print(row("peak", peak), flush=True)
        time.sleep(PAUSE_SECONDS)
        over, memory = asyncio.run(load.watched(options.times * best, options.seconds))
    print(f"\n{table(peak, over, memory)}")
    missed = misses(peak, over, memory)
    result: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "loaded_before": loaded,
        "objectives": asdict(objectives),
        "trials": [asdict(trial) for trial in found.trials],
        "peak": asdict(peak),
        "overload": asdict(over),
        "memory_mib": memory,
        "missed": missed,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.name}.json").write_text(json.dumps(result, indent=1))
    draw(peak, over, memory, options.out / f"{options.name}.png")
    for problem in missed:
        print(f"NOT MET: {problem}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())

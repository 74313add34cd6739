"""`eightfold bench`: load for a server, and what it makes of it."""

import asyncio
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.bench.arrivals import Arrivals, RateProfile
from cluster.bench.capacity import Capacity, Trial, find_capacity
from cluster.bench.distribution import Distribution
from cluster.bench.load import LoadLimits
from cluster.bench.measure import Objectives, summarise, void_reasons
from cluster.bench.outcome import Outcome
from cluster.bench.page import render
from cluster.bench.plan import Session, Shapes, make_plan, read_trace
from cluster.bench.reading import Asking, Failed
from cluster.bench.report import as_text, result_json
from cluster.bench.run import Known, ProgressLine, Run, Setup, probe, run_once
from cluster.cli import EXIT_FAILED
from model.errors import RequestError

_PAUSE_SECONDS = 1.0  # between trials: what was given up leaves the server's pages


def run(options: Namespace) -> int:
    """One run, or a search for the highest rate; writes both files, prints the figures."""
    bench = Bench(options)
    try:
        result = bench.search() if options.find_capacity else bench.measure()
    except (Failed, TimeoutError) as error:
        reason = str(error) or f"no answer within {options.timeout:g} s"
        print(f"eightfold bench: {options.url}: {reason}", file=sys.stderr)
        return EXIT_FAILED
    _write(options.json, json.dumps(result))
    _write(options.html, render(result))
    print(as_text(result))
    print(f"written: {options.json}, {options.html}", file=sys.stderr)
    return EXIT_FAILED if result["void"] or not result["summary"]["completed"] else 0


class Bench:
    """What the options ask for, checked before anything is sent.

    Raises:
        RequestError: an option is wrong, or two do not go together.
    """

    def __init__(self, options: Namespace) -> None:
        self._options = options
        self._objectives = Objectives(
            ttft=options.ttft_objective, tpot=options.tpot_objective, e2e=options.e2e_objective
        )
        self._setup = _setup(options)
        self._arrivals = Arrivals(
            options.arrivals,
            RateProfile.parse(options.rate),
            options.duration,
            options.shape,
            options.burst_size,
        )
        self._shapes = Shapes(
            prompt_tokens=Distribution.parse(options.prompt_tokens, "--prompt-tokens", 1),
            answer_tokens=Distribution.parse(options.answer_tokens, "--answer-tokens", 1),
            turns=Distribution.parse(options.turns, "--turns", 1),
            think=Distribution.parse(options.think, "--think", 0),
        )
        self._trace = read_trace(options.trace) if options.trace else None
        _check(options, self._objectives)

    def measure(self) -> dict[str, Any]:
        """One run.

        Raises:
            Failed: the server does not answer.
        """
        sessions = self._trace or make_plan(self._arrivals, self._shapes, self._options.seed)
        if not sessions:
            raise RequestError("--duration", "is over before the first arrival")
        return self._result(self._run(self._known(), sessions, self._options.seed))

    def search(self) -> dict[str, Any]:
        """Trials at rising and falling rates; the result is of the highest that met the objectives.

        Raises:
            Failed: the server does not answer.
        """
        options, runs, known = self._options, dict[float, Run](), self._known()

        def trial(rate: float) -> Trial:
            if runs:
                time.sleep(_PAUSE_SECONDS)
            # Other texts each time: the server may still hold those of the trial before.
            found, runs[rate] = self._trial(known, rate, options.seed + len(runs))
            _say(_trial_text(found))
            return found

        first = self._arrivals.profile.points[0][1]
        capacity = find_capacity(trial, first, options.precision, options.max_trials)
        shown = capacity.trials[-1].rate if capacity.highest is None else capacity.highest
        print(_capacity_text(capacity))
        return self._result(runs[shown], capacity)

    def _trial(self, known: Known, rate: float, seed: int) -> tuple[Trial, Run]:
        options = self._options
        sessions = make_plan(replace(self._arrivals, profile=RateProfile(((0.0, rate),))), self._shapes, seed)
        due = sum(len(session.turns) for session in sessions if session.at >= options.warmup)
        if not due:
            raise RequestError("--duration", f"holds no arrival after the warm-up at {rate:.3g}/s")
        misses = _Misses(self._objectives, options.warmup, (1 - options.attainment) * due)
        done = self._run(known, sessions, seed, misses)
        progress = done.progress
        summary = summarise(progress.outcomes, self._objectives, options.warmup, progress.loop_delays)
        void = void_reasons(summary, options.max_lateness)
        remark = "; ".join([f"given up after {misses.count} misses"] * misses.too_many + void)
        # What is known of a trial that was given up: no more than this share can have met them.
        attainment = max(0.0, 1 - misses.count / due) if misses.too_many else summary.attainment
        is_met = attainment >= options.attainment and not void
        return Trial(
            rate=rate, attainment=attainment, goodput=summary.goodput, is_met=is_met, remark=remark
        ), done

    def _known(self) -> Known:
        return asyncio.run(probe(self._setup, self._options.seed))

    def _run(
        self,
        known: Known,
        sessions: list[Session],
        seed: int,
        is_hopeless: Callable[[Outcome], bool] = lambda outcome: False,
    ) -> Run:
        due = sum(len(session.turns) for session in sessions)
        line = ProgressLine(_write_error, sys.stderr.isatty(), due)
        try:
            return asyncio.run(run_once(self._setup, known, sessions, seed, line, is_hopeless))
        finally:
            line.clear()

    def _result(self, run: Run, capacity: Capacity | None = None) -> dict[str, Any]:
        options = self._options
        said = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(options).items()
            if name != "command"
        }
        return result_json(run, said, self._objectives, options.warmup, options.max_lateness, capacity)


class _Misses:
    """Counts requests that missed an objective, and says when they are too many.

    Args:
        allowed: so many may.
    """

    def __init__(self, objectives: Objectives, warmup: float, allowed: float) -> None:
        self._objectives, self._warmup, self._allowed = objectives, warmup, allowed
        self.count = 0

    def __call__(self, outcome: Outcome) -> bool:
        self.count += outcome.planned >= self._warmup and not self._objectives.met(outcome)
        return self.too_many

    @property
    def too_many(self) -> bool:
        # A share such as 0.99 is no exact number: one part in a million is no miss.
        return self.count > self._allowed + 1e-6


def _setup(options: Namespace) -> Setup:
    is_http = not options.url.startswith("grpc")
    return Setup(
        url=options.url,
        status_url=options.status_url or (options.url if is_http else None),
        asking=Asking(
            api=options.api,
            temperature=options.temperature,
            ignore_eos=not options.stop_at_eos,
            key=_key(options.key_file) if options.key_file else None,
        ),
        model=options.model,
        shared_tokens=options.shared_prefix,
        limits=LoadLimits(timeout=options.timeout, max_open=options.max_open),
        processes=options.processes,
    )


def _check(options: Namespace, objectives: Objectives) -> None:
    for name in (
        "duration", "timeout", "max_open", "processes", "shape", "burst_size", "precision", "max_lateness",
        "max_trials",
    ):  # fmt: skip
        if not getattr(options, name) > 0:
            raise RequestError(f"--{name.replace('_', '-')}", "takes a number above 0")
    for name in ("warmup", "shared_prefix", "seed"):
        if getattr(options, name) < 0:
            raise RequestError(f"--{name}", "takes a number from 0")
    for path in (options.json, options.html):
        if not path.parent.is_dir():
            raise RequestError(str(path), "cannot be written: there is no such folder")
    if not 0 < options.attainment <= 1:
        raise RequestError("--attainment", "takes a share above 0, at most 1")
    if options.find_capacity and not objectives:
        raise RequestError("--find-capacity", "needs an objective, such as --ttft-objective 1")
    if options.find_capacity and (options.trace or "," in options.rate):
        raise RequestError("--find-capacity", "starts from one --rate, without a trace or a ramp")


def _key(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError as error:
        raise RequestError("--key-file", f"{path}: {error.strerror}") from None


def _trial_text(trial: Trial) -> str:
    state = "met" if trial.is_met else "not met"
    remark = f" ({trial.remark})" if trial.remark else ""
    return f"{trial.rate:8.3f}/s  {trial.attainment:6.1%} within objectives: {state}{remark}"


def _capacity_text(capacity: Capacity) -> str:
    if capacity.highest is None:
        return f"capacity: no rate tried meets the objectives; {capacity.ended}"
    above = f", {capacity.lowest_failed:.3f}/s does not" if capacity.lowest_failed else ""
    return f"capacity: {capacity.highest:.3f}/s meets the objectives{above}; {capacity.ended}"


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error)) from None


def _say(text: str) -> None:
    print(text, flush=True)


def _write_error(text: str) -> None:
    print(text, end="", file=sys.stderr, flush=True)

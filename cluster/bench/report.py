"""The result as one JSON object, and as a page of text."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from cluster.bench.capacity import Capacity
from cluster.bench.measure import Objectives, Summary, gaps, summarise, void_reasons
from cluster.bench.outcome import Outcome
from cluster.bench.run import Run
from cluster.bench.series import series

Json = dict[str, Any]

FORMAT, VERSION = "eightfold-bench", 1

_COLUMNS = (
    "session", "turn", "planned", "sent", "ended", "ttft", "tpot", "e2e", "asked_tokens", "prompt_tokens",
    "cached_tokens", "answer_tokens", "error",
)  # fmt: skip


def result_json(
    run: Run, settings: Json, objectives: Objectives, warmup: float, max_lateness: float,
    capacity: Capacity | None = None,
) -> Json:  # fmt: skip
    """Everything about a run: settings, figures, columns over time, and one row a request.

    Seconds everywhere. `void` says why the figures do not count; empty where they do.
    """
    progress = run.progress
    outcomes = sorted(progress.outcomes, key=lambda outcome: (outcome.planned, outcome.session))
    summary = summarise(outcomes, objectives, warmup, progress.loop_delays)
    counted = [outcome for outcome in outcomes if outcome.planned >= warmup]
    return {
        "format": FORMAT,
        "version": VERSION,
        "started": run.started,
        "model": run.known.model,
        "settings": settings,
        "objectives": asdict(objectives),
        "tokens_per_word": run.known.cost.per_word if run.known.cost else None,
        "notes": _notes(run, summary),
        "void": void_reasons(summary, max_lateness),
        "summary": asdict(summary),
        "distribution": _distribution(counted),
        "series": series(outcomes),
        "server": {"not_offered": run.view.not_offered, "samples": run.view.columns()},
        "failures": _failures(counted),
        "capacity": asdict(capacity) if capacity else None,
        "requests": {name: [getattr(outcome, name) for outcome in outcomes] for name in _COLUMNS},
    }


def _notes(run: Run, summary: Summary) -> list[str]:
    notes = []
    if run.known.cost is None:
        notes.append("the server counts no tokens: a word of a prompt was taken for one")
    if not summary.is_counted:
        notes.append("not every answer has its tokens counted: events with text stand for them")
    if summary.short_answers:
        notes.append(
            f"{summary.short_answers} answers are shorter than asked for: the server ended them earlier"
        )
    if summary.cached_tokens:
        share = summary.cached_tokens / max(summary.prompt_tokens, 1)
        notes.append(f"{share:.0%} of the prompts' tokens were found in the server's cache")
    return notes


def _distribution(counted: Sequence[Outcome]) -> dict[str, list[float]]:
    """Each latency at the percentiles 0, 1, .. 100; empty where there is none."""
    whole = [outcome for outcome in counted if outcome.error is None]
    values = {
        "ttft": np.array([outcome.ttft for outcome in whole if outcome.ttft is not None]),
        "tpot": np.array([outcome.tpot for outcome in whole if outcome.tpot is not None]),
        "itl": gaps(whole),
        "e2e": np.array([outcome.e2e for outcome in whole if outcome.e2e is not None]),
    }
    return {
        name: [float(value) for value in np.percentile(found, range(101))] if found.size else []
        for name, found in values.items()
    }


def _failures(counted: Sequence[Outcome]) -> dict[str, Json]:
    """By kind: how many, and what the first said."""
    found: dict[str, Json] = {}
    for outcome in counted:
        if outcome.error is not None:
            entry = found.setdefault(outcome.error, {"count": 0, "first": outcome.detail})
            entry["count"] += 1
    return found


def as_text(result: Json) -> str:
    """The figures for a terminal."""
    summary = result["summary"]
    lines = [
        f"{summary['due']} requests due in {summary['duration']:.1f} s, {summary['completed']} answered, "
        f"{sum(summary['errors'].values())} failed",
        f"offered {summary['offered']:.2f}/s, answered {summary['request_rate']:.2f}/s, "
        f"{summary['answer_token_rate']:,.0f} tokens/s, {summary['in_flight']:.1f} open on average",
    ]
    if any(limit is not None for limit in result["objectives"].values()):
        lines.append(f"goodput {summary['goodput']:.2f}/s; {summary['attainment']:.1%} met the objectives")
    lines += [
        "",
        f"{'ms':<6}" + "".join(f"{name:>10}" for name in ("mean", "p50", "p90", "p95", "p99", "max")),
    ]
    for name in ("ttft", "tpot", "itl", "e2e"):
        lines.append(f"{name.upper():<6}" + _cells(summary[name]))
    for kind, entry in result["failures"].items():
        lines.append(f"{entry['count']} x {kind}" + (f": {entry['first']}" if entry["first"] else ""))
    lines += [f"note: {note}" for note in result["notes"]]
    if result["server"]["not_offered"]:
        lines.append(f"note: the server's own view: {result['server']['not_offered']}")
    lines += [f"VOID: {reason}" for reason in result["void"]]
    return "\n".join(lines)


def _cells(found: Json | None) -> str:
    if found is None:
        return f"{'-':>10}" * 6
    return "".join(f"{found[name] * 1e3:>10.1f}" for name in ("mean", "p50", "p90", "p95", "p99", "max"))

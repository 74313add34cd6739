"""Figures out of outcomes, defined as the field's tools define them (docs/bench.md)."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cluster.bench.outcome import Outcome

Floats = npt.NDArray[np.float64]

PERCENTILES = (50, 90, 95, 99)


@dataclass(frozen=True, kw_only=True)
class Objectives:
    """Seconds that a request may take at most; None where it does not matter."""

    ttft: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __bool__(self) -> bool:
        return any(limit is not None for limit in (self.ttft, self.tpot, self.e2e))

    def met(self, outcome: Outcome) -> bool:
        """Whether a whole answer came, within all of them. An answer of one token meets any TPOT."""
        pairs = (outcome.ttft, self.ttft), (outcome.tpot or 0.0, self.tpot), (outcome.e2e, self.e2e)
        return outcome.error is None and all(
            limit is None or (value is not None and value <= limit) for value, limit in pairs
        )


@dataclass(frozen=True, kw_only=True)
class Percentiles:
    """Of one quantity; in its unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float] | Floats) -> "Percentiles | None":
        """None where there are no values. Between two values, linear."""
        found = values if isinstance(values, np.ndarray) else np.fromiter(values, dtype=np.float64)
        if not found.size:
            return None
        ranks = (float(rank) for rank in np.percentile(found, PERCENTILES))
        names = (f"p{rank}" for rank in PERCENTILES)
        return cls(
            count=found.size, mean=float(found.mean()), max=float(found.max()),
            **dict(zip(names, ranks, strict=True)),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in figures. Rates are of one second, of the time from `begin` to the last answer's end.

    Attributes:
        begin, duration: seconds; what is due before `begin` is warm-up and counts nowhere.
        due, completed: requests; errors: the others, by kind.
        offered: requests due, per second between the first and the last.
        goodput: requests that met all objectives, per second; attainment: their share of all that were due.
        short_answers: whole answers with fewer tokens than asked for.
        is_counted: whether the server counts tokens; else events with text stand for them.
        in_flight: the mean number of open requests.
    """

    begin: float
    duration: float
    due: int
    completed: int
    errors: dict[str, int]
    offered: float
    request_rate: float
    goodput: float
    attainment: float
    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    answer_token_rate: float
    prompt_token_rate: float
    short_answers: int
    is_counted: bool
    in_flight: float
    ttft: Percentiles | None
    tpot: Percentiles | None
    itl: Percentiles | None
    e2e: Percentiles | None
    prompt_length: Percentiles | None
    answer_length: Percentiles | None
    late: Percentiles | None
    loop_delay: Percentiles | None


def summarise(
    outcomes: Sequence[Outcome], objectives: Objectives, warmup: float, loop_delays: Sequence[float]
) -> Summary:
    """The figures of a run.

    Args:
        outcomes: all of them.
        objectives: what goodput counts.
        warmup: seconds; requests due before are left out.
        loop_delays: how late the generator's loop was.
    """
    counted = [outcome for outcome in outcomes if outcome.planned >= warmup]
    whole = [outcome for outcome in counted if outcome.error is None]
    end = max((outcome.ended for outcome in counted), default=warmup)
    due = [outcome.planned for outcome in counted]
    duration = max(end - warmup, 1e-9)
    num_met = sum(map(objectives.met, counted))
    busy = sum(outcome.ended - outcome.sent for outcome in counted if outcome.sent is not None)
    prompt_tokens = sum(outcome.prompt_tokens or 0 for outcome in whole)
    answer_tokens = sum(outcome.tokens for outcome in whole)
    return Summary(
        begin=warmup,
        duration=duration,
        due=len(counted),
        completed=len(whole),
        errors=dict(Counter(outcome.error for outcome in counted if outcome.error).most_common()),
        offered=(len(due) - 1) / (max(due) - min(due)) if len(set(due)) > 1 else 0.0,
        request_rate=len(whole) / duration,
        goodput=num_met / duration,
        attainment=num_met / len(counted) if counted else 0.0,
        prompt_tokens=prompt_tokens,
        cached_tokens=sum(outcome.cached_tokens or 0 for outcome in whole),
        answer_tokens=answer_tokens,
        answer_token_rate=answer_tokens / duration,
        prompt_token_rate=prompt_tokens / duration,
        short_answers=sum(outcome.tokens < outcome.asked_tokens for outcome in whole),
        is_counted=all(outcome.answer_tokens is not None for outcome in whole),
        in_flight=busy / duration,
        ttft=Percentiles.of(_known(outcome.ttft for outcome in whole)),
        tpot=Percentiles.of(_known(outcome.tpot for outcome in whole)),
        itl=Percentiles.of(gaps(whole)),
        e2e=Percentiles.of(_known(outcome.e2e for outcome in whole)),
        prompt_length=Percentiles.of(_known(outcome.prompt_tokens for outcome in whole)),
        answer_length=Percentiles.of(float(outcome.tokens) for outcome in whole),
        late=Percentiles.of(_known(outcome.late for outcome in counted)),
        loop_delay=Percentiles.of(loop_delays),
    )


def gaps(outcomes: Sequence[Outcome]) -> Floats:
    """Seconds between events with text, of all answers together; one event may bring several tokens."""
    if not outcomes:
        return np.empty(0)
    return np.concatenate([np.diff(np.frombuffer(outcome.moments)) for outcome in outcomes])


def _known(values: Iterable[float | None]) -> Floats:
    return np.array([value for value in values if value is not None], dtype=np.float64)


def void_reasons(summary: Summary, max_lateness: float) -> list[str]:
    """Why the figures say nothing about the server; none where they do.

    Args:
        max_lateness: seconds that the 99th percentile of the generator's own delays may have.
    """
    reasons = []
    pairs = ("requests were sent", summary.late), ("the generator's loop ran", summary.loop_delay)
    for name, delays in pairs:
        if delays is not None and delays.p99 > max_lateness:
            limit = f"99th percentile; {max_lateness * 1e3:.0f} ms are allowed"
            reasons.append(f"{name} {delays.p99 * 1e3:.0f} ms late ({limit})")
    if not summary.due:
        reasons.append("no request was due after the warm-up")
    return reasons

"""A run over time: figures of each of some sixty equal stretches."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from cluster.bench.measure import Floats
from cluster.bench.outcome import Outcome

Column: TypeAlias = list[float | None]

_STRETCHES = 60
_LEAST_SECONDS = 1.0  # a stretch, so that its percentiles are of some requests


def series(outcomes: Sequence[Outcome]) -> dict[str, Column]:
    """Columns of equal length; None where a stretch has no value.

    `at` is each stretch's middle, seconds from the beginning. Latencies are of the requests that were sent in
    it, in seconds; `itl` of the gaps that ended in it. Rates are a second: requests due, completed and
    failed, and tokens of answers. `open` is the mean number of open requests.
    """
    end = max((outcome.ended for outcome in outcomes), default=0.0)
    width = max(end / _STRETCHES, _LEAST_SECONDS)
    count = int(end // width) + 1
    whole = [outcome for outcome in outcomes if outcome.error is None]

    def place(moments: Floats | list[float]) -> npt.NDArray[np.int64]:
        return np.minimum(np.asarray(moments, dtype=np.float64) // width, count - 1).astype(np.int64)

    def rate(moments: list[float]) -> Column:
        return _floats(np.bincount(place(moments), minlength=count) / width)

    columns: dict[str, Column] = {"at": [width * (index + 0.5) for index in range(count)]}
    measures: list[tuple[str, Callable[[Outcome], float | None]]] = [
        ("ttft", lambda outcome: outcome.ttft), ("tpot", lambda outcome: outcome.tpot),
        ("e2e", lambda outcome: outcome.e2e),
    ]  # fmt: skip
    for name, measure in measures:
        pairs = [(outcome.sent, value) for outcome in whole if (value := measure(outcome)) is not None]
        where = place([sent for sent, _ in pairs if sent is not None])
        columns |= _percentile_columns(name, where, np.array([value for _, value in pairs]), count)
    columns |= _gap_columns(whole, place, count)
    columns["due"] = rate([outcome.planned for outcome in outcomes])
    columns["completed"] = rate([outcome.ended for outcome in whole])
    columns["failed"] = rate([outcome.ended for outcome in outcomes if outcome.error is not None])
    columns["answer_tokens"] = _token_rate(outcomes, place, count, width)
    columns["open"] = _open(outcomes, count, width)
    return columns


def _gap_columns(
    whole: Sequence[Outcome], place: Callable[[Floats], npt.NDArray[np.int64]], count: int
) -> dict[str, Column]:
    moments = [np.frombuffer(outcome.moments) for outcome in whole]
    ends = np.concatenate([one[1:] for one in moments]) if moments else np.empty(0)
    values = np.concatenate([np.diff(one) for one in moments]) if moments else np.empty(0)
    return _percentile_columns("itl", place(ends), values, count)


def _percentile_columns(
    name: str, where: npt.NDArray[np.int64], values: Floats, count: int
) -> dict[str, Column]:
    """The 50th, 90th and 99th percentile of each stretch."""
    order = np.argsort(where, kind="stable")
    cuts = np.searchsorted(where[order], np.arange(1, count))
    parts = np.split(values[order], cuts)
    return {
        f"{name}_p{rank}": [float(np.percentile(part, rank)) if part.size else None for part in parts]
        for rank in (50, 90, 99)
    }


def _token_rate(
    outcomes: Sequence[Outcome], place: Callable[[Floats], npt.NDArray[np.int64]], count: int, width: float
) -> Column:
    """Tokens a second, each answer's tokens spread evenly over its events."""
    total = np.zeros(count)
    for outcome in outcomes:
        if events := len(outcome.moments):
            where = place(np.frombuffer(outcome.moments))
            total += np.bincount(where, minlength=count) * (outcome.tokens / events)
    return _floats(total / width)


def _open(outcomes: Sequence[Outcome], count: int, width: float) -> Column:
    """The mean number of open requests: the area under them, by stretch."""
    edges = np.linspace(0.0, count * width, count + 1)
    spans = [(outcome.sent, outcome.ended) for outcome in outcomes if outcome.sent is not None]
    area = _seconds_before([sent for sent, _ in spans], edges)
    area -= _seconds_before([ended for _, ended in spans], edges)
    return _floats(np.diff(area) / width)


def _seconds_before(moments: list[float], edges: Floats) -> Floats:
    """For each edge, the seconds since all the moments before it, added up."""
    ordered = np.sort(np.array(moments, dtype=np.float64))
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    number = np.searchsorted(ordered, edges)
    seconds: Floats = edges * number - sums[number]
    return seconds


def _floats(values: Floats) -> Column:
    return [float(value) for value in values]

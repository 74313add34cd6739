"""The arithmetic: from outcomes with known moments to figures that can be checked by hand."""

import math
from array import array

import numpy as np
import pytest

from cluster.bench.measure import Objectives, Percentiles, summarise, void_reasons
from cluster.bench.outcome import Outcome
from cluster.bench.series import series


def outcome(
    sent: float, moments: list[float], ended: float | None = None, tokens: int | None = None,
    error: str | None = None, planned: float | None = None, asked: int = 3,
) -> Outcome:  # fmt: skip
    return Outcome(
        session=0,
        turn=0,
        planned=sent if planned is None else planned,
        sent=sent,
        moments=array("d", moments),
        ended=moments[-1] if ended is None else ended,
        asked_tokens=asked,
        prompt_tokens=100,
        cached_tokens=25,
        answer_tokens=len(moments) if tokens is None else tokens,
        error=error,
    )


def test_latencies_of_one_answer() -> None:
    one = outcome(sent=10.0, moments=[10.5, 10.75, 11.5], ended=11.5)
    assert (one.ttft, one.e2e, one.tpot) == (0.5, 1.5, 0.5)
    several_at_once = outcome(sent=0.0, moments=[1.0, 2.0], tokens=5)
    assert several_at_once.tpot == 0.25
    assert outcome(sent=0.0, moments=[1.0]).tpot is None
    assert outcome(sent=0.0, moments=[1.0, 2.0], error="truncated").e2e is None


def test_a_summary_by_hand() -> None:
    outcomes = [
        outcome(sent=0.0, moments=[0.1, 0.2, 0.3]),  # warm-up
        outcome(sent=2.0, moments=[2.5, 3.0, 3.5], planned=1.9),
        outcome(sent=3.0, moments=[3.1, 3.2, 3.3]),
        outcome(sent=4.0, moments=[4.2, 6.0], tokens=2),
        outcome(sent=5.0, moments=[], ended=5.5, error="http 503"),
    ]
    found = summarise(outcomes, Objectives(ttft=0.3, tpot=1.0), warmup=1.0, loop_delays=[0.001])
    assert (found.due, found.completed, found.errors) == (4, 3, {"http 503": 1})
    assert found.duration == 5.0  # from the end of the warm-up to the last answer
    assert found.offered == pytest.approx(3 / 3.1)
    assert found.request_rate == pytest.approx(3 / 5)
    assert found.goodput == pytest.approx(1 / 5)
    assert found.attainment == 0.25
    assert found.answer_tokens == 8
    assert found.answer_token_rate == pytest.approx(8 / 5)
    assert (found.prompt_tokens, found.cached_tokens) == (300, 75)
    assert found.short_answers == 1
    assert found.in_flight == pytest.approx((1.5 + 0.3 + 2.0 + 0.5) / 5)
    assert found.ttft is not None
    assert found.itl is not None
    assert found.tpot is not None
    assert found.late is not None
    assert found.ttft.mean == pytest.approx((0.5 + 0.1 + 0.2) / 3)
    assert found.itl.count == 5
    assert found.itl.max == pytest.approx(1.8)
    assert found.tpot.p50 == pytest.approx(0.5)
    assert found.late.max == pytest.approx(0.1)


def test_percentiles_are_linear_between_values() -> None:
    found = Percentiles.of(float(value) for value in range(101))
    assert found is not None
    assert (found.p50, found.p90, found.p95, found.p99, found.max) == (50, 90, 95, 99, 100)
    assert Percentiles.of([]) is None


def test_objectives_are_met_together_or_not_at_all() -> None:
    one = outcome(sent=0.0, moments=[0.5, 1.0, 1.5])
    assert Objectives(ttft=0.5, tpot=0.5, e2e=1.5).met(one)
    assert not Objectives(ttft=0.4).met(one)
    assert not Objectives(tpot=0.4).met(one)
    assert not Objectives(e2e=1.4).met(one)
    assert Objectives().met(one)
    assert not Objectives().met(outcome(sent=0.0, moments=[0.1], error="timeout"))
    assert Objectives(tpot=0.001).met(outcome(sent=0.0, moments=[0.5]))  # one token has no next


def test_a_late_generator_makes_the_figures_void() -> None:
    late = [outcome(sent=1.2, moments=[1.3, 1.4, 1.5], planned=1.0)]
    (reason,) = void_reasons(summarise(late, Objectives(), 0.0, [0.0]), max_lateness=0.05)
    assert "200 ms late" in reason
    (reason,) = void_reasons(summarise(late, Objectives(), 0.0, [0.9] * 9), max_lateness=0.3)
    assert "loop" in reason
    assert void_reasons(summarise(late, Objectives(), 0.0, [0.01]), max_lateness=0.3) == []


def test_nothing_after_the_warmup_is_void() -> None:
    found = summarise([outcome(sent=0.0, moments=[1.0])], Objectives(), 5.0, [])
    assert void_reasons(found, 1.0) == ["no request was due after the warm-up"]


def test_a_series_puts_everything_where_it_happened() -> None:
    outcomes = [
        outcome(sent=0.0, moments=[0.5, 2.5, 3.5], tokens=6),
        outcome(sent=3.0, moments=[3.25], ended=3.25),
        outcome(sent=1.0, moments=[], ended=1.5, error="connection"),
    ]
    found = series(outcomes)
    assert found["at"] == [0.5, 1.5, 2.5, 3.5]
    assert found["ttft_p50"] == [0.5, None, None, 0.25]
    assert found["itl_p50"] == [None, None, 2.0, 1.0]
    assert found["due"] == [1, 1, 0, 1]
    assert found["completed"] == [0, 0, 0, 2]
    assert found["failed"] == [0, 1, 0, 0]
    assert found["answer_tokens"] == [2, 0, 2, 3]
    assert found["open"] == pytest.approx([1.0, 1.5, 1.0, 0.75])
    assert {len(column) for column in found.values()} == {4}


def test_a_long_series_has_some_sixty_stretches() -> None:
    random = np.random.default_rng(0)
    outcomes = [outcome(sent=at, moments=[at + 1, at + 2]) for at in random.uniform(0, 600, 500)]
    found = series(outcomes)
    assert 58 <= len(found["at"]) <= 62
    width = 2 * (found["at"][0] or math.nan)
    assert sum(value or 0 for value in found["answer_tokens"]) * width == pytest.approx(1000)
    assert sum(value or 0 for value in found["open"]) * width == pytest.approx(1000)

"""The figures of an overload, from outcomes made by hand."""

import os
from array import array
from dataclasses import replace

import pytest

from benchmarks.overload import Figures, figures, growth, memory_by_part, misses, refusals, table
from cluster.bench.load import Progress
from cluster.bench.measure import Objectives
from cluster.bench.outcome import Outcome
from cluster.bench.run import Known, Run
from cluster.bench.server_view import ServerView

OBJECTIVES = Objectives(ttft=1.0, tpot=0.1)


def answered(planned: float, ttft: float = 0.5, tpot: float = 0.05, tokens: int = 11) -> Outcome:
    first = planned + ttft
    moments = array("d", (first + tpot * index for index in range(tokens)))
    return Outcome(
        session=0, turn=0, planned=planned, sent=planned, moments=moments, ended=moments[-1],
        asked_tokens=tokens, answer_tokens=tokens,
    )  # fmt: skip


def refused(
    planned: float, seconds: float, retry_after: float | None = 1.0, kind: str = "http 503"
) -> Outcome:
    return Outcome(
        session=0, turn=0, planned=planned, sent=planned, moments=array("d"), ended=planned + seconds,
        asked_tokens=11, error=kind, retry_after=retry_after,
    )  # fmt: skip


def a_run(*outcomes: Outcome) -> Run:
    progress = Progress(outcomes=list(outcomes), loop_delays=[0.001])
    return Run(started="now", known=Known(model="m", cost=None), progress=progress, view=ServerView())


def test_goodput_counts_whole_answers_within_objectives_that_ended_in_the_window() -> None:
    http = a_run(
        answered(4.5),  # ends at 5.5: within the window, and due before it
        answered(6.0),
        answered(7.0, ttft=1.1),
        answered(8.0, tpot=0.11),
        answered(14.5),  # ends at 15.5: after it
        refused(9.0, 0.01),
    )
    found = figures({"http": http, "grpc": a_run(answered(10.0))}, 4.0, 15.0, OBJECTIVES)
    assert found.goodput == pytest.approx(3 / 10)
    assert found.due == 6
    assert found.attainment == pytest.approx(3 / 6)
    assert found.errors == {"http 503": 1}
    assert found.refusals["http 503"].count == 1
    assert found.refusals["grpc UNAVAILABLE"].seconds is None


def test_refusals_are_timed_and_asked_when_to_come_again() -> None:
    broken = replace(answered(6.0), error="http 503")  # an answer that had begun
    found = refusals(
        [refused(6.0, 0.02), refused(7.0, 0.04, None), broken, refused(8.0, 9.0, 1.0, "x")], "http 503"
    )
    assert found.count == 2
    assert found.without_retry_after == 1
    assert found.seconds
    assert found.seconds.p50 == pytest.approx(0.03)


def test_memory_that_rises_at_first_only_does_not_grow() -> None:
    assert growth([50.0] * 4 + [100.0] * 16) == pytest.approx(0.0)
    assert growth([float(100 + second) for second in range(100)]) > 0.1
    assert growth([7.0]) == 0.0


def test_what_is_not_met_is_named() -> None:
    peak = figures({"http": a_run(*(answered(5.0 + i) for i in range(10)))}, 1.0, 16.0, OBJECTIVES)
    fine = replace(
        peak,
        rate=4.0,
        refusals={kind: refusals([refused(6.0, 0.02, 1.0, kind)], kind) for kind in peak.refusals},
    )
    steady = {"gateway": [100.0] * 50}
    assert misses(peak, fine, steady) == []
    assert "goodput is 80%" in said(peak, replace(fine, goodput=0.8 * peak.goodput), steady)
    assert "memory of gateway grew" in said(peak, fine, {"gateway": [float(100 + i) for i in range(50)]})
    nothing = {"http 503": refusals([], "http 503")}
    assert "nothing was refused (http 503)" in said(peak, replace(fine, refusals=nothing), steady)
    slow = {"http 503": refusals([refused(6.0, 0.2)], "http 503")}
    assert "http 503: 200 ms" in said(peak, replace(fine, refusals=slow), steady)
    silent = {"http 503": refusals([refused(6.0, 0.02, None)], "http 503")}
    assert "1 of 1 do not say" in said(peak, replace(fine, refusals=silent), steady)
    text = table(peak, fine, steady)
    assert "goodput under overload: 100% of the peak" in text
    assert "refused, http 503: 1 in 20 ms" in text


def said(peak: Figures, over: Figures, memory: dict[str, list[float]]) -> str:
    (problem,) = misses(peak, over, memory)
    return problem


def test_memory_is_that_of_a_process_and_all_below_it() -> None:
    found = memory_by_part(os.getpid())
    assert found["gateway"] > 10

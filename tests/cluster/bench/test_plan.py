"""Distributions, plans and traces."""

import json
from pathlib import Path

import numpy as np
import pytest

from cluster.bench.arrivals import Arrivals, RateProfile
from cluster.bench.distribution import Distribution
from cluster.bench.plan import Session, Shapes, Turn, make_plan, read_trace
from model.errors import RequestError


def drawn(text: str, count: int = 20000) -> np.ndarray:
    random = np.random.default_rng(3)
    distribution = Distribution.parse(text, "--prompt-tokens", 1)
    return np.array([distribution.draw_whole(random) for _ in range(count)])


def test_a_number_is_always_itself() -> None:
    assert set(drawn("128", 50)) == {128}


def test_uniform_takes_both_ends_equally_often() -> None:
    values, counts = np.unique(drawn("3..6"), return_counts=True)
    assert values.tolist() == [3, 4, 5, 6]
    assert (abs(counts / 20000 - 0.25) < 0.02).all()


def test_lognormal_has_its_median_and_spread_and_stops_at_its_end() -> None:
    values = drawn("lognormal:200,0.8,4000")
    assert np.median(values) == pytest.approx(200, rel=0.05)
    assert np.log(values).std() == pytest.approx(0.8, rel=0.05)
    assert values.max() <= 4000
    assert drawn("lognormal:200,0.8,250").max() == 250


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "0",
        "5..3",
        "nan",
        "inf",
        "1,2",
        "lognormal:5",
        "lognormal:5,0",
        "lognormal:9,1,5",
        "normal:1,2",
    ],
)
def test_what_is_no_distribution_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="--prompt-tokens"):
        Distribution.parse(text, "--prompt-tokens", 1)


def shapes(**others: str) -> Shapes:
    texts = {"prompt_tokens": "10..20", "answer_tokens": "5", "turns": "1..3", "think": "0.5"} | others
    least = {"think": 0}
    return Shapes(
        **{name: Distribution.parse(text, name, least.get(name, 1)) for name, text in texts.items()}
    )


def test_sessions_have_turns_and_pauses_between_them() -> None:
    plan = make_plan(Arrivals("poisson", RateProfile.parse("10"), 30), shapes(), seed=1)
    assert {len(session.turns) for session in plan} == {1, 2, 3}
    assert all(session.turns[0].think == 0 for session in plan)
    assert all(turn.think == 0.5 for session in plan for turn in session.turns[1:])
    keys = [turn.key for session in plan for turn in session.turns]
    assert len(set(keys)) == len(keys)


def test_other_lengths_leave_the_arrivals_as_they_are() -> None:
    arrivals = Arrivals("poisson", RateProfile.parse("10"), 30)
    first, second = make_plan(arrivals, shapes(), 1), make_plan(arrivals, shapes(turns="4"), 1)
    assert [session.at for session in first] == [session.at for session in second]
    assert first == make_plan(arrivals, shapes(), 1)
    assert first != make_plan(arrivals, shapes(), 2)


def test_a_trace_is_sent_as_recorded(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    lines = [{"at": 2, "prompt_tokens": 9, "max_tokens": 4}, {"at": 0.5, "prompt": "hi", "max_tokens": 1}]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_trace(path) == [
        Session(0.5, (Turn(2, 0, 1, text="hi"),)),
        Session(2.0, (Turn(1, 9, 4),)),
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 1 is not JSON"),
        ("[]", "no JSON object"),
        ('{"at": 0, "max_tokens": 1}', "needs one of"),
        ('{"at": 0, "prompt": "a", "prompt_tokens": 1, "max_tokens": 1}', "needs one of"),
        ('{"at": -1, "prompt": "a", "max_tokens": 1}', "at is -1"),
        ('{"at": true, "prompt": "a", "max_tokens": 1}', "at is True"),
        ('{"at": 0, "prompt_tokens": 0, "max_tokens": 1}', "prompt_tokens is 0"),
        ('{"at": 0, "prompt": "a"}', "max_tokens is None"),
        ('{"at": 0, "prompt": "a", "max_tokens": 1, "model": "x"}', "'model' is no field"),
        ("", "holds no request"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(RequestError, match=said):
        read_trace(path)


def test_a_trace_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="No such file"):
        read_trace(tmp_path / "none")

"""The JSON, the text and the page of a result."""

import json
import re
from array import array
from html.parser import HTMLParser
from typing import Any

import pytest

from cluster.bench.capacity import Capacity, Trial
from cluster.bench.load import Progress
from cluster.bench.measure import Objectives
from cluster.bench.outcome import Outcome
from cluster.bench.page import render
from cluster.bench.plot import Line, plot
from cluster.bench.prompts import TokenCost
from cluster.bench.report import as_text, result_json
from cluster.bench.run import Known, Run
from cluster.bench.server_view import Sample, ServerView

HOSTILE = "<script>alert(1)</script>"


def result(error: str | None = HOSTILE, samples: int = 3, capacity: Capacity | None = None) -> dict[str, Any]:
    outcomes = [
        Outcome(
            session=index,
            turn=0,
            planned=float(index),
            sent=index + 0.001,
            moments=array("d", [index + 0.1, index + 0.2, index + 0.4]),
            ended=index + 0.4,
            asked_tokens=3,
            prompt_tokens=100,
            cached_tokens=50,
            answer_tokens=3,
            error=error if index == 5 else None,
            detail=HOSTILE if index == 5 else "",
        )
        for index in range(10)
    ]
    progress = Progress(num_sent=10, outcomes=outcomes, loop_delays=[0.001])
    view = ServerView(not_offered=None if samples else "/status answered 404")
    for at in range(samples):
        view.samples.append(
            Sample(
                at=float(at), waiting=at, running=2, queued_tokens=7, pages_used=3, pages=9,
                replicas={"prefill": 1, "decode": 2}, tokens=at * 50,
            )
        )  # fmt: skip
    known = Known(model=HOSTILE, cost=TokenCost())
    run = Run(started="2026-01-01T00:00:00+00:00", known=known, progress=progress, view=view)
    settings = {"url": "http://" + HOSTILE, "rate": "1"}
    return result_json(run, settings, Objectives(ttft=0.5), 0.0, 0.05, capacity)


CAPACITY = Capacity(
    highest=2.0,
    lowest_failed=2.2,
    trials=(
        Trial(rate=2.0, attainment=1.0, goodput=1.9, is_met=True),
        Trial(rate=2.2, attainment=0.5, goodput=1.1, is_met=False, remark="given up"),
    ),
    ended="the interval is small enough",
)


class Page(HTMLParser):
    """Counts elements, checks that they close, and notes what would load something."""

    VOID = frozenset({"meta", "br", "line", "path"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self.loads += [name for name, _ in attributes if name in ("src", "href") or name.startswith("on")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_json_has_everything_and_can_be_read_back() -> None:
    found = json.loads(json.dumps(result(), allow_nan=False))
    assert (found["format"], found["version"]) == ("eightfold-bench", 1)
    assert found["settings"]["rate"] == "1"
    assert found["summary"]["completed"] == 9
    assert found["failures"] == {HOSTILE: {"count": 1, "first": HOSTILE}}
    assert {len(column) for column in found["requests"].values()} == {10}
    assert found["requests"]["ttft"][0] == pytest.approx(0.099)
    assert len(found["distribution"]["itl"]) == 101
    assert found["server"]["samples"]["tokens_rate"] == [None, 50, 50]
    assert "50% of the prompts' tokens were found in the server's cache" in found["notes"]
    assert found["void"] == []


def test_the_text_names_the_figures() -> None:
    text = as_text(result())
    assert "10 requests due" in text
    assert re.search(r"TTFT +99\.0 +99\.0", text)
    assert re.search(r"ITL +150\.0", text)
    assert f"1 x {HOSTILE}" in text
    assert "90.0% met the objectives" in text


def test_the_page_loads_nothing_and_shows_hostile_text_as_text() -> None:
    text = render(result(capacity=CAPACITY))
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "script" not in page.counts
    assert not re.search(r"://|url\(|@import", text.replace("http://&lt;script&gt;", ""))
    assert "default-src 'none'" in text
    assert page.counts["svg"] == 9 + 5 + 2
    assert "2/s</b> meets the objectives" in text


def test_a_page_without_a_view_of_the_server_says_so() -> None:
    text = render(result(error=None, samples=0))
    assert "Not offered: /status answered 404." in text
    assert "Failures" not in text
    assert "Capacity" not in text


def test_void_figures_are_marked_on_the_page_and_in_the_text() -> None:
    found = result()
    found["void"] = ["requests were sent 900 ms late"]
    assert "These figures are void:" in render(found)
    assert "VOID: requests were sent 900 ms late" in as_text(found)


def test_a_result_without_one_answer_makes_a_page_too() -> None:
    found = result()
    run = Run(started="", known=Known(model="m", cost=None), progress=Progress(), view=ServerView())
    empty = result_json(run, found["settings"], Objectives(), 0.0, 0.05)
    assert Page(render(empty)).open == []
    assert "0 requests due" in as_text(empty)


def test_a_plot_has_its_values_in_their_places() -> None:
    text = plot(
        "T", [0.0, 5.0, 10.0], [Line("a<b", [0.0, 4.0, None]), Line("c", [2.0, None, 4.0])], "s", "ms"
    )
    assert text.count("<circle") == 4
    paths = re.findall(r'<path d="([^"]*)"', text)
    assert [(path.count("M"), path.count("L")) for path in paths] == [(1, 1), (2, 0)]
    assert "a&lt;b: 4 ms at 5 s" in text
    circles = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)]
    (x0, y0), (x5, y4), (_, y2), (x10, top) = circles
    assert x5 - x0 == pytest.approx(x10 - x5, abs=0.2)
    assert y4 == top
    assert y0 - y2 == pytest.approx(y2 - y4, abs=0.2)


def test_nothing_to_plot_is_no_plot() -> None:
    assert plot("T", [], [Line("a", [])], "s", "ms") == ""
    assert plot("T", [1.0], [Line("a", [None])], "s", "ms") == ""
    for place in (-0.1, 0.0, 3.0):
        assert len(plot("T", [place], [Line("a", [0.0])], "s", "ms")) < 2000

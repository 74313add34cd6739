"""The progress line, and what is read of the server's own view."""

import asyncio
import json
import time
from array import array
from typing import Any

import pytest

from cluster.bench.http_connection import ConnectionPool, Site
from cluster.bench.load import Progress
from cluster.bench.outcome import Outcome
from cluster.bench.run import ProgressLine
from cluster.bench.server_view import Sample, ServerView

STATUS = {
    "waiting": 3,
    "running": 2,
    "parts": {
        "workers": [
            {"status": {"role": role, "tokens": tokens, "load": load}}
            for role, tokens, load in (
                ("prefill", 5, {"queued_tokens": 70, "num_pages": 10, "free_pages": 4}),
                ("decode", 90, {"queued_tokens": 0, "num_pages": 20, "free_pages": 20}),
                ("decode", 10, {"queued_tokens": 1, "num_pages": 20, "free_pages": 19}),
            )
        ],
        "experts": [{}, {}],
    },
}


def progress() -> Progress:
    outcome = Outcome(
        session=0, turn=0, planned=0.0, sent=0.0, moments=array("d", [0.25]), ended=0.5, asked_tokens=9,
        answer_tokens=9,
    )  # fmt: skip
    found = Progress(origin=time.perf_counter() - 5, num_sent=4, num_open=3)
    found.note(outcome)
    return found


def test_the_line_is_rewritten_on_a_terminal_and_removed_in_the_end() -> None:
    written: list[str] = []
    line = ProgressLine(written.append, is_terminal=True, num_due=10)
    line(progress())
    line.clear()
    assert written[0].startswith("\r   5.0 s  4 of 10 sent, 3 open, 1 done, 0 failed; TTFT 250 ms")
    assert "\n" not in "".join(written)
    assert written[1].strip("\r ") == ""
    assert len(written[1]) >= len(written[0])


def test_elsewhere_lines_are_few() -> None:
    written: list[str] = []
    line = ProgressLine(written.append, is_terminal=False, num_due=10)
    line(progress())
    line(progress())
    line.clear()
    assert len(written) == 1
    assert written[0].endswith("\n")


def test_a_sample_adds_up_the_workers() -> None:
    assert Sample.of(1.5, STATUS) == Sample(
        at=1.5, waiting=3, running=2, queued_tokens=71, pages_used=7, pages=50,
        replicas={"prefill": 1, "decode": 2, "experts": 2}, tokens=105,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "body", "said"),
    [
        (404, b"", "/status answered 404"),
        (200, b"<html>", "/status is not that of an Eightfold of this version"),
        (200, b"[]", "/status is not that of an Eightfold of this version"),
    ],
)
def test_a_server_without_a_view_is_asked_once(status: int, body: bytes, said: str) -> None:
    class Pool(ConnectionPool):
        asked = 0

        async def get(self, path: str) -> tuple[int, bytes]:
            self.asked += 1
            return status, body

    pool, view = Pool(Site.parse("http://nowhere"), None), ServerView()
    asyncio.run(asyncio.wait_for(view.watch(pool, lambda: 0.0), 5))
    assert pool.asked == 1
    assert view.not_offered == said
    assert view.columns() == {}


def test_a_worker_that_leaves_makes_no_negative_rate() -> None:
    view = ServerView()
    for at, tokens in ((0.0, 100), (2.0, 300), (3.0, 50)):
        status: dict[str, Any] = json.loads(json.dumps(STATUS))
        for worker in status["parts"]["workers"]:
            worker["status"]["tokens"] = 0
        status["parts"]["workers"][0]["status"]["tokens"] = tokens
        view.samples.append(Sample.of(at, status))
    assert view.columns()["tokens_rate"] == [None, 100.0, None]
    assert view.columns()["at"] == [0.0, 2.0, 3.0]

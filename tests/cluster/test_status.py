"""`eightfold status` against a gateway, and what it says where there is none."""

import json
import re
from pathlib import Path

import httpx2
import pytest

from cluster.autoscaling import Decision, RoleScaling
from cluster.cli import main
from cluster.commands.status import as_text
from cluster.directory import RoleEngines
from cluster.gateway.backend import Parts, WorkerReport
from cluster.gateway.status import ClusterStatus
from cluster.starts import FailedStart
from tests.checkpoints import DEMO
from tests.cluster.gateway.serving import HARBOR, Served, serve
from workers.load import WorkerLoad
from workers.local import LocalModel, ModelOptions
from workers.wire import WorkerStatus


@pytest.fixture(scope="module")
def served():
    with serve(LocalModel(DEMO, ModelOptions())) as served:
        yield served


def test_it_shows_what_the_engine_counts(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert served.post({"model": "demo", "messages": HARBOR, "max_tokens": 5}).status_code == 200
    assert main(["status", served.url]) == 0
    text = capsys.readouterr().out
    assert "demo  weights decc029080f8  ready" in text
    assert "0 waiting, 0 running" in text
    row = next(line for line in text.splitlines() if line.startswith("engine")).split()
    assert "13" in row  # tokens of the prompt
    assert "5" in row  # tokens drawn


def test_json_is_the_whole_value(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", served.url, "--json"]) == 0
    found = ClusterStatus.from_json(capsys.readouterr().out.encode())
    assert found.parts.workers[0].status.load.num_pages == served.engine.pool.num_pages
    assert found.weights_digest == served.server.gateway.backend.facts.digest


def test_metrics_tell_of_workers_too(served: Served) -> None:
    page = httpx2.get(f"{served.url}/metrics", trust_env=False).text
    assert 'eightfold_worker_drafts_total{place="1",role="decode",state="accepted",worker="engine"}' in page
    assert 'eightfold_worker_tokens_total{role="decode",worker="engine"}' in page


def test_nobody_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "nonsense", "file:///etc/passwd"])
def test_what_is_no_address_is_one_line(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", url]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_key_is_needed_where_keys_are_configured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], served: Served
) -> None:
    missing = tmp_path / "missing"
    assert main(["status", served.url, "--key-file", str(missing)]) == 2
    key = tmp_path / "key"
    key.write_text("anything\n")
    assert main(["status", served.url, "--key-file", str(key), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ready"] is True


def test_a_page_shows_who_leaves_and_how_it_is_scaled() -> None:
    decisions = (Decision("decode", 1e9, 2, 3, "pages", "90 of 100 pages are in use"),)
    scaling = RoleScaling(
        "decode", 2, 3, 2.25, "90 of 100 pages are in use", (("pages", 2.25),), 0.05, 0.04, decisions,
        (("up", "pages", 1),),
    )  # fmt: skip
    failure = FailedStart(1e9, "TimeoutError: not in time", 3)
    engines = RoleEngines("prefill", 1, 1), RoleEngines("decode", 3, 1, 4, failure)
    worker = WorkerReport("d", "e", "n", 1, WorkerStatus("decode", WorkerLoad(), leaving=True))
    parts = Parts(0, (worker,), (), engines, (scaling,))
    text = as_text(ClusterStatus("demo", "digest", 100, True, False, 1, 0, 0, 0, parts))
    assert re.search(r"^d +decode, leaving ", text, re.M)
    assert re.search(r"^decode +2 +3 +2\.25 +90 of 100 pages are in use$", text, re.M)
    assert "decode from 2 to 3: 90 of 100 pages are in use" in text
    assert "decode: 3 engines in a row did not come up: TimeoutError: not in time" in text
    assert "prefill: " not in text

"""Metrics: what is documented is shown and the other way round, and the numbers are those of the status."""

import re
import shutil
import subprocess

import httpx2
import pytest

from tests.cluster.gateway.documented import a_full_page, documented, shown
from tests.cluster.gateway.serving import HARBOR, Served

WORD = r"[a-z0-9]+(_[a-z0-9]+)*"


def test_documentation_and_page_agree() -> None:
    pages = shown(a_full_page())
    table = documented()
    assert set(table) == set(pages)
    for name, (kind, labels) in pages.items():
        assert table[name].kind == kind, name
        assert table[name].labels == labels, name
        assert table[name].question


def test_a_real_gateway_shows_nothing_else(served: Served) -> None:
    assert served.post({"model": "demo", "messages": HARBOR, "max_tokens": 2}).status_code == 200
    page = httpx2.get(f"{served.url}/metrics", trust_env=False).text
    types = re.findall(r"^# TYPE (\S+) (\w+)$", page, re.MULTILINE)
    assert {name for name, _ in types if not name.endswith("_created")} == set(documented())
    assert set(shown(page)) <= set(documented())


def test_names_are_those_that_prometheus_asks_for() -> None:
    for name, (kind, labels) in shown(a_full_page()).items():
        assert re.fullmatch(WORD, name)
        assert (kind == "counter") == name.endswith("_total"), name
        assert not labels & {"job", "instance", "le", "quantile"}, "Prometheus sets these itself"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_has_nothing_to_say() -> None:
    result = subprocess.run(
        ["promtool", "check", "metrics"], input=a_full_page(), capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr


@pytest.mark.parametrize(
    "line",
    [
        'eightfold_model_info{model="demo",weights="dddddddddddddddd"} 1.0',
        "eightfold_ready 1.0",
        'eightfold_requests_open{phase="waiting"} 5.0',
        'eightfold_workers{role="decode"} 2.0',
        "eightfold_expert_workers 2.0",
        "eightfold_epoch 3.0",
        'eightfold_engines{role="decode",state="running"} 1.0',
        'eightfold_engines{role="decode",state="starting"} 1.0',
        'eightfold_engines{role="decode",state="draining"} 0.0',
        'eightfold_engines_wanted{role="decode"} 2.0',
        'eightfold_engine_failed_starts_total{role="decode"} 3.0',
        'eightfold_scaling_need{reason="sequences",role="decode"} 1.5',
        'eightfold_scaling_predicted_seconds{role="decode"} 0.04',
        'eightfold_scaling_objective_seconds{role="decode"} 0.05',
        'eightfold_scaling_decisions_total{direction="up",reason="sequences",role="decode"} 3.0',
        'eightfold_worker_requests{role="prefill",state="parked",worker="prefill-0"} 3.0',
        'eightfold_worker_pages{role="decode",state="used",worker="decode-1"} 50.0',
        'eightfold_worker_pages{role="decode",state="cached",worker="decode-1"} 20.0',
        'eightfold_worker_pages{role="decode",state="free",worker="decode-1"} 30.0',
        'eightfold_worker_drafts_total{place="2",role="decode",state="accepted",worker="decode-0"} 3.0',
        'eightfold_worker_hand_over_seconds_count{role="prefill",worker="prefill-0"} 4.0',
        'eightfold_worker_hand_over_seconds_sum{role="prefill",worker="prefill-0"} 0.5',
        'eightfold_worker_hand_over_bytes_total{role="prefill",worker="prefill-0"} 7000.0',
        'eightfold_worker_dispatched_copies_total{expert_worker="experts-1",role="decode",worker="decode-0"}'
        " 500.0",
    ],
)
def test_numbers_are_those_of_the_status(line: str) -> None:
    assert line in a_full_page().splitlines()

"""Dashboard and alerts ask for metrics that exist, by labels that they have, and lead to the runbook."""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.monitoring.dashboard import as_json
from tests.cluster.gateway.documented import a_full_page, documented, shown

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "manifests" / "monitoring"
DASHBOARD, ALERTS = MONITORING / "grafana-dashboard.json", MONITORING / "alerts.yaml"
OF_PROMETHEUS = {"job", "instance", "le"}
HAS_PROMTOOL = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")

_METRIC = re.compile(r"(eightfold_\w+)(?:\{([^}]*)\})?")
_BY = re.compile(r"\bby \(([^)]*)\)")
_CHAPTER = re.compile(r"^#+ (.+)$", re.MULTILINE)


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(DASHBOARD.read_text())["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def queries() -> Iterator[tuple[str, str]]:
    """Whose, and what it asks, with Grafana's variables filled in."""
    for panel in panels():
        for target in panel.get("targets", []):
            expr = target["expr"].replace("$__rate_interval", "5m").replace("$job", ".*")
            yield panel["title"], re.sub(r"\$price_\w+", "0.28", expr)
    for rule in rules():
        yield rule["alert"], rule["expr"]


def metric_of(name: str) -> str:
    """A name in a query without what histograms and summaries put behind it."""
    bare = re.sub(r"_(bucket|count|sum)$", "", name)
    return bare if bare in documented() else name


@pytest.mark.parametrize(("whose", "query"), list(queries()))
def test_a_query_asks_for_what_there_is(whose: str, query: str) -> None:
    labels_of = {name: labels for name, (_, labels) in shown(a_full_page()).items()}
    asked = [(metric_of(name), matchers) for name, matchers in _METRIC.findall(query)]
    assert asked, whose
    known = set(OF_PROMETHEUS)
    for name, matchers in asked:
        assert name in labels_of, f"{whose}: there is no {name}"
        wanted = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert wanted <= labels_of[name] | OF_PROMETHEUS, f"{whose}: {name} has no {wanted}"
        known |= labels_of[name]
    for grouping in _BY.findall(query):
        assert {label.strip() for label in grouping.split(",")} <= known, f"{whose}: by {grouping}"


@pytest.mark.parametrize(("whose", "query"), list(queries()))
def test_a_worker_counts_once_however_many_gateways_tell_of_it(whose: str, query: str) -> None:
    for match in re.finditer(r"eightfold_worker_\w+", query):
        before = query[: match.start()]
        assert re.search(r"max by \([^)]*\bworker\b[^)]*\) \((rate\()?$", before), whose


def test_every_metric_is_looked_at_somewhere() -> None:
    asked = {metric_of(name) for _, query in queries() for name, _ in _METRIC.findall(query)}
    not_needed = {
        "eightfold_unknown_fields_total",  # a question of clients' authors
        "eightfold_worker_requests",  # in `eightfold status`
        "eightfold_worker_drafts_per_step",
        "eightfold_worker_prompt_tokens_total",  # the gateway's own count is shown
        "eightfold_worker_hit_tokens_total",
    }
    assert asked | not_needed == set(documented())
    assert not asked & not_needed


def test_the_dashboard_is_what_its_panels_make() -> None:
    assert DASHBOARD.read_text() == as_json(), "make manifests"


def test_the_dashboard_is_one_that_grafana_can_lay_out() -> None:
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    variables = {variable["name"] for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)\}?", DASHBOARD.read_text())) - {"__rate_interval", "__all"}
    assert used <= variables


def test_alerts_say_what_is_wrong_and_where_to_read_on() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    chapters = {
        re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
        for title in _CHAPTER.findall((ROOT / "docs" / "runbook.md").read_text())
    }
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning", "info")
        assert rule["annotations"]["summary"]
        file, _, chapter = rule["annotations"]["runbook"].partition("#")
        assert file == "docs/runbook.md"
        assert chapter in chapters, rule["alert"]
        assert rule["expr"].count("(") == rule["expr"].count(")")


def promtool(*arguments: str, folder: Path) -> None:
    result = subprocess.run(
        ["promtool", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


@HAS_PROMTOOL
def test_promtool_accepts_the_rules(tmp_path: Path) -> None:
    promtool("check", "rules", str(ALERTS), folder=tmp_path)


@HAS_PROMTOOL
def test_alerts_are_raised_when_they_should_be(tmp_path: Path) -> None:
    shutil.copy(ALERTS, tmp_path)
    shutil.copy(Path(__file__).parent / "alerts.test.yaml", tmp_path)
    promtool("test", "rules", "alerts.test.yaml", folder=tmp_path)


@HAS_PROMTOOL
def test_promtool_accepts_the_dashboard_s_queries(tmp_path: Path) -> None:
    recorded = [{"record": f"panel:{i}", "expr": query} for i, (_, query) in enumerate(queries())]
    (tmp_path / "queries.yaml").write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": recorded}]}))
    promtool("check", "rules", "queries.yaml", folder=tmp_path)

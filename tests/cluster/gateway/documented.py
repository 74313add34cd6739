"""docs/metrics.md and the page of `/metrics`, read."""

import re
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from cluster.autoscaling import RoleScaling
from cluster.directory import ExpertEntry, RoleEngines
from cluster.gateway.backend import Parts, WorkerReport
from cluster.gateway.metrics import Metrics
from cluster.gateway.status import ClusterStatus
from workers.load import WorkerLoad
from workers.wire import Role, WorkerStatus

ROOT = Path(__file__).parents[3]
_ROW = re.compile(r"\| `(eightfold_\w+)` \| (\w+) \|(.*?)\| (.+) \|")
_OF_SAMPLES = re.compile(r"_(bucket|count|sum)$")
_BY_LIBRARY = {"le", "quantile"}


@dataclass(frozen=True)
class Documented:
    kind: str
    labels: frozenset[str]
    question: str


def documented() -> dict[str, Documented]:
    """What the table says of each metric, by name."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    rows = _ROW.findall(text)
    assert len({name for name, *_ in rows}) == len(rows), "a metric stands twice"
    return {
        name: Documented(kind, frozenset(re.findall(r"`(\w+)`", labels)), question)
        for name, kind, labels, question in rows
    }


def shown(page: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Type and labels of each metric of a page, by the name that queries use."""
    found = {}
    for family in text_string_to_metric_families(page):
        names = {_OF_SAMPLES.sub("", sample.name) for sample in family.samples}
        names = {name for name in names if not name.endswith("_created")}
        labels = {label for sample in family.samples for label in sample.labels}
        for name in names:
            found[name] = (family.type, frozenset(labels - _BY_LIBRARY))
    return found


def a_worker(role: Role, name: str) -> WorkerReport:
    """One that has a value for everything."""
    status = WorkerStatus(
        role,
        WorkerLoad(1, 2, 3, free_pages=50, num_pages=100, queued_tokens=77, cached_pages=20),
        drafted=(10, 6), accepted=(8, 3), num_drafts=2, steps=40, tokens=90, hit_tokens=64, prompt_tokens=200,
        dispatched=400, copies_to=(("experts-0", 300), ("experts-1", 500)), most_nodes=2,
        sent_pages=7, sent_bytes=7000, hand_overs=4, hand_over_seconds=0.5, stray=1,
    )  # fmt: skip
    return WorkerReport(name, "engine", "node", 1, status)


def a_status() -> ClusterStatus:
    workers = a_worker("prefill", "prefill-0"), a_worker("decode", "decode-0"), a_worker("decode", "decode-1")
    experts = ExpertEntry("experts-0", 0, 4, "node", 2), ExpertEntry("experts-1", 4, 4, "node", 3)
    engines = RoleEngines("prefill", 1, 1), RoleEngines("decode", 2, 2, 3)
    scaling = RoleScaling(
        "decode", 1, 2, 1.5, "because", (("pages", 0.5), ("sequences", 1.5)), 0.05, 0.04, (),
        (("down", "settled", 2), ("up", "sequences", 3)),
    )  # fmt: skip
    parts = Parts(3, workers, experts, engines, (scaling,))
    return ClusterStatus("demo", "d" * 64, 4096, True, False, 12, 5, 6, 900, parts)


def a_full_page() -> str:
    """The page of a gateway that has counted everything once."""
    metrics = Metrics()
    metrics.requests.labels("http", "ok").inc()
    metrics.first_token.observe(0.2)
    metrics.between_tokens.observe(0.02)
    metrics.prompt_tokens.labels("hit").inc(64)
    metrics.answer_tokens.inc()
    metrics.unknown_fields.inc()
    metrics.dropped_spans.inc()
    metrics.certificate_expiry.labels("tls.crt").set(1.8e9)
    metrics.certificate_reloads.labels("ok").inc()
    return metrics.page(a_status()).decode()

"""Every metric of the gateway, declared once, in a registry of its own."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cluster.gateway.backend import Parts, WorkerReport
from workers.load import WorkerLoad

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_TTFT_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 100)
_ITL_BUCKETS = (0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 5)


class Metrics:
    """Few, each for a question: how many, how fast, how much room is left, what is refused."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "eightfold_requests", "Requests by protocol and how they ended: ok, cancelled or an error code.",
            ["protocol", "outcome"], registry=self._registry,
        )  # fmt: skip
        self.first_token = Histogram(
            "eightfold_time_to_first_token_seconds", "From a valid request to its first token.",
            buckets=_TTFT_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self.between_tokens = Histogram(
            "eightfold_time_between_tokens_seconds", "From one token of an answer to the next.",
            buckets=_ITL_BUCKETS, registry=self._registry,
        )  # fmt: skip
        self.prompt_tokens = Counter(
            "eightfold_prompt_tokens", "Tokens of prompts, by whether they were found in pages or computed.",
            ["cache"], registry=self._registry,
        )  # fmt: skip
        self.answer_tokens = Counter("eightfold_answer_tokens", "Tokens of answers.", registry=self._registry)
        self.unknown_fields = Counter(
            "eightfold_unknown_fields", "Fields of requests that nobody knows; they had no effect.",
            registry=self._registry,
        )  # fmt: skip
        self._open = Gauge(
            "eightfold_requests_open",
            "Requests that wait for a token, or run.",
            ["phase"],
            registry=self._registry,
        )
        self._workers = _WorkerMetrics()
        self._registry.register(self._workers)
        self._pages = Gauge(
            "eightfold_pages", "Pages of 64 tokens, in all and those that can be taken.", ["state"],
            registry=self._registry,
        )  # fmt: skip

    def page(self, load: WorkerLoad, parts: Parts) -> bytes:
        """All of them in the text format of Prometheus."""
        self._workers.parts = parts
        self._open.labels("waiting").set(load.waiting)
        self._open.labels("running").set(load.running)
        self._pages.labels("free").set(load.free_pages)
        self._pages.labels("all").set(load.num_pages)
        return generate_latest(self._registry)


class _WorkerMetrics(Collector):
    """What workers count themselves, as they told it last."""

    def __init__(self) -> None:
        self.parts = Parts(0, (), ())

    def collect(self) -> Iterator[Metric]:
        epoch = GaugeMetricFamily("eightfold_epoch", "Of the expert placement; it rises with each change.")
        epoch.add_metric([], self.parts.epoch)
        yield epoch
        pages = GaugeMetricFamily(
            "eightfold_worker_pages_used", "Pages that sequences hold.", labels=["role", "worker"]
        )
        queued = GaugeMetricFamily(
            "eightfold_worker_queued_tokens",
            "Tokens of prompts that have not been run.",
            labels=["role", "worker"],
        )
        for worker in self.parts.workers:
            load = worker.status.load
            pages.add_metric([worker.status.role, worker.name], load.num_pages - load.free_pages)
            queued.add_metric([worker.status.role, worker.name], load.queued_tokens)
        yield pages
        yield queued
        for name, what, count in _WORKER_COUNTS:
            family = CounterMetricFamily(f"eightfold_worker_{name}", what, labels=["role", "worker"])
            for worker in self.parts.workers:
                family.add_metric([worker.status.role, worker.name], getattr(worker.status, count))
            yield family
        yield from self._drafts()

    def _drafts(self) -> Iterator[Metric]:
        drafts = CounterMetricFamily(
            "eightfold_drafts",
            "Drafts by their place behind the known tokens: judged by the model, and accepted.",
            labels=["worker", "place", "state"],
        )
        for worker in self.parts.workers:
            for state, counts in _draft_counts(worker):
                for place, count in enumerate(counts, start=1):
                    drafts.add_metric([worker.name, str(place), state], count)
        yield drafts


# Name, help, and the field of `WorkerStatus`.
_WORKER_COUNTS = (
    ("steps", "Steps run.", "steps"),
    ("tokens", "Tokens drawn.", "tokens"),
    ("prompt_tokens", "Tokens of prompts that were started.", "prompt_tokens"),
    ("hit_tokens", "Those of them that were found in cached pages.", "hit_tokens"),
    ("dispatched_tokens", "Tokens sent to experts, once a layer.", "dispatched"),
    ("dispatched_copies", "Copies of them, one a node that holds one of their experts.", "copies"),
)


def _draft_counts(worker: WorkerReport) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return ("judged", worker.status.drafted), ("accepted", worker.status.accepted)

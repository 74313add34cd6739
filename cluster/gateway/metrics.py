"""Every metric that the gateway counts itself, declared once, in a registry of its own.

What workers count is in `status_metrics.py`; docs/metrics.md has both, a question each.
"""

from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.gateway.status_metrics import StatusMetrics

if TYPE_CHECKING:
    from cluster.gateway.status import ClusterStatus

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
            "eightfold_prompt_tokens",
            "Tokens of prompts that were answered, by whether they were found in pages or computed.",
            ["cache"], registry=self._registry,
        )  # fmt: skip
        self.answer_tokens = Counter("eightfold_answer_tokens", "Tokens of answers.", registry=self._registry)
        self.replays = Counter(
            "eightfold_replays", "Runs of requests from the journal after their worker was lost.",
            registry=self._registry,
        )  # fmt: skip
        self.unknown_fields = Counter(
            "eightfold_unknown_fields", "Fields of requests that nobody knows; they had no effect.",
            registry=self._registry,
        )  # fmt: skip
        self.dropped_spans = Counter(
            "eightfold_dropped_spans", "Spans of traced requests that no collector has got.",
            registry=self._registry,
        )  # fmt: skip
        self.certificate_expiry = Gauge(
            "eightfold_certificate_expiry_timestamp_seconds",
            "When the certificate that is served expires, since 1970, by its file.",
            ["file"], registry=self._registry,
        )  # fmt: skip
        self.certificate_reloads = Counter(
            "eightfold_certificate_reloads",
            "Changed certificates: served (ok), or not fit to be (failed, counted at each look).",
            ["outcome"], registry=self._registry,
        )  # fmt: skip

    def page(self, status: "ClusterStatus") -> bytes:
        """All of them in the text format of Prometheus, with what the status says."""
        shown = CollectorRegistry()
        shown.register(StatusMetrics(status))
        return generate_latest(self._registry) + generate_latest(shown)

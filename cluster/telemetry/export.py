"""The way of spans to a collector: one that is slow or away costs spans, and nobody's time."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

_MOST_WAITING = 4096  # spans; what ends beyond them is dropped
_BATCH = 512
_BATCH_SECONDS = 1.0  # until a batch leaves that is not full
_EXPORT_SECONDS = 5.0  # for a batch, all its tries together
_CLOSE_SECONDS = 3.0

_library_log = logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter")


class Outbox(BatchSpanProcessor):
    """Takes spans that have ended and sends them from a thread of its own.

    Args:
        url: where they go.
        on_dropped: told how many will not be seen by anybody.
    """

    def __init__(self, url: str, on_dropped: Callable[[int], None]) -> None:
        self._on_dropped = on_dropped
        self._taken = 0  # in the thread that ends spans
        self._sender = _Sender(url, on_dropped)
        super().__init__(
            self._sender,
            max_queue_size=_MOST_WAITING,
            schedule_delay_millis=1e3 * _BATCH_SECONDS,
            max_export_batch_size=_BATCH,
            export_timeout_millis=1e3 * _EXPORT_SECONDS,
        )

    def on_end(self, span: ReadableSpan) -> None:
        # The queue underneath would drop its oldest without telling us: it never gets so long.
        if self._taken - self._sender.num_settled >= _MOST_WAITING:
            self._on_dropped(1)
            return
        self._taken += 1
        super().on_end(span)

    def close(self) -> None:
        """Send what waits, as far as the time for it goes."""
        # The library's own end may take half a minute.
        self._sender.deadline = time.monotonic() + _CLOSE_SECONDS
        closing = threading.Thread(target=self.shutdown, name="tracing ends", daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)


class _Sender(SpanExporter):
    """OTLP over HTTP that counts what it could not deliver. Lives in the thread of its processor."""

    def __init__(self, url: str, on_dropped: Callable[[int], None]) -> None:
        self._otlp = OTLPSpanExporter(url, timeout=_EXPORT_SECONDS)
        self._on_dropped = on_dropped
        self.num_settled = 0  # delivered or given up
        self.deadline = float("inf")
        self._is_failing = False
        _library_log.addFilter(self._is_news)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        if time.monotonic() < self.deadline:
            result = self._otlp.export(spans)
        self._is_failing = result is not SpanExportResult.SUCCESS
        if self._is_failing:
            self._on_dropped(len(spans))
        self.num_settled += len(spans)
        return result

    def shutdown(self) -> None:
        self._otlp.shutdown()  # type: ignore[no-untyped-call]
        _library_log.removeFilter(self._is_news)

    def _is_news(self, record: logging.LogRecord) -> bool:
        """The library complains of every batch; the first that fails is enough until one comes through."""
        return not self._is_failing

"""The outbox: bounded, in time for its end, and honest about what it drops."""

import logging
import time

import pytest
from opentelemetry.sdk.trace import TracerProvider

from cluster.telemetry.export import _MOST_WAITING, Outbox
from tests.cluster.telemetry.collector import collecting


def end_spans(outbox: Outbox, count: int) -> float:
    """Seconds that it took whoever ended them."""
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(outbox)
    tracer = provider.get_tracer("test")
    started = time.perf_counter()
    for _ in range(count):
        tracer.start_span("one").end()
    return time.perf_counter() - started


@pytest.fixture
def dropped() -> list[int]:
    return []


def test_what_ends_is_sent_or_counted(dropped: list[int]) -> None:
    with collecting() as collector:
        outbox = Outbox(f"{collector.url}/v1/traces", dropped.append)
        end_spans(outbox, 2000)
        outbox.close()
        assert len(collector.spans) + sum(dropped) == 2000
        assert not dropped


def test_a_collector_that_hangs_costs_spans_and_no_time(dropped: list[int]) -> None:
    with collecting(pause=60) as collector:
        outbox = Outbox(f"{collector.url}/v1/traces", dropped.append)
        end_spans(outbox, _MOST_WAITING + 1000)
        assert sum(dropped) == 1000
        started = time.monotonic()
        outbox.close()
        assert time.monotonic() - started < 5  # a deadline of 3


def test_the_log_names_the_first_failure_alone(dropped: list[int], caplog: pytest.LogCaptureFixture) -> None:
    outbox = Outbox("http://127.0.0.1:1/v1/traces", dropped.append)
    with caplog.at_level(logging.ERROR):
        for batch in range(1, 3):
            end_spans(outbox, 3)
            while sum(dropped) < 3 * batch:
                time.sleep(0.05)
    outbox.close()
    assert len([record for record in caplog.records if "export" in record.getMessage()]) == 1

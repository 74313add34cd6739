"""Engines that do not come up: what is kept of it, and how long the next one waits."""

import pytest

from cluster.starts import Starts, reason_of


def test_each_start_waits_twice_as_long_as_the_one_before_it_up_to_a_minute() -> None:
    starts = Starts()
    waits = []
    for second in range(9):
        waits.append(starts.wait_seconds)
        starts.failed("no room", float(second))
    assert waits == [0, 1, 2, 4, 8, 16, 32, 60, 60]
    assert starts.num_failed == 9
    assert starts.last_failure
    assert (starts.last_failure.at, starts.last_failure.in_a_row) == (8.0, 9)


def test_one_that_comes_up_ends_the_row_and_is_not_counted() -> None:
    starts = Starts()
    starts.failed("no room", 1.0)
    starts.succeeded()
    assert starts.wait_seconds == 0.0
    assert starts.last_failure is None
    assert starts.num_failed == 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("decode did not come up within 600 s", "decode did not come up within 600 s"),
        (
            "The actor died\n  File x\nmodel.errors.CheckpointError: a.safetensors: is not there\n",
            "model.errors.CheckpointError: a.safetensors: is not there",
        ),
        ("", "TimeoutError"),
    ],
)
def test_a_reason_is_one_line(text: str, reason: str) -> None:
    assert reason_of(TimeoutError(text)) == reason

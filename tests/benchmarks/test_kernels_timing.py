"""How the profiler's spans become times of calls, and compilation in processes."""

import math

import pytest

from benchmarks.kernels_timing import _between_spins, compile_in_parallel


def test_a_call_is_what_stands_between_two_spins() -> None:
    spans = [
        (0, 5, "fill"),
        (6, 9, "at::cuda::spin_kernel(long)"),
        (10, 20, "first"),
        (15, 32, "second, which begins before the first has ended"),
        (33, 34, "spin_kernel"),
        (40, 50, "fill"),
        (51, 52, "spin_kernel"),
        (53, 54, "spin_kernel"),
    ]
    first, second = _between_spins(spans)
    assert first == 22
    assert math.isnan(second)


def test_a_failing_job_is_named_and_the_others_are_done(capsys: pytest.CaptureFixture[str]) -> None:
    failures = compile_in_parallel([("math", "sqrt", (4,)), ("math", "sqrt", (-4,))], workers=1)
    assert list(failures) == [1]
    assert "ValueError" in failures[1]
    assert "math.sqrt(-4,)" in capsys.readouterr().out

"""What `benchmarks/kernels.py` does without a GPU: its table of cases, ratios, verdicts and files."""

import math

import pytest

from benchmarks.kernels import cases, chosen
from benchmarks.kernels_report import (
    Ceilings,
    Result,
    Times,
    from_json,
    load_recorded,
    recorded_times,
    table,
    to_json,
)

CEILINGS = Ceilings(copy=3000.0, bf16=780.0, fp8=1500.0, event_floor=4.5)


def result(ours: Times | None, peer: Times | None, error: float = 1e-3) -> Result:
    return Result(
        "fp8_gemm",
        "M64 N128 K128",
        2e6,
        3e6,
        "fp8",
        0.9,
        1.1,
        ours,
        error,
        4e-3,
        peer=peer,
        peer_name="DeepGEMM",
    )


def test_every_case_is_named_once_and_has_the_peer_it_names() -> None:
    everything, recorded = cases(), load_recorded()
    assert len({(case.kernel, case.shape) for case in everything}) == len(everything) > 60
    for case in everything:
        assert case.num_bytes > 0
        assert case.aim is None or case.at_least is not None
        if case.recorded is not None:
            times = recorded_times(recorded, *case.recorded)
            assert times is not None, case.recorded
            assert times.best_known is not None
    names = {case.kernel for case in chosen("grouped 32 experts")}
    assert names == {"grouped_fp8_gemm decode"}


def test_recorded_figures_reach_no_more_than_the_memory_and_the_tensor_cores_do() -> None:
    """A mistake in a case's bytes or operations would show as a peer beyond the ceiling."""
    ceilings, recorded = Ceilings(3029.0, 784.0, 1505.0), load_recorded()
    fractions = {}
    for case in cases():
        times = recorded_times(recorded, *case.recorded) if case.recorded else None
        if times is not None and times.best_known is not None:
            least = ceilings.microseconds(case.flop, case.num_bytes, case.precision)
            fractions[case.kernel, case.shape] = least / times.best_known
    assert max(fractions.values()) < 1.0
    assert fractions["fp8_gemm decode", "M128 N7168 K16384"] == pytest.approx(0.89, abs=0.01)
    assert fractions["paged_index_logits", "B128 ctx131072 n1"] == pytest.approx(0.96, abs=0.01)
    assert fractions["sparse_mla_decode", "B128 n1 H128"] == pytest.approx(0.44, abs=0.01)
    assert fractions["dense_mla_decode", "B128 ctx32768 H128"] == pytest.approx(0.80, abs=0.01)
    assert fractions["grouped_fp8_gemm decode", "32 experts x 32 rows N4096 K7168"] == pytest.approx(
        0.96, abs=0.01
    )


def test_a_ratio_compares_what_was_measured_alike() -> None:
    ours = Times(kernel_clean=10.0, kernel_dirty=20.0, events_dirty=40.0)
    assert result(ours, Times(12.0, 100.0, None, 100.0)).ratio == pytest.approx(1.2)
    assert result(ours, Times(None, 30.0, None, 100.0)).ratio == pytest.approx(1.5)
    assert result(ours, Times(events_dirty=100.0)).ratio == pytest.approx(2.5)
    assert result(ours, Times(events_clean=100.0)).ratio is None
    assert result(None, ours).ratio is None


@pytest.mark.parametrize(
    ("peer_us", "error", "verdict"),
    [
        (12.0, 0.0, "aim"),
        (10.0, 0.0, "ok"),
        (8.0, 0.0, "MISSED"),
        (12.0, 5e-3, "WRONG"),
        (12.0, math.nan, "WRONG"),
    ],
)
def test_verdicts(peer_us: float, error: float, verdict: str) -> None:
    assert result(Times(10.0), Times(peer_us), error).verdict == verdict


def test_a_wrong_result_has_no_ratio() -> None:
    assert result(Times(10.0), Times(12.0), math.nan).ratio is None


def test_the_table_says_what_failed_and_which_peer_is_recorded() -> None:
    good = result(Times(10.0, 11.0, 12.0, 13.0), Times(12.0))
    recorded = Result("quantize_rows", "128x7168", 0.0, 2.8e6, "bf16", None, None, Times(5.0), 0.0, 0.0,
                      peer=Times(4.0), peer_name="vLLM", peer_is_recorded=True)  # fmt: skip
    failed = Result("swiglu", "1x1", 0.0, 1.0, "bf16", 1.0, None, failure="ModuleNotFoundError: no kernel")
    lines = table([good, recorded, failed], CEILINGS).splitlines()
    assert len(lines) == 5
    assert lines[1].split()[:5] == ["fp8_gemm", "M64", "N128", "K128", "10.0"]
    assert lines[1].split()[-5:] == ["12.0", "1.20", "0.900", "1.10", "aim"]
    assert "vLLM*" in lines[2]
    assert lines[3].endswith("FAILED")
    assert lines[4] == "swiglu, 1x1: ModuleNotFoundError: no kernel"


def test_json_comes_back() -> None:
    results = [result(Times(10.0), Times(12.0)), result(None, None)]
    text = to_json(results, CEILINGS, {"machine": "NVIDIA H100 80GB HBM3", "date": "2026-11-22"})
    assert from_json(text) == (results, CEILINGS, {"machine": "NVIDIA H100 80GB HBM3", "date": "2026-11-22"})


def test_the_least_a_call_takes_is_the_larger_of_bytes_and_operations() -> None:
    assert CEILINGS.microseconds(1.5e9, 3e6, "fp8") == pytest.approx(1.0)
    assert CEILINGS.microseconds(1.5e10, 3e6, "fp8") == pytest.approx(10.0)

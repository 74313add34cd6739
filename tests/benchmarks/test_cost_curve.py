"""Dollars from times of layers: by hand, and against the published lines."""

from pathlib import Path

import pytest

from benchmarks.cost_curve import PUBLISHED, Costs, at, break_even, main, table, to_json
from benchmarks.layer_report import Measured, Point
from benchmarks.layer_report import to_json as layer_json

K = 1024


def results(experts_us: float = 200.0) -> list[Measured]:
    """Sparse attention of 100 us and 1 a K tokens; dense of 80 and 5 a K tokens. Prefill forty times that."""
    points = []
    for context in (2 * K, 4 * K, 16 * K, 128 * K):
        for mode, base, slope in (("sparse", 100, 1), ("dense", 80, 5)):
            us = base + slope * context / K
            points.append(Measured(Point("decode", mode, 64, 1, context), us, []))
            points.append(Measured(Point("prefill", mode, 1, 4096, context - 2 * K), 40 * us, []))
    for rows in (64, 4096):
        points += [
            Measured(Point("experts", "", rows, 1, 0), experts_us, []),
            Measured(Point("dense_ffn", "", rows, 1, 0), 150.0, []),
            Measured(Point("head", "", rows, 1, 0), 600.0, []),
        ]
    return points


def test_a_decode_token_costs_its_share_of_a_step() -> None:
    line = Costs.of(results(), 64).lines["decode", "sparse"]
    step_us = 61 * 116 + 58 * 200 + 3 * 150 + 600
    assert dict(line)[16 * K] == pytest.approx(step_us * 1e-6 / 64 * 2 / 3600 * 1e6)


def test_a_prompt_token_stands_in_the_middle_of_its_chunk_and_needs_no_head() -> None:
    line = Costs.of(results(), 64).lines["prefill", "dense"]
    chunk_us = 61 * 40 * 160 + 58 * 200 + 3 * 150
    assert dict(line)[16 * K] == pytest.approx(chunk_us * 1e-6 / 4096 * 2 / 3600 * 1e6)


def test_break_evens() -> None:
    costs = Costs.of(results(), 64)
    assert costs.break_even("decode") == pytest.approx(5 * K)  # 100 + x = 80 + 5 x
    assert costs.break_even("prefill") == pytest.approx(5 * K)
    assert "break-even of decode: 5.0K tokens; published 4.8K" in table(costs)
    assert break_even([(0, 1), (9, 1)], [(0, 2), (9, 3)]) is None
    assert break_even([(0, 3), (9, 4)], [(0, 2), (9, 3)]) is None


def test_the_published_lines_are_those_of_the_report() -> None:
    """As the reference interpolates them: 4K, 16K and 128K, and where they meet."""
    figures = {
        (phase, mode): [at(line, x * K) for x in (4, 16, 128)] for (phase, mode), line in PUBLISHED.items()
    }
    assert figures["prefill", "sparse"] == pytest.approx([0.085, 0.107, 0.187], abs=6e-4)
    assert figures["prefill", "dense"] == pytest.approx([0.072, 0.130, 0.666], abs=6e-4)
    assert figures["decode", "sparse"] == pytest.approx([0.147, 0.157, 0.249], abs=6e-4)
    assert figures["decode", "dense"] == pytest.approx([0.136, 0.331, 2.154], abs=6e-4)
    for phase, expected in (("prefill", 10.4), ("decode", 4.76)):
        found = break_even(PUBLISHED[phase, "sparse"], PUBLISHED[phase, "dense"])
        assert found is not None
        assert found / K == pytest.approx(expected, abs=0.1)


def test_what_was_not_measured_is_named() -> None:
    with pytest.raises(ValueError, match="no sparse decode was measured at batch 32"):
        Costs.of(results(), 32)
    with pytest.raises(ValueError, match="not measured: dense_ffn, 4096 rows"):
        Costs.of([each for each in results() if each.point.kind != "dense_ffn"], 64)


def test_from_a_file_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "layer.json"
    source.write_text(layer_json([], {}))
    with pytest.raises(ValueError, match="was measured"):
        main([str(source)])
    facts = {"machine": "NVIDIA H100", "date": "2026-11-22"}
    measured = [each for each in results() if each.point.kind not in ("decode", "prefill")]
    kernels = [
        ("_add_rms_norm_quantize", 1.0),
        ("_query_inputs", 1.0),
        ("_decode", 1.0),
        ("_add_rms_norm_quantize", 1.0),
    ]
    attention = [each for each in results() if each.point.kind in ("decode", "prefill")]
    measured += [Measured(each.point, each.microseconds, kernels) for each in attention]
    source.write_text(layer_json(measured, facts))
    main([str(source), "--batch", "64", "--out", str(tmp_path)])
    assert "decode      128.0K" in capsys.readouterr().out
    assert (tmp_path / "cost_curve_h100_2026-11-22.json").read_text() == to_json(Costs.of(measured, 64))

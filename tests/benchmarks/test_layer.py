"""The layer bench on the demo's shape and the twins of its kernels, and what it makes of a profile."""

from pathlib import Path

import pytest
import torch

from benchmarks.layer import LayerBench, _options, _points
from benchmarks.layer_report import Measured, Point, from_json, launches, parts, table, to_json
from model.config import ModelConfig
from tests.checkpoints import DEMO


def names(text: str) -> list[str]:
    return text.split()


DECODE = names("""
    _add_rms_norm_quantize _decode_kernel _gemm_kernel _attention_inputs _decode_kernel _query_inputs
    _score_pages mark_parts select_from_parts _decode _combine _latent_outputs _decode_kernel
    _add_rms_norm_quantize _gemm_kernel _choose list_all _decode_kernel
""")
DENSE = [name for name in DECODE if not name.startswith(("_score", "mark", "select"))]
SHORT_PROMPT = names("""
    _add_rms_norm_quantize tiles_kernel _gemm_kernel _attention_inputs tiles_kernel _query_inputs _gather
    gather_kernel elementwise_kernel _score_tiles _select_resident _quantize_rows tiles_kernel Cat _mark
    _attend Memcpy _quantize_rows tiles_kernel _add_rms_norm_quantize
""")
LONG_PROMPT = names("""
    _add_rms_norm_quantize tiles_kernel _gemm_kernel _attention_inputs tiles_kernel _query_inputs _gather
    gather_kernel _score_tiles select_by_marks _score_tiles select_by_marks _gemm_kernel _prefill
    _gemm_kernel Memcpy _quantize_rows tiles_kernel _add_rms_norm_quantize
""")
IN_DECODE, IN_DENSE = Point("decode", "sparse", 1, 1, 4096, 1), Point("decode", "dense", 1, 1, 4096, 1)
IN_SHORT, IN_LONG = (Point("prefill", "sparse", 1, 4096, before) for before in (0, 16384))
BEFORE = range(1, 6)  # the projections, everywhere


def measured(names: list[str], point: Point) -> Measured:
    """Kernels of 1, 2, 4, ... microseconds, so that every sum tells its parts."""
    return Measured(point, 500.0, [(name, float(2**place)) for place, name in enumerate(names)])


@pytest.mark.parametrize(
    ("names", "point", "expected"),
    [
        (DECODE, IN_DECODE, [[0, 13], BEFORE, [6], [7, 8], [9, 10], [11, 12], range(14, 18)]),
        (DENSE, IN_DENSE, [[0, 10], BEFORE, [], [], [6, 7], [8, 9], range(11, 15)]),
        (SHORT_PROMPT, IN_SHORT, [[0, 19], BEFORE, [7, 8, 9], [10], [6, *range(11, 16)], [16, 17, 18], []]),
        (LONG_PROMPT, IN_LONG, [[0, 18], BEFORE, [7, 8, 10], [9, 11], [6, 12, 13], range(14, 18), []]),
    ],
)
def test_kernels_find_their_parts(names: list[str], point: Point, expected: list[list[int]]) -> None:
    found = list(parts(measured(names, point)).values())
    assert found == [sum(2.0**place for place in places) for places in expected]


def test_a_report_comes_back_and_names_the_public_figure() -> None:
    results = [
        measured(DECODE, Point("decode", "sparse", 64, 1, 4096)),
        measured(DECODE, Point("decode", "sparse", 64, 2, 4096)),
        measured(["_decode"], Point("head", "", 64, 1, 0)),
    ]
    again, about = from_json(to_json(results, {"machine": "NVIDIA X"}))
    assert again == results
    assert about == {"machine": "NVIDIA X"}
    lines = table(results).splitlines()
    assert lines[1].split()[-2:] == ["261", "0.52"]
    assert "261" not in lines[2]
    assert "selection     select_from_parts" in launches(results[0])


@pytest.fixture(scope="module")
def bench() -> LayerBench:
    return LayerBench(ModelConfig.load(DEMO), 40, 2, device="cpu", backend="reference")


@pytest.mark.parametrize("mode", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("kind", "batch", "rows", "context"),
    [("decode", 3, 2, 700), ("decode", 5, 1, 1000), ("prefill", 1, 70, 0), ("prefill", 1, 70, 600)],
)
def test_attention_runs_as_measured(
    bench: LayerBench, mode, kind, batch: int, rows: int, context: int
) -> None:
    point = Point(kind, mode, batch, rows, context, 2)
    with torch.inference_mode():
        update, residual = bench.work(point)()
        _, normed, _ = bench.work(Point(kind, mode, batch, rows, context))()
    assert update.result().shape == residual.shape == normed.shape == (batch * rows, 256)
    assert update.result().isfinite().all()
    assert normed.isfinite().all()


def test_what_stands_beside_attention_runs(bench: LayerBench) -> None:
    with torch.inference_mode():
        plan, shared, routed = bench.work(Point("experts", "", 6, 1, 0))()
        inner = bench.work(Point("dense_ffn", "", 6, 1, 0))()
        logits = bench.work(Point("head", "", 6, 1, 0))()
    assert plan.experts.shape == (6, 8)
    assert shared.shape == (6, 256)
    assert routed.shape == (6 * 8, 256)
    assert inner.shape == (6, 256)
    assert logits.shape == (6, 8192)


def test_the_points_of_a_whole_run() -> None:
    points = _points(_options([]))
    assert len(points) == len(set(points)) == 100 + 10 + 3 * 8
    assert Point("decode", "dense", 128, 2, 131072) in points
    assert Point("prefill", "sparse", 1, 4096, 0) in points
    few = _points(
        _options(["--batch", "64", "--context", "4096", "--prefill", "--rows", "1", "--groups", "1"])
    )
    assert [str(point) for point in few[:2]] == [
        "decode sparse, 64 x 1 rows at 4096",
        "decode dense, 64 x 1 rows at 4096",
    ]
    assert Point("decode", "sparse", 64, 1, 4096, 1) in few


def test_the_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.layer_report import draw

    points = [Point("decode", mode, 64, 1, at) for mode in ("sparse", "dense") for at in (4096, 131072)]
    points += [Point("prefill", "sparse", 1, 4096, at) for at in (0, 16384)]
    draw([measured(DECODE, point) for point in points], tmp_path / "layer.png", "somewhere")
    assert (tmp_path / "layer.png").stat().st_size > 10_000

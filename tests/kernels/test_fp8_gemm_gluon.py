import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from triton.experimental.gluon._runtime import GluonASTSource

import kernels.fp8_gemm_gluon as module
import kernels.grouped_fp8_gluon
from kernels.fp8_gemm_gluon import GluonPrefill, fits_gluon, gluon_config, launch_gluon, scales_fit_gluon
from kernels.fp8_gemm_prefill import config_on as dense_config_on
from kernels.fp8_gemm_prefill import prefill_config
from kernels.fp8_tiles_gluon import tiles_kernel
from kernels.grouped_fp8_gluon import _arranged, _gathered, launch_grouped_gluon
from kernels.grouped_fp8_prefill import Prefill as GroupedPrefill
from kernels.grouped_fp8_prefill import config_on as grouped_config_on
from tests.kernels import test_fp8_gemm as dense
from tests.kernels import test_grouped_fp8_gemm as grouped
from tests.kernels.compiled import HOPPER, _resources

CONFIGS = [GluonPrefill(256, 3, 6, 132), GluonPrefill(128, 5, 8, 132)]


def test_configurations() -> None:
    assert gluon_config(4096, 2112, 132) == CONFIGS[0]  # 16 rows of 16.5 tiles are two waves
    assert gluon_config(4096, 7168, 132) == CONFIGS[0]
    assert gluon_config(257, 2112, 132) == CONFIGS[1]
    assert gluon_config(1024, 4096, 132) == CONFIGS[0]


def test_what_fits() -> None:
    assert fits_gluon(2112, torch.bfloat16)
    assert not fits_gluon(2112, torch.float32)
    assert not fits_gluon(2115, torch.bfloat16)
    scales = torch.zeros(3, 8).t()
    assert scales_fit_gluon(scales)
    assert scales_fit_gluon(scales[:5])
    assert not scales_fit_gluon(scales.contiguous())
    assert not scales_fit_gluon(scales[1:])
    assert not scales_fit_gluon(torch.zeros(3, 7).t())


def test_elsewhere_the_portable_kernel_runs(generator: torch.Generator) -> None:
    x, x_scales, _, _ = dense.operands(300, 128, 256, generator)
    assert dense_config_on(x, x_scales, torch.bfloat16, 128) == prefill_config(256)
    assert isinstance(grouped_config_on(x.device, torch.bfloat16, 300, 128), GroupedPrefill)


def compiled(config: GluonPrefill, *, is_grouped: bool = False, narrow: bool = False) -> tuple[Any, int]:
    def described(kind: str, rows: str, layout: object) -> str:
        return f"tensordesc<{kind}[{rows}],{layout!r}>"

    arguments = {
        "x": described("fp8e4nv", "64, 128", module._VALUES),
        "x_scales": described("fp32", "64", module._SCALES),
        "weight": described("fp8e4nv", "128, 128", module._VALUES),
        "weight_scales": "*fp32",
        "tiles": "*i32",
        "out_described": described("bf16", "64, 128", module._RESULTS),
        "out": "*bf16",
    } | dict.fromkeys(("row_tiles", "T", "N", "K", "x_scale_stride"), "i32")
    constants = {
        "ROWS": config.tokens,
        "GROUPED": is_grouped,
        "NARROW": narrow,
        "GROUP": config.group,
        "STAGES": config.stages,
        "REGISTERS": module._REGISTERS,
    }
    kernel = tiles_kernel
    aligned = [name for name, kind in arguments.items() if kind.startswith("*") or name in ("N", "K")]
    source = GluonASTSource(
        kernel,
        {name: arguments.get(name, "constexpr") for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    binary = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    return binary, _resources(binary.asm["cubin"])[1]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("form", ["dense", "narrow", "grouped"])
def test_compiles_for_hopper(config: GluonPrefill, form: str) -> None:
    binary, stack = compiled(config, is_grouped=form == "grouped", narrow=form == "narrow")
    assert stack == 0  # nothing spilled
    assert binary.metadata.shared <= 227 * 1024
    ptx, parts = binary.asm["ptx"], config.tokens // 64
    # Two warp groups, each with its half of the rows, 4 products a block; the narrow column has its own.
    assert len(re.findall(r"wgmma\.mma_async", ptx)) == 4 * parts * (2 if form == "narrow" else 1)
    assert len(re.findall(r"cp\.async\.bulk\.tensor\S*\.global\.mbarrier", ptx)) == 1 + 2 * parts
    assert re.search(r"setmaxnreg\.inc\S*\s+240", ptx)


@pytest.fixture
def on_cpu(interpreted: Callable[..., None]) -> None:
    interpreted(kernels.grouped_fp8_gluon)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("gather", [False, True])
def test_tiles_and_what_is_laid_out_for_them(gather: bool, generator: torch.Generator) -> None:
    counts = [0, 70, 64, 1, 0, 130, 0]
    x, x_scales, _, _, offsets, rows = grouped.operands(counts, 128, 256, gather, generator)
    max_tiles = sum(counts) // 64 + len(counts)
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32)
    kernels.grouped_fp8_gluon._number_tiles[(1,)](offsets, tiles, len(counts), max_tiles, ROWS=64, E=8)
    expected = [
        (1, 0, 70),
        (1, 64, 70),
        (2, 70, 134),
        (3, 134, 135),
        (5, 135, 265),
        (5, 199, 265),
        (5, 263, 265),
    ]
    assert tiles[0] == len(expected)
    assert tiles[1:22].view(-1, 3).tolist() == [list(tile) for tile in expected]
    source = torch.arange(sum(counts)) if rows is None else rows.long()
    scales = _arranged(x_scales, tiles, rows, max_tiles, 64)
    assert scales_fit_gluon(scales)
    for nth, (_, first, end) in enumerate(expected):
        picked = source[first : min(first + 64, end)]
        assert torch.equal(scales[64 * nth :][: len(picked)], x_scales[picked])
    if rows is not None:
        found = _gathered(x, torch.cat([rows, rows.new_full((9,), -1)]), offsets, sum(counts) + 9)
        assert torch.equal(found.view(torch.uint8)[: sum(counts)], x.view(torch.uint8)[source])


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("shape", [(2112, 1024), (320, 256), (1536, 256), (64, 128), (8, 128)])
@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 255, 256, 257, 2047, 2049])
def test_dense_on_gpu(
    config: GluonPrefill, num_rows: int, shape: tuple[int, int], generator: torch.Generator
) -> None:
    x, x_scales, weight, weight_scales = dense.operands(num_rows, *shape, generator)
    padded = torch.zeros(x_scales.shape[1], -(-num_rows // 4) * 4)
    padded[:, :num_rows] = x_scales.t()
    given = x.cuda(), padded.cuda().t()[:num_rows], weight.cuda(), weight_scales.cuda()
    out = torch.empty(num_rows, shape[0], dtype=torch.bfloat16, device="cuda")
    launch_gluon(*given, out, config)
    assert dense.relative_error(out, dense.product(*given)) < 2.5e-3  # rounding to bf16 alone is 1.7e-3
    again = torch.empty_like(out)
    launch_gluon(*given, again, config)
    assert torch.equal(out.view(torch.int16), again.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("counts", grouped.COUNTS.values(), ids=grouped.COUNTS)
def test_grouped_on_gpu(
    counts: list[int], gather: bool, config: GluonPrefill, generator: torch.Generator
) -> None:
    x, x_scales, weights, weight_scales, offsets, rows = grouped.operands(counts, 320, 512, gather, generator)
    # Room for five rows more than experts have.
    x = torch.cat([x.view(torch.uint8), torch.zeros(5, 512, dtype=torch.uint8)]).view(x.dtype)
    x_scales = torch.cat([x_scales, torch.ones(5, 4)])
    if rows is not None:
        rows = torch.cat([rows, rows.new_full((5,), -1)]).cuda()
    given = x.cuda(), x_scales.cuda(), weights.cuda(), weight_scales.cuda(), offsets.cuda()
    out = torch.full((sum(counts) + 5, 320), 7.0, dtype=torch.bfloat16, device="cuda")
    launch_grouped_gluon(*given, rows, out, config)
    assert (out[sum(counts) :] == 7.0).all()
    if sum(counts):
        expected = grouped.product(*given, None if rows is None else rows[:-5])
        assert grouped.relative_error(out[: sum(counts)], expected) < 2.5e-3

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.fp8_tiles
import kernels.grouped_fp8_gemm
import kernels.grouped_fp8_prefill
from kernels.backend import UnsupportedKernel
from kernels.grouped_fp8_gemm import _config_for, _Decode, _launch, grouped_fp8_gemm
from kernels.grouped_fp8_prefill import Prefill
from tests.kernels.compiled import Compiled, compile_for_hopper

FULL_SIZE = [(4096, 7168), (7168, 2048)]
EXPECTED_ROWS = [1, 4, 8, 16, 32, 64, 96, 128, 129, 256, 8192]
MODULES = kernels.grouped_fp8_gemm, kernels.grouped_fp8_prefill, kernels.fp8_tiles
PREFILL = Prefill(64, "none", warps=4, stages=2, tma=False, group=2)
DECODE = _Decode(64, 16, warps=4, stages=2, tma=False)


def operands(
    counts: list[int], num_outputs: int, num_inputs: int, gather: bool, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Values on the e4m3 grid; scales of rows are powers of two, transposed in memory."""
    num_rows, blocks, num_experts = sum(counts), num_inputs // 128, len(counts)
    num_tokens = max(1, num_rows // 2) if gather else num_rows
    x = torch.randn(num_tokens, num_inputs, generator=generator).to(torch.float8_e4m3fn)
    weights = torch.randn(num_experts, num_outputs, num_inputs, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(-6, 3, (blocks, -(-num_tokens // 4) * 4), generator=generator)
    x_scales = torch.exp2(exponents.float()).t()[:num_tokens]
    weight_scales = torch.rand(num_experts, -(-num_outputs // 128), blocks, generator=generator) + 0.1
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    rows = torch.randint(num_tokens, (num_rows,), generator=generator).int() if gather else None
    return x, x_scales, weights, weight_scales, offsets, rows


def product(
    x: Tensor, x_scales: Tensor, weights: Tensor, weight_scales: Tensor, offsets: Tensor, rows: Tensor | None
) -> Tensor:
    """In float64, row by row of experts, scaled number by number."""
    wide = x.double() * x_scales.double().repeat_interleave(128, 1)
    wide = wide if rows is None else wide[rows.long()]
    parts = []
    for expert, weight in enumerate(weights):
        scales = weight_scales[expert].double().repeat_interleave(128, 0).repeat_interleave(128, 1)
        scaled = weight.double() * scales[: weight.shape[0]]
        parts.append(wide[int(offsets[expert]) : int(offsets[expert + 1])] @ scaled.t())
    return torch.cat(parts)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.fixture
def on_cpu(interpreted: Callable[..., None]) -> None:
    interpreted(*MODULES)


@pytest.mark.parametrize("gather", [False, True])
def test_reference(gather: bool, generator: torch.Generator) -> None:
    given = operands([3, 0, 5, 1], 130, 256, gather, generator)
    found = grouped_fp8_gemm(*given, out_dtype=torch.float32, backend="reference")
    assert relative_error(found, product(*given)) < 1e-6


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(
    "config",
    [PREFILL, PREFILL._replace(two="tokens"), PREFILL._replace(two="outputs"), DECODE],
    ids=["one", "two of tokens", "two of outputs", "decode"],
)
def test_interpreted(config: Any, gather: bool, tma: bool, generator: torch.Generator) -> None:
    given = operands([0, 70, 1, 0, 0, 20, 0], 200, 256, gather, generator)
    # More room than rows: what is beyond them stays as it was, which is NaN here.
    given = *given[:5], None if given[5] is None else torch.cat([given[5], given[5].new_full((9,), -1)])
    num_rows = 91 if given[5] is None else 100
    found = _launch(*given, num_rows, torch.float32, config._replace(tma=tma))
    assert relative_error(found[:91], product(*given[:5], None if given[5] is None else given[5][:91])) < 1e-6
    assert found[91:].isnan().all()


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("config", [PREFILL, DECODE], ids=["prefill", "decode"])
def test_no_rows_at_all(config: Any, generator: torch.Generator) -> None:
    given = operands([0, 0, 0], 64, 128, False, generator)
    assert _launch(*given, 0, torch.float32, config).shape == (0, 64)
    nobody = torch.zeros(5, 128).to(torch.float8_e4m3fn), torch.ones(5, 1), *given[2:]
    assert _launch(*nobody, 5, torch.float32, config).isnan().all()


def test_no_experts(generator: torch.Generator) -> None:
    x, x_scales, weights, weight_scales, offsets, _ = operands([5], 64, 128, False, generator)
    given = x, x_scales, weights[:0], weight_scales[:0], offsets[:1], None
    assert grouped_fp8_gemm(*given, backend="triton").shape == (5, 64)


def test_refusals(generator: torch.Generator) -> None:
    x, x_scales, weights, weight_scales, offsets, rows = operands([2, 3], 64, 256, True, generator)
    with pytest.raises(UnsupportedKernel, match=r"is not e4m3 by e4m3$"):
        grouped_fp8_gemm(x.float(), x_scales, weights, weight_scales, offsets, rows, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"scales "):
        grouped_fp8_gemm(x, x_scales[:, :1], weights, weight_scales, offsets, rows, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"offsets \(2,\) are not one more than 2 experts$"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales, offsets[:2], rows, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"offsets must be int32"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales, offsets.long(), rows, backend="triton")
    assert rows is not None
    with pytest.raises(UnsupportedKernel, match=r"offsets and rows must be contiguous$"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales, offsets, rows[::2], backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"scales are .*, not float32$"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales.half(), offsets, rows, backend="triton")
    shifted = torch.zeros(x.numel() + 8, dtype=x.dtype)[8:].view(x.shape)
    with pytest.raises(UnsupportedKernel, match=r"x must begin at a multiple of 16 bytes$"):
        grouped_fp8_gemm(shifted, x_scales, weights, weight_scales, offsets, rows, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"9 rows are more than are given$"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales, offsets, rows, num_rows=9, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"has no 'deterministic'"):
        grouped_fp8_gemm(x, x_scales, weights, weight_scales, offsets, rows, backend="deterministic")


def compiled(config: _Decode | Prefill, gather: bool) -> Compiled:
    arguments = dict.fromkeys(("x_scales", "weight_scales"), "*fp32")
    arguments |= {"offsets": "*i32", "source_rows": "*i32", "out": "*bf16", "x": "*fp8e4nv"}
    arguments |= {"weights": "*fp8e4nv", "N": "i32", "K": "i32", "x_scale_stride_k": "i32"}
    options = {"num_warps": config.warps, "aligned": ("N", "K")}
    outputs = config.outputs if isinstance(config, _Decode) else 128
    if config.tma:
        arguments["weights"] = f"tensordesc<fp8e4nv[{outputs}, 128]>"
    shape = {"BT": config.tokens, "GATHER": gather, "TMA_W": config.tma, "x_scale_stride_t": 1}
    if isinstance(config, _Decode):
        kernel = kernels.grouped_fp8_gemm._decode_kernel
        return compile_for_hopper(
            kernel, arguments, {**shape, "BN": outputs, "STAGES": config.stages}, **options
        )
    tma_x = config.tma and not gather
    if tma_x:
        arguments["x"] = f"tensordesc<fp8e4nv[{config.tokens}, 128]>"
    return compile_for_hopper(
        kernels.grouped_fp8_prefill._prefill_kernel,
        {**arguments, "E": "i32"},
        {
            **shape,
            "BITS": 5,
            "TWO_X": config.two == "tokens",
            "TWO_W": config.two == "outputs",
            "TMA_X": tma_x,
            "GROUP": config.group,
            "STAGES": config.stages,
        },
        **options,
    )


CASES = sorted({(_config_for(n), g) for n in EXPECTED_ROWS for g in (False, True)}, key=str)


@pytest.mark.parametrize(("config", "gather"), CASES, ids=str)
def test_compiles_for_hopper(config: _Decode | Prefill, gather: bool) -> None:
    made = compiled(config, gather)
    assert made.spilled == 0
    assert made.wgmma > 0
    assert made.mma_sync == 0
    assert made.tma > 0 if config.tma else made.cp_async > 0
    assert made.cp_async > 0 if gather else True
    assert made.shared <= 227 * 1024


COUNTS = {
    "one each": [1] * 16,
    "edges": [63, 0, 64, 1, 65, 0, 0, 128, 129],
    "one has all": [0, 0, 500, 0],
    "many": [257, 2047, 0, 1000],
    "none": [0, 0, 0, 0],
}


@pytest.mark.gpu
@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("expected", [1, 32, 96, 1000])
@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("shape", [(512, 1024), (256, 256), (320, 128)])
def test_against_float64(
    shape: tuple[int, int], counts: list[int], expected: int, gather: bool, generator: torch.Generator
) -> None:
    x, x_scales, *others = operands(counts, *shape, gather, generator)
    on_gpu: list[Any] = [None if tensor is None else tensor.cuda() for tensor in others]
    given = x.cuda(), x_scales.t().contiguous().cuda().t(), *on_gpu
    found = grouped_fp8_gemm(*given, expected_rows=expected, backend="triton")
    if sum(counts):
        assert relative_error(found, product(*given)) < 2.5e-3  # rounding to bf16 alone is 1.7e-3


@pytest.mark.gpu
@pytest.mark.parametrize("shape", FULL_SIZE)
@pytest.mark.parametrize("count", [8, 96, 300])
def test_full_size(shape: tuple[int, int], count: int, generator: torch.Generator) -> None:
    x, x_scales, *others = operands([count, 0, count + 1, 1], *shape, True, generator)
    on_gpu: list[Any] = [tensor.cuda() for tensor in others if tensor is not None]
    given = x.cuda(), x_scales.t().contiguous().cuda().t(), *on_gpu
    found = grouped_fp8_gemm(*given, expected_rows=count, backend="triton")
    assert relative_error(found, product(*given)) < 2.5e-3

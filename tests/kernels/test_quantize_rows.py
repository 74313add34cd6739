from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.quantize_rows
from kernels.backend import Backend, UnsupportedKernel
from kernels.fp8_quant import dequantize_reference
from kernels.quantize_rows import _Config, _config_for, _quantize_rows, quantize_rows
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU, assert_alike


def rows_of(num_rows: int, width: int, generator: torch.Generator) -> Tensor:
    """Groups of very different sizes, one all zero, one tiny, some at exact powers of two."""
    x = torch.randn(num_rows, width // 128, 128, generator=generator)
    x *= torch.exp2(torch.randint(-20, 20, (num_rows, width // 128, 1), generator=generator))
    if num_rows:
        x[0, 0] = 0
        x[-1, -1] = torch.linspace(-448, 448, 128)
    return x.flatten(1)


def check(x: Tensor, backend: Backend) -> None:
    values, scales = quantize_rows(x, backend=backend)
    expected, expected_scales = quantize_rows(x, backend="reference")
    assert_alike(values, expected)
    assert torch.equal(scales, expected_scales)
    assert x.numel() == 0 or (scales.stride(0) == 1 and scales.stride(1) % 4 == 0)


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_interpreted_equals_reference(
    num_rows: int, dtype: torch.dtype, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.quantize_rows)
    check(rows_of(num_rows, 384, generator).to(dtype), "triton")


def test_interpreted_reads_strided_rows_and_writes_every_config(
    generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.quantize_rows)
    x = rows_of(6, 512, generator).bfloat16()[:, :256]
    expected, expected_scales = quantize_rows(x, backend="reference")
    for config in (_Config(1, 1, 4), _Config(4, 4, 4), _Config(8, 2, 4)):
        values, scales = kernels.quantize_rows._launch(x, config)
        assert_alike(values, expected)
        assert torch.equal(scales, expected_scales)


def test_reference_keeps_what_it_quantises(generator: torch.Generator) -> None:
    x = torch.randn(7, 256, generator=generator)
    values, scales = quantize_rows(x, backend="reference")
    torch.testing.assert_close(dequantize_reference(values, scales, 128), x, rtol=0.07, atol=1e-3)


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match="groups of 128"):
        quantize_rows(torch.zeros(2, 100), backend="triton")
    with pytest.raises(UnsupportedKernel, match="bf16 or fp32"):
        quantize_rows(torch.zeros(2, 128, dtype=torch.float16), backend="triton")
    with pytest.raises(UnsupportedKernel, match="contiguous"):
        quantize_rows(torch.zeros(128, 128).t(), backend="triton")
    with pytest.raises(UnsupportedKernel, match="deterministic"):
        quantize_rows(torch.zeros(2, 128), backend="deterministic")


@pytest.mark.parametrize("num_rows", [128, 4096])
@pytest.mark.parametrize("width", [2048, 7168, 16384])
def test_compiled_moves_whole_vectors(num_rows: int, width: int) -> None:
    config = _config_for(num_rows, width)
    compiled = compile_for_hopper(
        _quantize_rows,
        {
            "x_ptr": "*bf16",
            "values_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "num_rows": "i32",
            "x_stride": "i32",
            "scale_stride": "i32",
        },
        {"NUM_GROUPS": width // 128, "ROWS": config.rows, "GROUPS": config.groups},
        num_warps=config.num_warps,
        aligned=("x_stride",),
    )
    assert compiled.spilled == 0
    assert "ld.global.v4.b32" in compiled.ptx
    assert "cvt.rn.satfinite.e4m3x2" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "width"), [(1, 128), (63, 256), (65, 7168), (4096, 2048), (300, 1536)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu(num_rows: int, width: int, dtype: torch.dtype, generator: torch.Generator) -> None:
    check(rows_of(num_rows, width, generator).to(GPU, dtype), "triton")

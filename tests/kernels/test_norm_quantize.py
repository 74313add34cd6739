from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.norm_quantize
from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import dequantize_reference
from kernels.norm_quantize import NormedRows, _add_rms_norm_quantize, _config_for, add_rms_norm_quantize
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU, assert_alike

EPS = 1e-6


def assert_same(actual: NormedRows, expected: NormedRows, differing: float) -> None:
    for name in ("values", "scales", "normed", "residual"):
        one, other = getattr(actual, name), getattr(expected, name)
        assert (one is None) == (other is None), name
        if one is not None:
            assert_alike(one, other, differing=differing)


def check(
    num_rows: int,
    width: int,
    generator: torch.Generator,
    device: torch.device,
    differing: float,
    **options: Any,
) -> None:
    x = torch.randn(num_rows, width, generator=generator).to(device, options.pop("dtype", torch.bfloat16))
    residual: Tensor | None = None
    if options.pop("residual"):
        residual = (torch.randn(num_rows, width, generator=generator) * 4).to(device, torch.bfloat16)
    weight = (torch.rand(width, generator=generator) + 0.5).to(device)
    actual = add_rms_norm_quantize(x, residual, weight, EPS, backend="triton", **options)
    expected = add_rms_norm_quantize(x, residual, weight, EPS, backend="reference", **options)
    assert_same(actual, expected, differing)
    if residual is None:
        assert actual.residual is x


@pytest.mark.parametrize("num_rows", [0, 1, 3])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize(("quantize", "keep_normed"), [(True, True), (True, False), (False, True)])
def test_interpreted_equals_reference(
    num_rows: int,
    residual: bool,
    quantize: bool,
    keep_normed: bool,
    generator: torch.Generator,
    interpreted: Callable[..., None],
) -> None:
    interpreted(kernels.norm_quantize)
    options = {"residual": residual, "quantize": quantize, "keep_normed": keep_normed}
    check(num_rows, 384, generator, torch.device("cpu"), 5e-3, **options)


def test_interpreted_adds_float32_and_takes_several_rows(
    generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.norm_quantize)
    check(2, 256, generator, torch.device("cpu"), 5e-3, residual=True, keep_normed=True, dtype=torch.float32)
    check(265, 128, generator, torch.device("cpu"), 5e-3, residual=True, keep_normed=True)


def test_reference_is_the_norm(generator: torch.Generator) -> None:
    x, residual = torch.randn(2, 4, 256, generator=generator).bfloat16()
    weight = torch.rand(256, generator=generator)
    rows = add_rms_norm_quantize(x, residual, weight, EPS, keep_normed=True, backend="reference")
    total = x.double() + residual.double()
    normed = total / (total.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    assert rows.normed is not None
    assert rows.values is not None
    assert rows.scales is not None
    torch.testing.assert_close(rows.normed.double(), normed, rtol=8e-3, atol=1e-6)
    wide = dequantize_reference(rows.values, rows.scales, 128)
    torch.testing.assert_close(wide, rows.normed.float(), rtol=0.07, atol=1e-3)
    torch.testing.assert_close(rows.residual.double(), total, rtol=8e-3, atol=0)


def test_refusals() -> None:
    x, weight = torch.zeros(2, 256, dtype=torch.bfloat16), torch.ones(256)
    with pytest.raises(UnsupportedKernel, match="must be bf16"):
        add_rms_norm_quantize(x.float(), None, weight, EPS, keep_normed=False, backend="triton")
    with pytest.raises(UnsupportedKernel, match="of x's shape"):
        add_rms_norm_quantize(x, x[:1], weight, EPS, keep_normed=False, backend="triton")
    with pytest.raises(UnsupportedKernel, match="not float32"):
        add_rms_norm_quantize(x, None, weight.bfloat16(), EPS, keep_normed=False, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"weight is torch.float32 \(128,\), not"):
        add_rms_norm_quantize(x, None, weight[:128], EPS, keep_normed=False, backend="triton")
    with pytest.raises(UnsupportedKernel, match="groups of 128"):
        add_rms_norm_quantize(x[:, :100], None, weight[:100], EPS, keep_normed=False, backend="triton")


@pytest.mark.parametrize("num_rows", [128, 4096])
@pytest.mark.parametrize("width", [1536, 7168])
def test_compiled_keeps_the_row_in_registers(num_rows: int, width: int) -> None:
    config = _config_for(num_rows, width)
    pointers = {"x": "bf16", "residual": "bf16", "weight": "fp32", "values": "fp8e4nv", "scales": "fp32"}
    pointers |= {"normed": "bf16", "total": "bf16"}
    integers = ("num_rows", "x_stride", "residual_stride", "scale_stride")
    compiled = compile_for_hopper(
        _add_rms_norm_quantize,
        {f"{name}_ptr": f"*{kind}" for name, kind in pointers.items()}
        | dict.fromkeys(integers, "i32")
        | {"eps": "fp32"},
        {
            "WIDTH": width,
            "GROUPS": 64 if width == 7168 else 16,
            "ROWS": config.rows,
            "HAS_RESIDUAL": True,
            "QUANTIZE": True,
            "KEEP_NORMED": True,
        },
        num_warps=config.num_warps,
        aligned=("x_stride", "residual_stride"),
    )
    assert compiled.spilled == 0
    assert compiled.registers <= 64
    assert "st.global.v4.b32" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize(("num_rows", "width"), [(1, 256), (65, 7168), (2049, 7168), (300, 1536)])
@pytest.mark.parametrize("residual", [True, False])
def test_gpu(num_rows: int, width: int, residual: bool, generator: torch.Generator) -> None:
    check(num_rows, width, generator, GPU, 2e-3, residual=residual, keep_normed=True)


@pytest.mark.gpu
def test_gpu_other_forms(generator: torch.Generator) -> None:
    check(65, 7168, generator, GPU, 2e-3, residual=True, keep_normed=False, dtype=torch.float32)
    check(65, 7168, generator, GPU, 2e-3, residual=True, keep_normed=True, quantize=False)
    check(0, 7168, generator, GPU, 2e-3, residual=True, keep_normed=True)

from collections.abc import Callable

import pytest
import torch

import kernels.swiglu_quantize
from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import dequantize_reference
from kernels.swiglu_quantize import _config_for, _swiglu_quantize, swiglu_quantize
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU, assert_alike


def check(
    num_rows: int,
    inner: int,
    valid: int | None,
    generator: torch.Generator,
    device: torch.device,
    differing: float,
) -> None:
    gate_up = (torch.randn(num_rows, 2 * inner, generator=generator) * 6).to(device, torch.bfloat16)
    num_valid = None if valid is None else torch.tensor([valid], dtype=torch.int32, device=device)
    values, scales = swiglu_quantize(gate_up, num_valid=num_valid, backend="triton")
    expected, expected_scales = swiglu_quantize(gate_up, num_valid=num_valid, backend="reference")
    assert_alike(values[:valid], expected[:valid], differing=differing)
    assert_alike(scales[:valid], expected_scales[:valid], differing=differing)
    if valid is not None:
        assert (values[valid:].view(torch.uint8) == 0x7F).all(), "rows that are not there were written"


@pytest.mark.parametrize(("num_rows", "valid"), [(0, None), (1, None), (5, None), (5, 3), (5, 0), (1030, 2)])
def test_interpreted_equals_reference(
    num_rows: int, valid: int | None, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.swiglu_quantize)
    check(num_rows, 384 if num_rows < 9 else 128, valid, generator, torch.device("cpu"), 2e-3)


def test_reference_is_swiglu(generator: torch.Generator) -> None:
    gate_up = torch.randn(4, 256, generator=generator).bfloat16()
    values, scales = swiglu_quantize(gate_up, backend="reference")
    gate, up = gate_up.double().chunk(2, dim=-1)
    expected = gate / (1 + (-gate).exp()) * up
    actual = dequantize_reference(values, scales, 128).double()
    torch.testing.assert_close(actual, expected, rtol=0.07, atol=0.01)


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match="two halves"):
        swiglu_quantize(torch.zeros(2, 384, dtype=torch.bfloat16), backend="triton")
    with pytest.raises(UnsupportedKernel, match="not bf16"):
        swiglu_quantize(torch.zeros(2, 256), backend="triton")
    with pytest.raises(UnsupportedKernel, match="one int32"):
        swiglu_quantize(torch.zeros(2, 256), num_valid=torch.zeros(1), backend="triton")


@pytest.mark.parametrize("num_rows", [1024, 32768])
def test_compiled_moves_whole_vectors(num_rows: int) -> None:
    config = _config_for(num_rows, 2048)
    compiled = compile_for_hopper(
        _swiglu_quantize,
        {
            "gate_up_ptr": "*bf16",
            "num_valid_ptr": "*i32",
            "values_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "num_rows": "i32",
            "gate_up_stride": "i32",
            "scale_stride": "i32",
        },
        {"NUM_GROUPS": 16, "ROWS": config.rows, "GROUPS": config.groups, "HAS_NUM_VALID": True},
        num_warps=config.num_warps,
        aligned=("gate_up_stride",),
    )
    assert compiled.spilled == 0
    assert "ld.global.v4.b32" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_rows", "inner", "valid"), [(1, 128, None), (65, 2048, None), (4099, 2048, 1000), (63, 768, 0)]
)
def test_gpu(num_rows: int, inner: int, valid: int | None, generator: torch.Generator) -> None:
    check(num_rows, inner, valid, generator, GPU, 2e-3)

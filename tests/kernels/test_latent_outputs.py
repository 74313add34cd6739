from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.latent_outputs
from kernels.backend import Backend, UnsupportedKernel
from kernels.latent_outputs import _config_for, _latent_outputs, latent_outputs
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU, assert_alike


def inputs(num_rows: int, heads: int, v: int, c: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    attended = torch.randn(num_rows, heads, c, generator=generator)
    w_uv = torch.randn(heads, v, c, generator=generator) * c**-0.5
    return attended.bfloat16(), w_uv.bfloat16()


def check(attended: Tensor, w_uv: Tensor, backend: Backend, differing: float) -> None:
    values, scales = latent_outputs(attended, w_uv, backend=backend)
    expected, expected_scales = latent_outputs(attended, w_uv, backend="reference")
    assert_alike(values, expected, differing=differing)
    # A sum that rounds to another bf16 can move a group's largest value over a power of two.
    assert (scales != expected_scales).sum() <= differing * scales.numel()


@pytest.mark.parametrize(
    ("num_rows", "heads", "v", "c"), [(0, 2, 128, 512), (3, 2, 128, 128), (5, 8, 32, 128)]
)
def test_interpreted_equals_reference(
    num_rows: int,
    heads: int,
    v: int,
    c: int,
    generator: torch.Generator,
    interpreted: Callable[..., None],
) -> None:
    interpreted(kernels.latent_outputs)
    check(*inputs(num_rows, heads, v, c, generator), "triton", 0.01)


def test_reference_is_product_and_quantisation(generator: torch.Generator) -> None:
    attended, w_uv = inputs(4, 3, 128, 64, generator)
    values, scales = latent_outputs(attended, w_uv, backend="reference")
    product = torch.stack([attended[:, h].double() @ w_uv[h].double().t() for h in range(3)], dim=1)
    found = values.double().unflatten(1, (3, 128)) * scales.double().unsqueeze(-1)
    torch.testing.assert_close(found, product, rtol=0.08, atol=0.02)


@pytest.mark.parametrize("num_rows", [1, 32, 64, 128, 4096])
@pytest.mark.parametrize(("heads", "v", "c"), [(128, 128, 512), (8, 32, 128)])
def test_compiles_for_hopper(num_rows: int, heads: int, v: int, c: int) -> None:
    config = _config_for(num_rows)
    compiled = compile_for_hopper(
        _latent_outputs,
        {
            "attended_ptr": "*bf16",
            "w_uv_ptr": "*bf16",
            "values_ptr": "*fp8e4nv",
            "scales_ptr": "*fp32",
            "num_rows": "i32",
            "scale_stride": "i32",
        },
        {
            "H": heads,
            "V": v,
            "C": c,
            "HEADS": 128 // v,
            "ROWS": config.rows,
            "CHANNELS": config.channels,
            "UPCAST": False,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    assert compiled.spilled == 0
    assert compiled.shared <= 227 * 1024
    if v == 128:
        assert compiled.wgmma > 0
        assert compiled.mma_sync == 0
        assert compiled.cp_async > 0


def test_refusals(generator: torch.Generator) -> None:
    attended, w_uv = inputs(2, 3, 32, 128, generator)
    with pytest.raises(
        UnsupportedKernel, match=r"^latent_outputs: 3 heads of 32 channels make no groups of 128$"
    ):
        latent_outputs(attended, w_uv, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^latent_outputs: attended \(2, 3, 128\) does not fit w_uv"):
        latent_outputs(attended, w_uv[:2], backend="reference")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 17, 128, 1000])
@pytest.mark.parametrize(("heads", "v", "c"), [(128, 128, 512), (8, 32, 128)])
def test_gpu(num_rows: int, heads: int, v: int, c: int, generator: torch.Generator) -> None:
    attended, w_uv = inputs(num_rows, heads, v, c, generator)
    check(attended.to(GPU), w_uv.to(GPU), "triton", 0.01)

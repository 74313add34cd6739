from collections.abc import Callable

import pytest
import torch

import kernels.query_inputs
from kernels.backend import UnsupportedKernel
from kernels.query_inputs import _config_for, _query_inputs, query_inputs
from tests.kernels.compiled import Compiled, compile_for_hopper
from tests.kernels.fused import GPU, assert_alike

CPU = torch.device("cpu")
# Index heads and their channels, attention heads, nope and rotated channels, latent channels.
DEMO = (8, 64, 8, 32, 32, 128)
FULL_SIZE = (64, 128, 128, 128, 64, 512)


def check(
    dims: tuple[int, ...],
    num_rows: int,
    generator: torch.Generator,
    device: torch.device,
    differing: float,
    *,
    absorb: bool = False,
) -> None:
    index_heads, dim, heads, nope, rope_dim, latent = dims
    width = heads * (nope + rope_dim)
    projected = torch.randn(num_rows, width + index_heads * dim, generator=generator)
    projected[:, ::37] *= 20  # outliers, which Hadamard spreads
    projected = projected.to(device, torch.bfloat16)
    q = projected[:, :width].unflatten(1, (heads, -1))
    w_uk = (torch.randn(heads, latent, nope, generator=generator) * nope**-0.5).to(device, torch.bfloat16)
    index_q = projected[:, width:].unflatten(1, (index_heads, dim))
    weights = torch.randn(num_rows, index_heads, generator=generator).to(device)
    angles = torch.randn(num_rows, rope_dim // 2, generator=generator).to(device) * 9
    actual_q, expected_q = (
        torch.zeros(num_rows, heads, latent + rope_dim, dtype=torch.bfloat16, device=device) for _ in range(2)
    )
    cos, sin = angles.cos(), angles.sin()
    absorbs = w_uk if absorb else None
    actual = query_inputs(index_q, weights, q, actual_q, cos, sin, absorbs, backend="triton")
    expected = query_inputs(index_q, weights, q, expected_q, cos, sin, absorbs, backend="reference")
    assert_alike(actual[0], expected[0], differing=differing)
    assert_alike(actual[1], expected[1], differing=0.5)  # the order of three factors
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-5, atol=0)
    assert_alike(actual_q, expected_q, differing=differing)
    if not absorb:
        assert not actual_q[:, :, :latent].any(), "the latent query is somebody else's"


@pytest.mark.parametrize("num_rows", [0, 1, 9])
def test_interpreted_equals_reference(
    num_rows: int, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.query_inputs)
    check(DEMO, num_rows, generator, CPU, 5e-3)


def test_interpreted_at_full_size_and_for_many_rows(
    generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.query_inputs)
    check(FULL_SIZE, 2, generator, CPU, 5e-3)
    check(DEMO, 259, generator, CPU, 5e-3)


@pytest.mark.parametrize(("dims", "num_rows"), [(DEMO, 1), (DEMO, 19), (FULL_SIZE, 2)])
def test_interpreted_absorbs_as_well(
    dims: tuple[int, ...], num_rows: int, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.query_inputs)
    check(dims, num_rows, generator, CPU, 1e-2, absorb=True)


def test_refusals() -> None:
    q, weights, angles = torch.zeros(2, 8, 64, dtype=torch.bfloat16), torch.zeros(2, 8), torch.zeros(2, 16)
    q_latent, w_uk = torch.zeros(2, 8, 96, dtype=torch.bfloat16), torch.zeros(8, 64, 32, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedKernel, match="must be bf16"):
        query_inputs(q.float(), weights, q, q_latent, angles, angles, backend="triton")
    with pytest.raises(UnsupportedKernel, match="angles"):
        query_inputs(q, weights, q, q_latent, angles[:1], angles[:1], backend="triton")
    with pytest.raises(UnsupportedKernel, match="powers of two"):
        query_inputs(q[:, :, :56], weights, q, q_latent, angles, angles, backend="triton")
    with pytest.raises(UnsupportedKernel, match="differ"):
        query_inputs(q, weights, q[:, :4], q_latent, angles, angles, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"w_uk must be \(8, 64, 32\), not \(8, 32, 64\)"):
        query_inputs(q, weights, q, q_latent, angles, angles, w_uk.transpose(1, 2), backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"head weights \(2, 4\)"):
        query_inputs(q, weights[:, :4], q, q_latent, angles, angles, backend="triton")
    with pytest.raises(UnsupportedKernel, match="1 index queries"):
        query_inputs(q[:1], weights, q, q_latent, angles, angles, backend="triton")


def compiled(num_rows: int, *, absorb: bool) -> Compiled:
    config = _config_for(num_rows)
    strides = ("index_q_stride", "index_head_stride", "head_weights_stride", "q_stride", "q_head_stride")
    strides += ("q_latent_stride", "q_latent_head_stride")
    return compile_for_hopper(
        _query_inputs,
        {f"{name}_ptr": "*bf16" for name in ("index_q", "q", "q_latent", "w_uk")}
        | {f"{name}_ptr": "*fp32" for name in ("head_weights", "cos", "sin", "weights")}
        | {"values_ptr": "*fp8e4nv", "constant": "fp32", "hadamard_scale": "fp32"}
        | dict.fromkeys((*strides, "num_tokens", "absorbing"), "i32"),
        {
            "INDEX_HEADS": 64,
            "HEADS": 128,
            "C": 512,
            "N": 128,
            "R": 64,
            "D": 128,
            "BLOCK_INDEX": config.index_heads,
            "BLOCK_HEADS": config.heads,
            "TOKENS": config.tokens,
            "LATENTS": config.latents,
            "ABSORB": absorb,
            "UPCAST": False,
        },
        num_warps=config.num_warps,
        aligned=strides,
    )


@pytest.mark.parametrize("num_rows", [128, 4096])
def test_compiled_keeps_heads_in_registers(num_rows: int) -> None:
    kernel = compiled(num_rows, absorb=False)
    assert kernel.spilled == 0
    assert kernel.registers <= 64
    assert kernel.shared <= 1024, "the transform goes through no shared memory"


@pytest.mark.parametrize("num_rows", [1, 32, 64, 128, 256])
def test_compiled_absorbs_by_the_tensor_cores(num_rows: int) -> None:
    kernel = compiled(num_rows, absorb=True)
    assert kernel.spilled == 0
    assert kernel.registers <= 168, "three programs an SM"
    assert kernel.wgmma > 0
    assert kernel.mma_sync == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dims", "num_rows"), [(DEMO, 65), (FULL_SIZE, 1), (FULL_SIZE, 63), (FULL_SIZE, 2049)]
)
def test_gpu(dims: tuple[int, ...], num_rows: int, generator: torch.Generator) -> None:
    check(dims, num_rows, generator, GPU, 5e-3)
    check(dims, num_rows, generator, GPU, 1e-2, absorb=True)

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.latent_tiles as tiles
import kernels.sparse_mla_prefill as module
from kernels.backend import UnsupportedKernel
from kernels.latent_tiles import TileConfig
from kernels.sparse_mla_prefill import sparse_mla_prefill
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import RANK, ROPE, attend_exactly, latent_pages

SCALE = 0.11


def random_positions(num_rows: int, k: int, length: int, generator: torch.Generator) -> Tensor:
    rows = [torch.randperm(length, generator=generator)[:k] for _ in range(num_rows)]
    positions = torch.stack(rows).int()
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    positions[num_rows // 2] = -1
    return positions


def exactly(q: Tensor, latents: Tensor, positions: Tensor, rank: int = RANK) -> Tensor:
    rows = zip(q, positions, strict=True)
    return torch.stack(
        [attend_exactly(each, latents.double(), row[row >= 0], SCALE, rank) for each, row in rows]
    )


@pytest.mark.parametrize("k", [1, 15, 16, 17, 60])
def test_kernel_interpreted(k: int, interpreted: Callable[..., None], generator: torch.Generator) -> None:
    interpreted(tiles, module)
    latents = latent_pages(1, False, generator)[0]
    q = torch.randn(5, 20, RANK + ROPE, generator=generator)
    positions = random_positions(5, k, 64, generator)
    out = module._launch(q, latents, positions, SCALE, RANK, TileConfig(16, 16, 4, 1))
    expected = exactly(q, latents, positions)
    assert (out[2] == 0).all()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)
    plain = sparse_mla_prefill(q, latents, positions, SCALE, RANK, backend="reference")
    torch.testing.assert_close(plain.double(), expected, atol=2e-5, rtol=0)


def test_refusals() -> None:
    q, latents = torch.zeros(2, 4, RANK + ROPE), torch.zeros(9, RANK + ROPE)
    positions = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 rows"):
        sparse_mla_prefill(q, latents, positions[:1], SCALE, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="must be bfloat16"):
        sparse_mla_prefill(q, latents, positions, SCALE, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="powers of two"):
        sparse_mla_prefill(q, latents, positions, SCALE, RANK - 1, backend="triton")


@pytest.mark.parametrize("num_heads", [128, 16])
def test_compiled_for_hopper(num_heads: int) -> None:
    config = module._config_for(num_heads)
    kinds = {"q": "*bf16", "latents": "*bf16", "positions": "*i32", "out": "*bf16", "scale": "fp32"}
    made = compile_for_hopper(
        module._prefill,
        kinds | dict.fromkeys(("H", "K", "positions_stride"), "i32"),
        {"C": 512, "R": 64, "BLOCK_H": config.block_rows, "BLOCK_K": config.block_keys},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("H", "K", "positions_stride"),
    )
    assert made.spilled == 0
    assert made.shared <= 227 * 1024
    assert made.cp_async > 0
    assert (made.wgmma > 0) == (num_heads >= 64)


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [128, 64, 16])
@pytest.mark.parametrize("k", [1, 63, 65, 2047, 2048])
def test_full_size(num_heads: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    latents = latent_pages(40, False, generator, 512, 64).flatten(0, 1).bfloat16().cuda()
    q = torch.randn(5, num_heads, 576, generator=generator).bfloat16().cuda()
    positions = random_positions(5, k, len(latents), generator).cuda()
    out = sparse_mla_prefill(q, latents, positions, SCALE, 512, backend="triton")
    expected = exactly(q, latents, positions, 512)
    assert (out[2] == 0).all()
    assert (out.double() - expected).norm() / expected.norm().clamp_min(1e-9) < 6e-3

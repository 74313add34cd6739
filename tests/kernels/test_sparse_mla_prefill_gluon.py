import pytest
import torch

import kernels.sparse_mla_prefill_gluon as module
from kernels.backend import UnsupportedKernel
from kernels.sparse_mla_prefill_gluon import sparse_mla_prefill_gluon
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import attend_exactly, latent_pages

SCALE = 0.11


def test_refusals() -> None:
    q, latents = torch.zeros(2, 4, 160), torch.zeros(9, 160)
    positions = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 rows"):
        sparse_mla_prefill_gluon(q, latents, positions[:1], SCALE, 128)
    with pytest.raises(UnsupportedKernel, match="must be bfloat16"):
        sparse_mla_prefill_gluon(q, latents, positions, SCALE, 128)
    q, shifted = q.bfloat16(), torch.zeros(9 * 160 + 1, dtype=torch.bfloat16)[1:].view(9, 160)
    with pytest.raises(UnsupportedKernel, match="latents must begin at a multiple of 16 bytes"):
        sparse_mla_prefill_gluon(q, shifted, positions, SCALE, 128)


def test_compiled_for_hopper() -> None:
    kinds = {"q": "*bf16", "latents": "*bf16", "positions": "*i32", "out": "*bf16", "scale": "fp32"}
    compiled = compile_for_hopper(
        module._prefill,
        kinds | dict.fromkeys(("H", "K", "positions_stride"), "i32"),
        {"C": 512, "R": 64, "BLOCK_H": 64, "BLOCK_K": 64, "REGISTERS": module.PRODUCER_REGISTERS},
        num_warps=8,
        aligned=("H", "K", "positions_stride"),
    )
    assert compiled.spilled == 0
    # 36 products for the scores and 4 for the output, in the loop and around it: neither warp group does the
    # other's.
    assert compiled.wgmma == 80
    assert compiled.cp_async == 36
    assert "setmaxnreg" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "rank", "rope"), [(128, 512, 64), (16, 512, 64), (8, 128, 32)])
@pytest.mark.parametrize("k", [1, 63, 64, 65, 129, 2047, 2048])
def test_on_gpu(num_heads: int, rank: int, rope: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    latents = latent_pages(40, False, generator, rank, rope).flatten(0, 1).bfloat16().cuda()
    q = torch.randn(5, num_heads, rank + rope, generator=generator).bfloat16().cuda()
    positions = torch.stack([torch.randperm(len(latents), generator=generator)[:k] for _ in range(5)]).int()
    positions[torch.rand(positions.shape, generator=generator) < 0.2] = -1
    positions[2] = -1
    positions = positions.cuda()
    out = sparse_mla_prefill_gluon(q, latents, positions, SCALE, rank)
    rows = zip(q, positions, strict=True)
    exact = [attend_exactly(each, latents.double(), row[row >= 0], SCALE, rank) for each, row in rows]
    expected = torch.stack(exact)
    assert (out[2] == 0).all()
    assert (out.double() - expected).norm() / expected.norm().clamp_min(1e-9) < 6e-3
    assert torch.equal(sparse_mla_prefill_gluon(q, latents, positions, SCALE, rank), out)

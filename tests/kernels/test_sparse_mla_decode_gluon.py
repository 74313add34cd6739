import re

import pytest
import torch

import kernels.sparse_mla_decode_gluon as module
from kernels.backend import UnsupportedKernel
from kernels.sparse_mla_decode_gluon import sparse_mla_decode_gluon
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import attend_exactly, latent_pages, widened

SCALE = 0.11


def test_refusals(generator: torch.Generator) -> None:
    small = latent_pages(1, True, generator)
    slots = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="serves full-size latents"):
        sparse_mla_decode_gluon(torch.zeros(2, 4, 160, dtype=torch.bfloat16), small, slots, SCALE, 128)
    full = latent_pages(1, True, generator, 512, 64)
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 slot rows"):
        sparse_mla_decode_gluon(torch.zeros(2, 4, 576, dtype=torch.bfloat16), full, slots[:1], SCALE, 512)


@pytest.mark.parametrize("split", [False, True])
def test_compiled_for_hopper(split: bool) -> None:
    out = "*fp32" if split else "*bf16"
    kinds = {"q": "*bf16", "pages": "*u8", "slots": "*i32", "out": out, "log_sums": out, "scale": "fp32"}
    config = module.CONFIG
    compiled = compile_for_hopper(
        module._decode,
        kinds | dict.fromkeys(("H", "K", "slots_stride", "splits", "split_keys"), "i32"),
        {
            "BLOCK_H": 64, "BLOCK_K": 64, "SPLIT": split,
            "WIDENERS": config.num_warps, "REGISTERS": config.registers,
        },
        num_warps=8,
        aligned=("H", "K", "slots_stride", "split_keys"),
    )  # fmt: skip
    assert compiled.spilled <= 64
    assert compiled.wgmma == 80
    assert len(re.findall(r"cvt\.rn\.f16x2\.e4m3x2", compiled.ptx)) == 128  # two values an instruction
    assert "setmaxnreg" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("num_heads", [128, 64, 16])
@pytest.mark.parametrize("k", [1, 63, 64, 65, 2047, 2048, 2049])
def test_on_gpu(num_heads: int, k: int) -> None:
    check_on_gpu(num_heads, k, 1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 30.0, 3e4])
def test_queries_of_any_size(spread: float) -> None:
    check_on_gpu(64, 200, spread)


def check_on_gpu(num_heads: int, k: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(k)
    pages = latent_pages(40, True, generator, 512, 64).cuda()
    q = (torch.randn(4, num_heads, 576, generator=generator) * spread).bfloat16().cuda()
    slots = torch.stack([torch.randperm(40 * 64, generator=generator)[:k] for _ in range(4)]).int()
    slots[torch.rand(slots.shape, generator=generator) < 0.2] = -1
    slots[1] = -1
    slots[2, : k // 2] = -1
    slots = slots.cuda()
    out = sparse_mla_decode_gluon(q, pages, slots, SCALE, 512)
    latents = widened(pages, 512)
    rows = zip(q, slots, strict=True)
    expected = torch.stack([attend_exactly(each, latents, row[row >= 0], SCALE, 512) for each, row in rows])
    assert (out[1] == 0).all()
    assert (out.double() - expected).norm() / expected.norm().clamp_min(1e-9) < 6e-3
    assert torch.equal(sparse_mla_decode_gluon(q, pages, slots, SCALE, 512), out)

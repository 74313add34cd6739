import pytest
import torch

import kernels.dense_mla_decode_gluon as module
from kernels.backend import UnsupportedKernel
from kernels.dense_mla_decode_gluon import dense_mla_decode_gluon
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import attend_exactly, latent_pages, widened

SCALE = 0.09


def test_refusals() -> None:
    q, pages = torch.zeros(2, 4, 576, dtype=torch.bfloat16), torch.zeros(1, 64, 576, dtype=torch.bfloat16)
    table, visible = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    options = {"scale": 1.0, "kv_lora_rank": 512}
    with pytest.raises(UnsupportedKernel, match="2 queries, 2 lengths, 2 x 2 rows"):
        dense_mla_decode_gluon(q, pages, table, visible, rows_per_sequence=2, max_visible=64, **options)
    with pytest.raises(UnsupportedKernel, match="the table's pages hold 64"):
        dense_mla_decode_gluon(q, pages, table, visible, rows_per_sequence=1, max_visible=65, **options)
    shifted = torch.zeros(pages.numel() + 1, dtype=pages.dtype)[1:].view(pages.shape)
    with pytest.raises(UnsupportedKernel, match="pages must begin at a multiple of 16 bytes"):
        dense_mla_decode_gluon(q, shifted, table, visible, rows_per_sequence=1, max_visible=64, **options)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_compiled_for_hopper(split: bool, fp8: bool) -> None:
    out = "*fp32" if split else "*bf16"
    config = module._config_for(fp8=fp8)
    pages = "*u8" if fp8 else "*bf16"
    kinds = {"q": "*bf16", "pages": pages, "page_table": "*i32", "visible": "*i32", "out": out}
    integers = ("H", "n", "table_stride", "visible_stride", "splits")
    compiled = compile_for_hopper(
        module._decode,
        kinds | {"log_sums": out, "scale": "fp32"} | dict.fromkeys(integers, "i32"),
        {
            "C": 512, "R": 64, "BLOCK_H": 64, "BLOCK_K": 64, "SPLIT": split, "FP8": fp8,
            "WARPS": config.num_warps, "REGISTERS": config.registers,
        },
        num_warps=8,
        aligned=("H",),
    )  # fmt: skip
    assert compiled.spilled <= (64 if fp8 else 0)
    assert compiled.wgmma == 80
    assert compiled.cp_async == (4 if fp8 else 36)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize(("num_heads", "n"), [(128, 1), (128, 2), (64, 4), (16, 1)])
def test_on_gpu(num_heads: int, n: int, fp8: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    lengths = [0, 1, 63, 64, 65, 2047, 2048, 2049]
    pages = latent_pages(33 * 8, fp8, generator, 512, 64)
    pages = (pages if fp8 else pages.bfloat16()).cuda()
    q = torch.randn(8 * n, num_heads, 576, generator=generator).bfloat16().cuda()
    table = torch.randperm(33 * 8, generator=generator).view(8, 33).int().cuda()
    visible = torch.tensor([max(0, length - (n - 1 - i)) for length in lengths for i in range(n)]).cuda()
    out = dense_mla_decode_gluon(
        q, pages, table, visible, rows_per_sequence=n, max_visible=2049, scale=SCALE, kv_lora_rank=512
    )
    slots = (table.long()[:, :, None] * 64 + torch.arange(64, device="cuda")).flatten(1)
    latents = widened(pages, 512)
    exact = [
        attend_exactly(each, latents, slots[t // n, : visible[t]], SCALE, 512) for t, each in enumerate(q)
    ]
    expected = torch.stack(exact)
    assert (out[visible == 0] == 0).all()
    assert (out.double() - expected).norm() / expected.norm() < 6e-3

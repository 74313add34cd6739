import re

import pytest
import torch

import kernels.dense_mla_decode_gluon as module
from kernels.backend import UnsupportedKernel
from kernels.dense_mla_decode_gluon import dense_mla_decode_gluon
from tests.kernels.mla_cases import attend_exactly, compile_gluon, latent_pages

SCALE = 0.09


def test_refusals() -> None:
    q, pages = torch.zeros(2, 4, 576, dtype=torch.bfloat16), torch.zeros(1, 64, 576, dtype=torch.bfloat16)
    table, visible = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
    options = {"scale": 1.0, "kv_lora_rank": 512}
    with pytest.raises(UnsupportedKernel, match="2 queries, 2 lengths, 2 x 2 rows"):
        dense_mla_decode_gluon(q, pages, table, visible, rows_per_sequence=2, max_visible=64, **options)
    with pytest.raises(UnsupportedKernel, match="the table's pages hold 64"):
        dense_mla_decode_gluon(q, pages, table, visible, rows_per_sequence=1, max_visible=65, **options)


@pytest.mark.parametrize("split", [False, True])
def test_compiled_for_hopper(split: bool) -> None:
    out = "*fp32" if split else "*bf16"
    kinds = {"q": "*bf16", "pages": "*bf16", "page_table": "*i32", "visible": "*i32", "out": out}
    integers = ("H", "n", "table_stride", "visible_stride", "splits")
    stack, ptx = compile_gluon(
        module._decode,
        kinds | {"log_sums": out, "scale": "fp32"} | dict.fromkeys(integers, "i32"),
        {
            "C": 512, "R": 64, "BLOCK_H": 64, "BLOCK_K": 64, "SPLIT": split,
            "REGISTERS": module._PRODUCER_REGISTERS,
        },
        ("H",),
    )  # fmt: skip
    assert stack == 0
    assert len(re.findall(r"wgmma\.mma_async", ptx)) == 40
    assert len(re.findall(r"cp\.async\.c[ag]", ptx)) == 36


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "n"), [(128, 1), (128, 2), (64, 4), (16, 1)])
def test_on_gpu(num_heads: int, n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    lengths = [0, 1, 63, 64, 65, 2047, 2048, 2049]
    pages = latent_pages(33 * 8, False, generator, 512, 64).bfloat16().cuda()
    q = torch.randn(8 * n, num_heads, 576, generator=generator).bfloat16().cuda()
    table = torch.randperm(33 * 8, generator=generator).view(8, 33).int().cuda()
    visible = torch.tensor([max(0, length - (n - 1 - i)) for length in lengths for i in range(n)]).cuda()
    out = dense_mla_decode_gluon(
        q, pages, table, visible, rows_per_sequence=n, max_visible=2049, scale=SCALE, kv_lora_rank=512
    )
    slots = (table.long()[:, :, None] * 64 + torch.arange(64, device="cuda")).flatten(1)
    latents = pages.flatten(0, 1).double()
    exact = [
        attend_exactly(each, latents, slots[t // n, : visible[t]], SCALE, 512) for t, each in enumerate(q)
    ]
    expected = torch.stack(exact)
    assert (out[visible == 0] == 0).all()
    assert (out.double() - expected).norm() / expected.norm() < 6e-3

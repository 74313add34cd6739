from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.dense_mla_decode as module
import kernels.latent_tiles as tiles
from kernels.backend import UnsupportedKernel
from kernels.dense_mla_decode import dense_mla_decode
from kernels.latent_tiles import TileConfig
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import RANK, ROPE, attend_exactly, latent_pages, widened

SCALE = 0.09
SMALL = TileConfig(16, 32, 4, 1)


def exactly(q: Tensor, pages: Tensor, table: Tensor, visible: Tensor, n: int, rank: int = RANK) -> Tensor:
    latents = widened(pages, rank)
    offsets = torch.arange(64, device=q.device)
    slots = (table.long()[:, :, None] * 64 + offsets).flatten(1)
    rows = [
        attend_exactly(query, latents, slots[t // n, : int(visible[t])], SCALE, rank)
        for t, query in enumerate(q)
    ]
    return torch.stack(rows)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("n", "splits"), [(1, 1), (1, 3), (2, 2), (4, 1), (3, 2)])
def test_kernel_interpreted(
    fp8: bool,
    n: int,
    splits: int,
    interpreted: Callable[..., None],
    generator: torch.Generator,
) -> None:
    interpreted(tiles, module)
    pages = latent_pages(7, fp8, generator)
    q = torch.randn(3 * n, 6, RANK + ROPE, generator=generator)
    table = torch.tensor([[5, 2, 1], [6, 0, 0], [0, 4, 3]])
    visible = torch.tensor([[130 + i for i in range(n)], [0] * n, [64 + i for i in range(n)]]).flatten()
    visible[0] = 1
    expected = exactly(q, pages, table, visible, n)
    out = module._launch(q, pages, table, visible, n, 192, SCALE, RANK, SMALL, splits)
    assert (out[n : 2 * n] == 0).all()
    torch.testing.assert_close(out.double(), expected, atol=2e-5, rtol=0)
    plain = dense_mla_decode(
        q, pages, table, visible, rows_per_sequence=n, max_visible=192, scale=SCALE, kv_lora_rank=RANK,
        backend="reference",
    )  # fmt: skip
    torch.testing.assert_close(plain.double(), expected, atol=2e-5, rtol=0)


def test_refusals(generator: torch.Generator) -> None:
    pages, q = latent_pages(1, True, generator), torch.zeros(2, 4, RANK + ROPE)
    table, visible = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)

    def call(q: Tensor, n: int, most: int) -> None:
        dense_mla_decode(
            q, pages, table, visible, rows_per_sequence=n, max_visible=most, scale=1.0, kv_lora_rank=RANK,
            backend="triton",
        )  # fmt: skip

    with pytest.raises(UnsupportedKernel, match="2 queries, 2 lengths, 2 x 2 rows"):
        call(q, 2, 64)
    with pytest.raises(UnsupportedKernel, match="the table's pages hold 64"):
        call(q, 1, 65)
    with pytest.raises(UnsupportedKernel, match="must be bfloat16"):
        call(q, 1, 64)
    table = torch.zeros(2, 2, dtype=torch.int32).t()
    with pytest.raises(UnsupportedKernel, match="a row of the page table must be contiguous"):
        call(q, 1, 64)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("rows", [128, 16])
def test_compiled_for_hopper(rows: int, fp8: bool, split: bool) -> None:
    config = module._config_for(rows, fp8=fp8)
    out = "*fp32" if split else "*bf16"
    kinds = {"q": "*bf16", "pages": "*u8" if fp8 else "*bf16", "page_table": "*i32", "visible": "*i32"}
    kinds |= {"out": out, "log_sums": out, "scale": "fp32"}
    integers = ("H", "n", "table_stride", "visible_stride", "splits")
    made = compile_for_hopper(
        module._decode,
        kinds | dict.fromkeys(integers, "i32"),
        {
            "C": 512, "R": 64, "RECORD": 656 if fp8 else 0, "PAGE": 64,
            "BLOCK_M": config.block_rows, "BLOCK_K": config.block_keys, "ROWS": 1, "SPLIT": split,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("H",),
    )  # fmt: skip
    assert made.shared <= 227 * 1024
    assert made.cp_async > 0
    assert (made.wgmma > 0) == (rows >= 64)
    assert made.spilled <= (450 if fp8 and rows >= 64 else 0)  # see test_sparse_mla_decode.py


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("num_heads", "n"), [(128, 1), (128, 2), (16, 1), (16, 4)])
def test_full_size(num_heads: int, n: int, fp8: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    lengths = [0, 1, 63, 64, 65, 2047, 2048, 2049]
    pages = latent_pages(33 * 8, fp8, generator, 512, 64)
    pages = (pages if fp8 else pages.bfloat16()).cuda()
    q = torch.randn(8 * n, num_heads, 576, generator=generator).bfloat16().cuda()
    table = torch.randperm(33 * 8, generator=generator).view(8, 33).int().cuda()
    visible = torch.tensor([max(0, length - (n - 1 - i)) for length in lengths for i in range(n)]).cuda()
    out = dense_mla_decode(
        q, pages, table, visible, rows_per_sequence=n, max_visible=2049, scale=SCALE, kv_lora_rank=512,
        backend="triton",
    )  # fmt: skip
    expected = exactly(q, pages if fp8 else pages.float(), table, visible, n, 512)
    assert (out[visible == 0] == 0).all()
    assert (out.double() - expected).norm() / expected.norm() < 6e-3

"""What decode reads at a context of 128K tokens, in pools whose last pages lie beyond 2^31 bytes."""

import math

import pytest
import torch
from torch import Tensor

from kernels.dense_mla_decode import dense_mla_decode
from kernels.fp8_quant import FP8
from kernels.gather_latents import gather_latents, gather_latents_reference
from kernels.index_pages import write_index_keys_fp8
from kernels.latent_pages import pack_latents_reference, unpack_latents_reference
from kernels.paged_index_logits import paged_index_logits, paged_index_logits_reference
from kernels.select_slots import select_slots, select_slots_reference
from kernels.sparse_mla_decode import sparse_mla_decode
from tests.kernels.mla_cases import attend_exactly

pytestmark = pytest.mark.gpu

LENGTH = 128 * 1024
PER_SEQUENCE = LENGTH // 64
RANK, HEADS, SCALE, TOPK = 512, 128, 0.09, 2048


class Pool:
    """Two sequences of 128K tokens in pages that lie all over the pool, first and last one included.

    Attributes:
        pages: [P, bytes_per_page] uint8; what no sequence owns is NaN.
        table: [2, PER_SEQUENCE] int64.
    """

    def __init__(self, bytes_per_page: int, records: Tensor) -> None:
        num_pages = math.ceil(2**31 / bytes_per_page) + 2 * PER_SEQUENCE
        generator = torch.Generator("cuda").manual_seed(1)
        order = torch.randperm(num_pages - 2, generator=generator, device="cuda")[: 2 * PER_SEQUENCE] + 1
        order[0], order[-1] = num_pages - 1, 0
        self.table = order.view(2, PER_SEQUENCE)
        self.pages = torch.full((num_pages, bytes_per_page), 0x7F, dtype=torch.uint8, device="cuda")
        self.pages[order] = records.view(-1, bytes_per_page)
        assert (num_pages - 1) * bytes_per_page > 2**31


@pytest.fixture(scope="module")
def latents() -> tuple[Pool, Tensor]:
    """The pool, and what its sequences own: [2, LENGTH, C + R] float64."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.randn(2 * LENGTH, RANK + 64, generator=generator, device="cuda")
    sizes = torch.randint(-3, 2, (2 * LENGTH, 1), generator=generator, device="cuda")
    rows *= 2.0**sizes
    records = pack_latents_reference(rows[:, :RANK], rows[:, RANK:])
    return Pool(64 * 656, records), unpack_latents_reference(records, RANK).double().view(2, LENGTH, -1)


def queries(num_rows: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(num_rows)
    q = torch.randn(num_rows, HEADS, RANK + 64, generator=generator, device="cuda")
    return q.bfloat16()


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert (out.double() - expected).norm() / expected.norm() < 6e-3  # weights and results are bf16


@pytest.mark.parametrize("n", [1, 2])
def test_dense_decode(latents: tuple[Pool, Tensor], n: int) -> None:
    pool, rows = latents
    q, visible = queries(2 * n), torch.tensor([LENGTH - i for i in range(2 * n)], device="cuda")
    out = dense_mla_decode(
        q, pool.pages.unflatten(1, (64, -1)), pool.table, visible, rows_per_sequence=n, max_visible=LENGTH,
        scale=SCALE, kv_lora_rank=RANK, backend="triton",
    )  # fmt: skip
    exact = [
        attend_exactly(each, rows[t // n], torch.arange(int(visible[t]), device="cuda"), SCALE, RANK)
        for t, each in enumerate(q)
    ]
    assert_close(out, torch.stack(exact))


def test_sparse_decode(latents: tuple[Pool, Tensor]) -> None:
    pool, rows = latents
    q, generator = queries(2), torch.Generator("cuda").manual_seed(3)
    chosen = torch.stack([torch.randperm(LENGTH, generator=generator, device="cuda")[:TOPK] for _ in q])
    chosen[:, 0], chosen[:, 1] = 0, LENGTH - 1  # the pool's first and last page among them
    slots = pool.table.gather(1, chosen // 64) * 64 + chosen % 64
    out = sparse_mla_decode(q, pool.pages.unflatten(1, (64, -1)), slots.int(), SCALE, RANK, backend="triton")
    exact = [attend_exactly(each, rows[t], chosen[t], SCALE, RANK) for t, each in enumerate(q)]
    assert_close(out, torch.stack(exact))


def test_gathered_latents(latents: tuple[Pool, Tensor]) -> None:
    pool, _ = latents
    pages = pool.pages.unflatten(1, (64, -1))
    for row in pool.table:
        found = gather_latents(pages, row, LENGTH, kv_lora_rank=RANK, backend="triton")
        assert torch.equal(found, gather_latents_reference(pages, row, LENGTH, RANK))


@pytest.mark.parametrize("n", [1, 2])
def test_index_logits_and_selection(n: int) -> None:
    generator = torch.Generator("cuda").manual_seed(4)
    keys = torch.randn(2 * LENGTH, 128, generator=generator, device="cuda").to(FP8)
    scales = torch.rand(2 * LENGTH, generator=generator, device="cuda") + 0.5
    records = torch.empty(2 * PER_SEQUENCE, 64 * 132, dtype=torch.uint8, device="cuda")
    write_index_keys_fp8(
        records, torch.arange(2 * LENGTH, device="cuda"), keys, scales, 64, backend="reference"
    )
    pool = Pool(64 * 132, records)
    q = torch.randn(2 * n, 64, 128, generator=generator, device="cuda").to(FP8)
    weights = torch.randn(2 * n, 64, generator=generator, device="cuda")
    visible = torch.tensor([LENGTH - i for i in range(2 * n)], device="cuda")
    options = {"rows_per_sequence": n, "max_visible": LENGTH}
    logits = paged_index_logits(q, pool.pages, weights, pool.table, visible, **options, backend="triton")
    expected = paged_index_logits_reference(q, pool.pages, weights, pool.table, visible, **options)
    is_seen = torch.arange(LENGTH, device="cuda") < visible[:, None]
    difference = (logits - expected)[is_seen].abs().max()
    assert difference <= 2e-3 * expected[is_seen].abs().max()  # tensor cores keep fewer bits of a sum
    slots = select_slots(logits, visible, pool.table, k=TOPK, **options, backend="triton")
    assert torch.equal(slots, select_slots_reference(logits, visible, pool.table, k=TOPK, **options))

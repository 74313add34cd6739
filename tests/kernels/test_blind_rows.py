"""Rows that see nothing, among others: how a captured decode step is filled up.

They give zeros, whatever lies in the pages and in their queries; the other rows do not notice them.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.layer import fill_pages
from kernels.dense_mla_decode import dense_mla_decode
from kernels.fp8_quant import FP8
from kernels.paged_index_logits import paged_index_logits
from kernels.select_slots import select_slots
from kernels.sparse_mla_decode import sparse_mla_decode
from model.config import ModelConfig
from model.pages import LayerPages, PageCache
from tests.checkpoints import DEMO

LENGTHS = [0, 300, 0, 0, 4000, 1, 0, 65]
K = 256


def pages_of(device: str) -> LayerPages:
    facts = ModelConfig.load(DEMO).model_copy(
        update={"kv_lora_rank": 512, "qk_rope_head_dim": 64, "index_head_dim": 128, "num_hidden_layers": 1}
    )
    cache = PageCache(facts, 64 * len(LENGTHS) + 1, "fp8", torch.bfloat16, backend="reference", device=device)
    fill_pages(cache.layers[0], facts)
    cache.layers[0].latents[0] = 0xFF  # page 0 is nobody's, and NaN
    cache.layers[0].index_keys[0] = 0xFF
    return cache.layers[0]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("max_visible", [4096, 8192, 65536, 163840])
def test_attention_of_rows_that_see_nothing(rows: int, max_visible: int) -> None:
    pages, device = pages_of("cuda"), "cuda"
    width = -(-max_visible // 64)
    table = torch.zeros(len(LENGTHS), width, dtype=torch.int64, device=device)
    for sequence, length in enumerate(LENGTHS):
        held = -(-length // 64)
        table[sequence, :held] = 1 + 64 * sequence + torch.randperm(64, device=device)[:held]
    visible = torch.tensor(LENGTHS, device=device).repeat_interleave(rows)
    sees = visible > 0
    q = torch.randn(len(visible), 128, 576, device=device).bfloat16()
    index_q = torch.randn(len(visible), 64, 128, device=device).to(FP8)
    weights = torch.rand(len(visible), 64, device=device)
    q[~sees], weights[~sees] = torch.nan, torch.nan

    def run(chosen: Tensor) -> list[Tensor]:
        of = chosen.view(-1, rows)[:, 0]
        logits = paged_index_logits(
            index_q[chosen],
            pages.index_keys,
            weights[chosen],
            table[of],
            visible[chosen],
            rows_per_sequence=rows,
            max_visible=max_visible,
            backend="triton",
        )
        slots = select_slots(
            logits,
            visible[chosen],
            table[of],
            rows_per_sequence=rows,
            k=K,
            max_visible=max_visible,
            backend="triton",
        )
        sparse = sparse_mla_decode(q[chosen], pages.latents, slots, 0.1, 512, backend="triton")
        dense = dense_mla_decode(
            q[chosen],
            pages.latents,
            table[of],
            visible[chosen],
            rows_per_sequence=rows,
            max_visible=max_visible,
            scale=0.1,
            kv_lora_rank=512,
            backend="triton",
        )
        return [slots, sparse, dense]

    slots, sparse, dense = run(torch.ones_like(sees))
    assert (slots[~sees] == -1).all()
    assert not sparse[~sees].any()
    assert not dense[~sees].any()
    alone_slots, alone_sparse, alone_dense = run(sees)
    assert torch.equal(slots[sees], alone_slots)
    for together, alone in ((sparse[sees], alone_sparse), (dense[sees], alone_dense)):
        assert together.isfinite().all()
        # The keys are cut into other parts: a step of bf16.
        torch.testing.assert_close(together.float(), alone.float(), rtol=0.02, atol=0.02)

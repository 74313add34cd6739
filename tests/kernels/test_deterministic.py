"""Every operation of the deterministic backend: a row's bits are the same alone and among any others."""

import pytest
import torch
from torch import Tensor

import kernels.sparse_mla
from kernels.backend import Backend, UnsupportedKernel
from kernels.gate_topk import gate_topk
from kernels.group_tree import add_all, blocks_of
from kernels.grouped_gemm import grouped_experts
from kernels.hadamard import hadamard
from kernels.index_logits import index_logits
from kernels.norm import add_rms_norm, rms_norm
from kernels.sparse_mla import require_stable_queries, sparse_mla
from kernels.swiglu import swiglu
from kernels.topk import topk
from tests.kernels.alone import same_alone_and_among_others

NUM_ROWS = 150
DETERMINISTIC: Backend = "deterministic"


@pytest.mark.parametrize("inner", [3, 48, 128, 700])
def test_swiglu(inner: int, generator: torch.Generator) -> None:
    x = torch.randn(NUM_ROWS, 2 * inner, generator=generator)
    assert same_alone_and_among_others(lambda rows: swiglu(x[rows], backend=DETERMINISTIC), NUM_ROWS)
    close = swiglu(x, backend="reference")
    torch.testing.assert_close(swiglu(x, backend=DETERMINISTIC), close, rtol=1e-6, atol=1e-7)


def test_swiglu_in_several_pieces_and_of_nothing(generator: torch.Generator) -> None:
    x = torch.randn(50, 2 * 701, generator=generator)
    alone = torch.cat([swiglu(row, backend=DETERMINISTIC) for row in x.split(1)])
    assert torch.equal(swiglu(x, backend=DETERMINISTIC), alone)
    assert swiglu(x[:0], backend=DETERMINISTIC).shape == (0, 701)


@pytest.mark.parametrize("num_experts", [8, 16, 256])
def test_gate(num_experts: int, generator: torch.Generator) -> None:
    logits = torch.randn(NUM_ROWS, num_experts, generator=generator)
    bias = torch.zeros(num_experts)

    def gate(rows: Tensor, backend: Backend = DETERMINISTIC) -> Tensor:
        experts, weights = gate_topk(
            logits[rows], bias, num_groups=4, topk_group=2, k=3, normalize=True, scale=2.5, backend=backend
        )
        return torch.cat([experts.float(), weights], dim=1)

    assert same_alone_and_among_others(gate, NUM_ROWS)
    everyone = torch.arange(NUM_ROWS)
    torch.testing.assert_close(gate(everyone), gate(everyone, "reference"), rtol=1e-6, atol=0)


@pytest.mark.parametrize("width", [41, 96, 128, 256, 1536])
def test_norms(width: int, generator: torch.Generator) -> None:
    x, residual = (torch.randn(NUM_ROWS, width, generator=generator) for _ in range(2))
    weight = torch.randn(width, generator=generator)
    assert same_alone_and_among_others(
        lambda rows: rms_norm(x[rows], weight, 1e-6, backend=DETERMINISTIC), NUM_ROWS
    )
    assert same_alone_and_among_others(
        lambda rows: torch.cat(
            add_rms_norm(x[rows], residual[rows], weight, 1e-6, backend=DETERMINISTIC), dim=1
        ),
        NUM_ROWS,
    )


@pytest.mark.parametrize("width", [8, 64, 128])
def test_hadamard(width: int, generator: torch.Generator) -> None:
    x = torch.randn(NUM_ROWS, 3, width, generator=generator)
    assert same_alone_and_among_others(lambda rows: hadamard(x[rows], backend=DETERMINISTIC), NUM_ROWS)
    torch.testing.assert_close(
        hadamard(x, backend=DETERMINISTIC), hadamard(x, backend="reference"), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(("num_heads", "num_slots"), [(1, 32), (4, 50), (8, 256)])
@pytest.mark.parametrize(("width", "kv_lora_rank"), [(56, 40), (160, 128), (29, 13)])
def test_sparse_mla(
    num_heads: int, num_slots: int, width: int, kv_lora_rank: int, generator: torch.Generator
) -> None:
    latents = torch.randn(400, width, generator=generator)
    q = torch.randn(NUM_ROWS, num_heads, width, generator=generator)
    slots = torch.randint(-1, 400, (NUM_ROWS, num_slots), generator=generator)
    slots[5] = -1

    def attend(rows: Tensor, backend: Backend = DETERMINISTIC) -> Tensor:
        return sparse_mla(q[rows], latents.__getitem__, slots[rows], 0.1, kv_lora_rank, backend=backend)

    assert same_alone_and_among_others(attend, NUM_ROWS)
    everyone = torch.arange(NUM_ROWS)
    torch.testing.assert_close(attend(everyone), attend(everyone, "reference"), rtol=0, atol=1e-5)
    assert not attend(everyone)[5].any()


def test_attention_is_tried_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = 4, 56, 32, 40, torch.float32, torch.device("cpu")
    require_stable_queries(*shape)
    honest = torch.bmm

    def dishonest(a: Tensor, b: Tensor) -> Tensor:
        if len(a) > 1:
            return honest(a, b)
        return honest(a[..., ::2], b[:, ::2]) + honest(a[..., 1::2], b[:, 1::2])

    require_stable_queries.cache_clear()
    monkeypatch.setattr(kernels.sparse_mla.torch, "bmm", dishonest)
    with pytest.raises(UnsupportedKernel, match=r"^sparse_mla: .*4 heads of 56 in torch.float32"):
        require_stable_queries(*shape)


@pytest.mark.parametrize("num_heads", [1, 3, 8])
@pytest.mark.parametrize("with_scales", [False, True])
def test_index_logits(num_heads: int, with_scales: bool, generator: torch.Generator) -> None:
    """Rows see different shares of 700 keys, which are two tiles; more keys behind them change nothing."""
    q = torch.randn(NUM_ROWS, num_heads, 64, generator=generator)
    keys = torch.randn(1100, 64, generator=generator)
    scales = torch.rand(1100, generator=generator) if with_scales else None
    weights = torch.randn(NUM_ROWS, num_heads, generator=generator)
    visible = torch.randint(1, 701, (NUM_ROWS,), generator=generator)

    def score(rows: Tensor, num_keys: int = 700, backend: Backend = DETERMINISTIC) -> Tensor:
        some_scales = None if scales is None else scales[:num_keys]
        return index_logits(
            q[rows], keys[:num_keys], some_scales, weights[rows], visible[rows], backend=backend
        )

    assert same_alone_and_among_others(score, NUM_ROWS)
    everyone = torch.arange(NUM_ROWS)
    assert torch.equal(score(everyone, 1100)[:, :700], score(everyone))
    torch.testing.assert_close(score(everyone), score(everyone, backend="reference"), rtol=0, atol=2e-5)


def test_keys_that_nobody_sees_are_not_looked_at(generator: torch.Generator) -> None:
    """Behind a row's own keys lies what others left in the pages: NaN there stays there."""
    keys = torch.randn(600, 64, generator=generator)
    keys[10:] = float("nan")
    scores = index_logits(
        torch.ones(1, 2, 64), keys, None, torch.ones(1, 2), torch.tensor([10]), backend=DETERMINISTIC
    )
    assert scores[0, :10].isfinite().all()
    assert (scores[0, 10:] == float("-inf")).all()
    assert topk(scores, 12, backend=DETERMINISTIC).tolist() == [[*range(10), -1, -1]]


@pytest.mark.parametrize(("width", "inner"), [(96, 48), (256, 128), (6, 4)])
def test_experts_whatever_came_together_and_wherever_they_are(
    width: int, inner: int, generator: torch.Generator
) -> None:
    gate_up = torch.randn(8, 2 * inner, width, generator=generator) * width**-0.5
    down = torch.randn(8, width, inner, generator=generator) * inner**-0.5
    x = torch.randn(NUM_ROWS, width, generator=generator)
    experts = torch.rand(NUM_ROWS, 8, generator=generator).argsort(-1)[:, :3].sort(-1).values
    weights = torch.rand(NUM_ROWS, 3, generator=generator)

    def run(rows: Tensor, held: range = range(8), backend: Backend = DETERMINISTIC) -> Tensor:
        here = slice(held.start, held.stop)
        return grouped_experts(
            x[rows], experts[rows], weights[rows], gate_up[here], down[here], held.start, 2, backend=backend
        ).transpose(0, 1)

    assert same_alone_and_among_others(run, NUM_ROWS)
    everyone = torch.arange(NUM_ROWS)
    whole = run(everyone)
    parts = [run(everyone, held) for held in (range(4), range(4, 6), range(6, 8))]
    blocks = [block for groups in (range(2), range(2, 3), range(3, 4)) for block in blocks_of(groups)]
    assert torch.equal(add_all(zip(blocks, parts, strict=True), torch.add), whole)
    torch.testing.assert_close(whole, run(everyone, backend="reference"), rtol=0, atol=1e-5)

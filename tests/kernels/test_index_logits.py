import math

import numpy as np
import pytest
import torch
from torch import Tensor

import kernels.index_logits as module
from kernels.backend import UnsupportedKernel
from kernels.index_logits import index_logits

INF = math.inf


def logits_slowly(
    q: Tensor, keys: Tensor, key_scales: Tensor | None, weights: Tensor, visible: Tensor
) -> np.ndarray:
    out = np.full((q.shape[0], keys.shape[0]), -INF)
    for t in range(q.shape[0]):
        for s in range(int(visible[t])):
            total = 0.0
            for h in range(q.shape[1]):
                product = sum(a * b for a, b in zip(q[t, h].tolist(), keys[s].tolist(), strict=True))
                total += float(weights[t, h]) * max(product, 0.0)
            out[t, s] = total * (1.0 if key_scales is None else float(key_scales[s]))
    return out


def test_a_query_worked_out_by_hand() -> None:
    q = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    keys = torch.tensor([[1.0, 1.0], [-1.0, 3.0], [-1.0, -1.0], [5.0, 5.0]])
    weights, visible = torch.tensor([[3.0, -0.5]]), torch.tensor([3])
    scales = torch.tensor([1.0, 2.0, 1.0, 1.0])
    out = index_logits(q, keys, scales, weights, visible, backend="reference")
    # 3*1 - 0.5*2; (3*0 - 0.5*6) * 2; both heads clipped; not visible
    assert out.tolist() == [[2.0, -6.0, 0.0, -INF]]
    assert out.dtype == torch.float32


def test_the_relu_comes_before_the_signed_weight() -> None:
    q, keys = torch.tensor([[[1.0], [1.0]]]), torch.tensor([[-2.0]])
    weights, visible = torch.tensor([[-1.0, -1.0]]), torch.tensor([1])
    assert index_logits(q, keys, None, weights, visible, backend="reference").item() == 0


@pytest.mark.parametrize("with_scales", [True, False])
@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 7), (5, 9), (7, 7)])
def test_random_queries_against_a_slow_one(
    num_queries: int, num_keys: int, with_scales: bool, generator: torch.Generator
) -> None:
    q = torch.randn(num_queries, 3, 8, generator=generator)
    keys = torch.randn(num_keys, 8, generator=generator)
    scales = torch.rand(num_keys, generator=generator) if with_scales else None
    weights = torch.randn(num_queries, 3, generator=generator)
    visible = torch.randint(0, num_keys + 1, (num_queries,), generator=generator)
    out = index_logits(q, keys, scales, weights, visible, backend="reference")
    expected = logits_slowly(q, keys, scales, weights, visible)
    # float32 sums of 24 products near 1
    np.testing.assert_allclose(out.double().numpy(), expected, atol=2e-5, rtol=0)


def test_e4m3_vectors_are_exact(generator: torch.Generator) -> None:
    """Products of small e4m3 integers and their sums have no rounding in float32."""
    q = torch.randint(-8, 9, (4, 3, 16), generator=generator).to(torch.float8_e4m3fn)
    keys = torch.randint(-8, 9, (6, 16), generator=generator).to(torch.float8_e4m3fn)
    scales = torch.exp2(torch.randint(-3, 3, (6,), generator=generator).float())
    weights = torch.randint(-4, 5, (4, 3), generator=generator) / 8
    visible = torch.tensor([6, 3, 1, 5])
    out = index_logits(q, keys, scales, weights, visible, backend="reference")
    expected = logits_slowly(q.float(), keys.float(), scales, weights, visible)
    assert np.array_equal(out.double().numpy(), expected)


@pytest.mark.parametrize("rows_a_tile", [1, 2, 3, 5, 6])
def test_tiles_do_not_show(
    rows_a_tile: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    q = torch.randint(-8, 9, (5, 2, 4), generator=generator).float()
    keys = torch.randint(-8, 9, (9, 4), generator=generator).float()
    weights, visible = torch.ones(5, 2), torch.tensor([0, 9, 8, 1, 9])
    whole = index_logits(q, keys, None, weights, visible, backend="reference")
    monkeypatch.setattr(module, "_TILE_ELEMENTS", rows_a_tile * 2 * 9)
    tiled = index_logits(q, keys, None, weights, visible, backend="reference")
    assert torch.equal(tiled, whole)


def test_rows_that_see_nothing_and_scores_below_zero() -> None:
    """-inf and never 0 marks what is not visible: visible scores may all be negative."""
    q, keys, weights = torch.ones(2, 1, 1), torch.ones(3, 1), -torch.ones(2, 1)
    out = index_logits(q, keys, None, weights, torch.tensor([0, 2]), backend="reference")
    assert out.tolist() == [[-INF] * 3, [-1.0, -1.0, -INF]]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_score(num_queries: int, num_keys: int) -> None:
    out = index_logits(
        torch.ones(num_queries, 2, 4),
        torch.ones(num_keys, 4),
        torch.ones(num_keys),
        torch.ones(num_queries, 2),
        torch.zeros(num_queries, dtype=torch.int64),
        backend="reference",
    )
    assert out.shape == (num_queries, num_keys)


def test_refusals() -> None:
    q, keys, visible = torch.ones(1, 2, 4), torch.ones(3, 4), torch.tensor([3])
    with pytest.raises(UnsupportedKernel, match=r"^index_logits: 2 heads, 3 weights$"):
        index_logits(q, keys, None, torch.ones(1, 3), visible, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^index_logits: query width 4, key width 5$"):
        index_logits(q, torch.ones(3, 5), None, torch.ones(1, 2), visible, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^index_logits: "):
        index_logits(q, keys, None, torch.ones(1, 2), visible, backend="triton")

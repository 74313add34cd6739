import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.sparse_mla as module
from kernels.backend import UnsupportedKernel
from kernels.sparse_mla import sparse_mla

RANK, ROPE = 6, 2
WIDTH = RANK + ROPE


def attend_slowly(q: Tensor, latents: Tensor, slots: Tensor, scale: float) -> Tensor:
    """Float64 loops; a softmax over the slots that are not -1, zeros where there is none."""
    out = torch.zeros(q.shape[0], q.shape[1], RANK, dtype=torch.float64)
    for t in range(q.shape[0]):
        keys = [latents[slot].tolist() for slot in slots[t].tolist() if slot >= 0]
        for h in range(q.shape[1]):
            query = q[t, h].tolist()
            scores = [scale * math.fsum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
            exps = [math.exp(score - max(scores)) for score in scores]
            for key, weight in zip(keys, exps, strict=True):
                out[t, h] += weight / math.fsum(exps) * torch.tensor(key[:RANK], dtype=torch.float64)
    return out


def reader(latents: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda slots: latents.index_select(0, slots)


def attend(q: Tensor, latents: Tensor, slots: Tensor, scale: float = 0.3) -> Tensor:
    return sparse_mla(q, reader(latents), slots, scale, RANK, backend="reference")


def random_case(num_queries: int, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(num_queries, 3, WIDTH, generator=generator)
    latents = torch.randn(40, WIDTH, generator=generator)
    slots = torch.stack([torch.randperm(40, generator=generator)[:k] for _ in range(num_queries)])
    return q, latents, slots


def test_two_keys_worked_out_by_hand() -> None:
    """Scores 0 and ln 3, so weights 1/4 and 3/4; the rotated part scores and is no value."""
    latents = torch.zeros(9, WIDTH)
    latents[4, 0], latents[7, 0], latents[7, RANK] = 4.0, 8.0, 2.0
    q = torch.zeros(1, 1, WIDTH)
    q[0, 0, RANK] = math.log(3)
    out = attend(q, latents, torch.tensor([[4, 7]]), scale=0.5)
    assert out[0, 0].tolist() == pytest.approx([0.25 * 4 + 0.75 * 8] + [0.0] * (RANK - 1))


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("k", [1, 7, 40])
def test_random_slots_against_a_slow_one(num_queries: int, k: int, generator: torch.Generator) -> None:
    q, latents, slots = random_case(num_queries, k, generator)
    slots[torch.rand(slots.shape, generator=generator) < 0.3] = -1
    out = attend(q, latents, slots)
    # float32 sums of at most 40 numbers near 1
    torch.testing.assert_close(out.double(), attend_slowly(q, latents, slots, 0.3), atol=5e-6, rtol=0)


def test_one_key_is_its_own_value(generator: torch.Generator) -> None:
    q, latents, _ = random_case(1, 1, generator)
    out = attend(q, latents, torch.tensor([[-1, 11, -1]]))
    assert torch.equal(out[0], latents[11, :RANK].expand(3, -1))


def test_rows_of_only_skipped_slots_give_zeros(generator: torch.Generator) -> None:
    q, latents, slots = random_case(3, 4, generator)
    slots[1] = -1
    out = attend(q, latents, slots)
    assert (out[1] == 0).all()
    assert (out[[0, 2]] != 0).all()


def test_the_order_of_slots_does_not_matter(generator: torch.Generator) -> None:
    q, latents, slots = random_case(2, 12, generator)
    slots[:, 3] = -1
    shuffled = slots[:, torch.randperm(12, generator=generator)]
    torch.testing.assert_close(attend(q, latents, shuffled), attend(q, latents, slots), atol=1e-6, rtol=0)


def test_large_scores_do_not_overflow(generator: torch.Generator) -> None:
    q, latents, slots = random_case(2, 5, generator)
    out = attend(q * 1e4, latents, slots)
    torch.testing.assert_close(out.double(), attend_slowly(q * 1e4, latents, slots, 0.3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("rows_a_tile", [1, 2, 4, 5])
def test_tiles_do_not_show(
    rows_a_tile: int, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    q, latents, slots = random_case(5, 6, generator)
    whole = attend(q, latents, slots)
    monkeypatch.setattr(module, "_TILE_ELEMENTS", rows_a_tile * 6 * WIDTH)
    torch.testing.assert_close(attend(q, latents, slots), whole, atol=1e-6, rtol=0)


def test_bfloat16(generator: torch.Generator) -> None:
    q, latents, slots = random_case(4, 9, generator)
    q, latents = q.bfloat16(), latents.bfloat16().float()  # pages may hold wider numbers than the query
    out = attend(q, latents, slots)
    assert out.dtype == torch.bfloat16
    # Scores up to 4 and weights up to 1 are rounded to 2^-8 of themselves, values near 1 to 3 are exact.
    torch.testing.assert_close(out.double(), attend_slowly(q, latents, slots, 0.3), atol=0.03, rtol=0)


def test_no_queries() -> None:
    none = torch.zeros(0, 4, dtype=torch.int64)
    assert attend(torch.zeros(0, 3, WIDTH), torch.zeros(5, WIDTH), none).shape == (0, 3, RANK)


@pytest.mark.parametrize("row", [[5, -1], [-1, -1]])
def test_skipped_slots_take_nothing_from_slot_0(row: list[int], generator: torch.Generator) -> None:
    """Slot 0 may be somebody else's, and weight 0 times NaN is NaN."""
    q, latents, _ = random_case(1, 1, generator)
    expected = attend(q, latents, torch.tensor([row]))
    latents[0] = math.nan
    assert torch.equal(attend(q, latents, torch.tensor([row])), expected)


def test_nan_in_a_query_stays_visible(generator: torch.Generator) -> None:
    q, latents, slots = random_case(1, 4, generator)
    q[0, 0, 0] = math.nan
    assert attend(q, latents, slots)[0, 0].isnan().all()


def test_refusals(generator: torch.Generator) -> None:
    q, latents, slots = random_case(2, 3, generator)
    with pytest.raises(UnsupportedKernel, match=r"^sparse_mla: 2 queries, 1 slot rows$"):
        attend(q, latents, slots[:1])
    with pytest.raises(UnsupportedKernel, match=r"^sparse_mla: "):
        sparse_mla(q, reader(latents), slots, 1.0, RANK, backend="triton")

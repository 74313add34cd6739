import math

import pytest
import torch
from torch import Tensor

import kernels.masked_mha as module
from kernels.backend import UnsupportedKernel
from kernels.masked_mha import masked_mha

WIDTH, VALUE, HEADS = 5, 3, 2


def attend_slowly(
    q: Tensor, k: Tensor, v: Tensor, visible: list[int], selected: list[list[int]] | None, scale: float
) -> Tensor:
    out = torch.zeros(q.shape[0], HEADS, v.shape[2], dtype=torch.float64)
    for t, num_keys in enumerate(visible):
        chosen = range(num_keys) if selected is None else [s for s in selected[t] if s >= 0]
        for h in range(HEADS):
            scores = [scale * math.fsum((q[t, h].double() * k[s, h].double()).tolist()) for s in chosen]
            exps = [math.exp(score - max(scores)) for score in scores]
            for s, weight in zip(chosen, exps, strict=True):
                out[t, h] += weight / math.fsum(exps) * v[s, h].double()
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: list[int],
    selected: list[list[int]] | None = None,
    scale: float = 0.3,
) -> Tensor:
    chosen = None if selected is None else torch.tensor(selected, dtype=torch.int32)
    return masked_mha(q, k, v, torch.tensor(visible, dtype=torch.int64), chosen, scale, backend="reference")


def random_case(num_queries: int, num_keys: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(num_queries, HEADS, WIDTH, generator=generator)
    k = torch.randn(num_keys, HEADS, WIDTH, generator=generator)
    return q, k, torch.randn(num_keys, HEADS, VALUE, generator=generator)


def random_selection(visible: list[int], k: int, generator: torch.Generator) -> list[list[int]]:
    rows = [sorted(torch.randperm(num_keys, generator=generator)[:k].tolist()) for num_keys in visible]
    return [row + [-1] * (k - len(row)) for row in rows]


def test_two_keys_worked_out_by_hand() -> None:
    """Scores 0 and ln 3, so weights 1/4 and 3/4; a third key is not visible."""
    q, k, v = torch.zeros(1, HEADS, 1), torch.zeros(3, HEADS, 1), torch.full((3, HEADS, 1), 1e6)
    q[0, 1, 0], k[1, 1, 0], k[2, 1, 0] = math.log(3), 2.0, 100.0
    v[0, :, 0], v[1, :, 0] = 4.0, 8.0
    out = attend(q, k, v, [2], scale=0.5)
    assert out.flatten().tolist() == pytest.approx([6.0, 7.0])


@pytest.mark.parametrize(("start", "num_queries"), [(0, 1), (0, 6), (5, 1), (5, 4)])
def test_everything_visible_against_a_slow_one(
    start: int, num_queries: int, generator: torch.Generator
) -> None:
    q, k, v = random_case(num_queries, start + num_queries, generator)
    visible = list(range(start + 1, start + num_queries + 1))
    # float32 sums of at most 9 numbers near 1
    torch.testing.assert_close(
        attend(q, k, v, visible).double(), attend_slowly(q, k, v, visible, None, 0.3), atol=3e-6, rtol=0
    )


@pytest.mark.parametrize("num_selected", [1, 3, 9, 12])
def test_selections_against_a_slow_one(num_selected: int, generator: torch.Generator) -> None:
    q, k, v = random_case(6, 9, generator)
    visible = [4, 5, 6, 7, 8, 9]
    selected = random_selection(visible, num_selected, generator)
    expected = attend_slowly(q, k, v, visible, selected, 0.3)
    torch.testing.assert_close(attend(q, k, v, visible, selected).double(), expected, atol=3e-6, rtol=0)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("with_selection", [True, False])
def test_tiles_do_not_show(
    rows: int, with_selection: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    q, k, v = random_case(6, 9, generator)
    visible = [4, 5, 6, 7, 8, 9]
    selected = random_selection(visible, 3, generator) if with_selection else None
    whole = attend(q, k, v, visible, selected)
    monkeypatch.setattr(module, "_TILE_ROWS", rows)
    torch.testing.assert_close(attend(q, k, v, visible, selected), whole, atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_queries", [127, 128, 129])
def test_around_the_size_of_a_tile(num_queries: int, generator: torch.Generator) -> None:
    q, k, v = random_case(num_queries, num_queries, generator)
    visible = list(range(1, num_queries + 1))
    out = attend(q, k, v, visible)
    for t in (0, 126, num_queries - 1):
        expected = attend_slowly(q[t : t + 1], k, v, [t + 1], None, 0.3)
        torch.testing.assert_close(out[t : t + 1].double(), expected, atol=5e-6, rtol=0)


def test_selecting_everything_equals_no_selection(generator: torch.Generator) -> None:
    q, k, v = random_case(4, 6, generator)
    visible = [3, 4, 5, 6]
    everything = [list(range(n)) + [-1] * (6 - n) for n in visible]
    assert torch.equal(attend(q, k, v, visible, everything), attend(q, k, v, visible))


def test_one_key_is_its_own_value(generator: torch.Generator) -> None:
    q, k, v = random_case(2, 5, generator)
    out = attend(q, k, v, [4, 5], [[2, -1], [-1, 0]])
    assert torch.equal(out, v[[2, 0]])


def test_bfloat16(generator: torch.Generator) -> None:
    q, k, v = (tensor.bfloat16() for tensor in random_case(5, 5, generator))
    visible = [1, 2, 3, 4, 5]
    out = attend(q, k, v, visible)
    assert out.dtype == torch.bfloat16
    # Scores up to 3 and weights up to 1 are rounded to 2^-8 of themselves, values near 1 to 3 are exact.
    torch.testing.assert_close(out.double(), attend_slowly(q, k, v, visible, None, 0.3), atol=0.03, rtol=0)


def test_no_queries() -> None:
    out = attend(torch.zeros(0, HEADS, WIDTH), torch.zeros(3, HEADS, WIDTH), torch.zeros(3, HEADS, VALUE), [])
    assert out.shape == (0, HEADS, VALUE)


def test_rows_of_only_skipped_keys_give_zeros(generator: torch.Generator) -> None:
    q, k, v = random_case(3, 4, generator)
    selected = [[-1, -1], [0, 1], [-1, -1]]
    out = attend(q, k, v, [2, 3, 4], selected)
    assert (out[[0, 2]] == 0).all()
    torch.testing.assert_close(
        out[1:2].double(), attend_slowly(q[1:2], k, v, [3], selected[1:2], 0.3), atol=3e-6, rtol=0
    )


def test_nan_in_a_query_stays_visible(generator: torch.Generator) -> None:
    q, k, v = random_case(2, 3, generator)
    q[0, 0, 0] = math.nan
    out = attend(q, k, v, [2, 3])
    assert out[0, 0].isnan().all()
    assert out[1].isfinite().all()


def test_refusals(generator: torch.Generator) -> None:
    q, k, v = random_case(1, 2, generator)
    with pytest.raises(UnsupportedKernel, match=r"^masked_mha: query width 5, key width 4$"):
        attend(q, k[..., :4], v, [1])
    with pytest.raises(UnsupportedKernel, match=r"^masked_mha: "):
        masked_mha(q, k, v, torch.tensor([1]), None, 1.0, backend="triton")

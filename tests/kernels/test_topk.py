import math

import pytest
import torch

from kernels.backend import UnsupportedKernel
from kernels.topk import topk

INF = math.inf


def topk_slowly(row: list[float], k: int) -> list[int]:
    """Higher score first, then lower index; -inf never; ascending, filled up with -1."""
    ranked = sorted((i for i, score in enumerate(row) if score > -INF), key=lambda i: (-row[i], i))
    chosen = sorted(ranked[:k])
    return chosen + [-1] * (k - len(chosen))


def test_known_rows() -> None:
    scores = torch.tensor([[0.0, -3.0, 5.0, 1.0, -1.0], [-2.0, -INF, -1.0, -INF, -INF]])
    selected = topk(scores, 3, backend="reference")
    assert selected.dtype == torch.int32
    assert selected.tolist() == [[0, 2, 3], [0, 2, -1]]


def test_negative_scores_are_selected_before_nothing() -> None:
    assert topk(torch.tensor([[-1.0, -2.0, -3.0, -INF]]), 3, backend="reference").tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0, 1.0], [0, 1]),
        ([0.0, 2.0, 0.0, 0.0, 0.0], [0, 1]),
        ([0.0, 0.0, 2.0, 0.0, 3.0], [2, 4]),
        ([-1.0, 0.0, -0.0, 0.0, -0.0], [1, 2]),  # the two zeros are one score
        ([-0.0, 0.0, 0.0, 0.0, 0.0], [0, 1]),
        ([INF, 1.0, INF, INF, 1.0], [0, 2]),
        ([-INF, -INF, -INF, 1.0, 1.0], [3, 4]),
        ([-INF, -5.0, -INF, -INF, -INF], [1, -1]),
    ],
)
def test_ties_go_to_the_lower_index(row: list[float], expected: list[int]) -> None:
    assert topk(torch.tensor([row]), 2, backend="reference").tolist() == [expected]


@pytest.mark.parametrize("num_scores", [0, 1, 7, 8, 9, 40])
@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_random_rows_against_a_slow_one(num_scores: int, levels: int, generator: torch.Generator) -> None:
    """k is 8: fewer scores than that, as many, one more, and many; few levels make nearly all of them tie."""
    scores = torch.randint(-levels, levels, (30, num_scores), generator=generator).float()
    visible = torch.randint(0, num_scores + 1, (30, 1), generator=generator)
    scores[torch.arange(num_scores) >= visible] = -INF
    selected = topk(scores, 8, backend="reference")
    assert selected.shape == (30, 8)
    assert selected.tolist() == [topk_slowly(row, 8) for row in scores.tolist()]


@pytest.mark.parametrize("num_scores", [2047, 2048, 2049])
def test_full_size(num_scores: int, generator: torch.Generator) -> None:
    scores = torch.randn(2, num_scores, generator=generator)
    scores[:, ::3] = 0
    selected = topk(scores, 2048, backend="reference")
    assert selected.tolist() == [topk_slowly(row, 2048) for row in scores.tolist()]


@pytest.mark.parametrize("num_scores", [3, 4, 5])
def test_rows_that_see_nothing(num_scores: int) -> None:
    assert topk(torch.full((2, num_scores), -INF), 4, backend="reference").tolist() == [[-1] * 4] * 2


@pytest.mark.parametrize("num_scores", [0, 4, 9])
def test_no_rows(num_scores: int) -> None:
    assert topk(torch.zeros(0, num_scores), 4, backend="reference").shape == (0, 4)


def test_scores_are_left_as_they_were(generator: torch.Generator) -> None:
    scores = torch.randn(3, 20, generator=generator)
    before = scores.clone()
    topk(scores, 5, backend="reference")
    assert torch.equal(scores, before)


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^topk: scores must be float32"):
        topk(torch.zeros(1, 4, dtype=torch.float64), 2, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^topk: k must be positive"):
        topk(torch.zeros(1, 4), 0, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^topk: "):
        topk(torch.zeros(1, 4), 2, backend="triton")

import math
from typing import Any

import numpy as np
import pytest
import torch

from kernels.backend import UnsupportedKernel
from kernels.gate_topk import gate_topk

OPTIONS: dict[str, Any] = {
    "num_groups": 4,
    "topk_group": 2,
    "k": 3,
    "normalize": True,
    "scale": 2.5,
    "backend": "reference",
}


def gate_slowly(
    scores: list[float], bias: list[float], num_groups: int, topk_group: int, k: int
) -> tuple[list[int], list[float]]:
    """The chosen experts, ascending, and their scores. `scores` are sigmoids; sums are float32."""
    choice = [np.float32(score) + np.float32(offset) for score, offset in zip(scores, bias, strict=True)]
    size = len(choice) // num_groups
    groups = range(num_groups)
    group_scores = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in groups]
    kept = sorted(groups, key=lambda g: (-group_scores[g], g))[:topk_group]
    candidates = [expert for expert in range(len(choice)) if expert // size in kept]
    chosen = sorted(sorted(candidates, key=lambda expert: (-choice[expert], expert))[:k])
    return chosen, [scores[expert] for expert in chosen]


def logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def test_a_token_worked_out_by_hand() -> None:
    # Two groups of four. Group 0 holds the single best expert, group 1 the better pair.
    scores = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.5, 0.2]
    logits = torch.tensor([[logit(score) for score in scores]])
    experts, weights = gate_topk(
        logits, torch.zeros(8), **{**OPTIONS, "num_groups": 2, "topk_group": 1, "k": 2, "scale": 2.0}
    )
    assert experts.dtype == torch.int64
    assert experts.tolist() == [[4, 5]]
    assert weights.tolist() == [[pytest.approx(1.0), pytest.approx(1.0)]]


def test_the_bias_chooses_and_never_weighs() -> None:
    logits = torch.tensor([[logit(0.8), logit(0.4), logit(0.2), logit(0.2)]])
    bias = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    options = {**OPTIONS, "num_groups": 1, "topk_group": 1, "k": 2}
    experts, weights = gate_topk(logits, bias, **options)
    assert experts.tolist() == [[1, 3]]
    assert weights[0].tolist() == pytest.approx([2.5 * 0.4 / 0.6, 2.5 * 0.2 / 0.6])
    _, plain = gate_topk(logits, bias, **{**options, "normalize": False})
    assert plain[0].tolist() == pytest.approx([2.5 * 0.4, 2.5 * 0.2])


def test_dropped_groups_lose_to_any_negative_choice() -> None:
    """With a bias that makes every s' negative, a mask of 0 in place of -inf would choose dropped experts."""
    bias = torch.full((8,), -10.0)
    bias[4:] = -9.0
    experts, _ = gate_topk(torch.zeros(1, 8), bias, **{**OPTIONS, "num_groups": 2, "topk_group": 1, "k": 4})
    assert experts.tolist() == [[4, 5, 6, 7]]


def test_ties_go_to_the_lower_group_and_the_lower_expert() -> None:
    logits = torch.zeros(3, 16)
    logits[1, 9] = 1.0  # group 2 is better than the others, which tie
    logits[2, [3, 7, 11, 15]] = 1.0  # the last expert of each group is its best
    experts, _ = gate_topk(logits, torch.zeros(16), **OPTIONS)
    assert experts.tolist() == [[0, 1, 2], [0, 1, 9], [0, 3, 7]]


@pytest.mark.parametrize(
    ("num_experts", "num_groups", "topk_group", "k"),
    [(16, 4, 2, 3), (16, 4, 2, 8), (8, 4, 4, 8), (8, 1, 1, 1), (32, 8, 4, 8), (256, 8, 4, 8)],
)
@pytest.mark.parametrize("levels", [2, 1 << 20])
def test_random_tokens_against_a_slow_gate(
    num_experts: int, num_groups: int, topk_group: int, k: int, levels: int, generator: torch.Generator
) -> None:
    """With few levels nearly everything ties."""
    logits = torch.randint(-levels, levels, (40, num_experts), generator=generator) * (4 / levels)
    bias = torch.randint(-1, 2, (num_experts,), generator=generator) * (0.0 if levels == 2 else 0.125)
    experts, weights = gate_topk(
        logits,
        bias,
        num_groups=num_groups,
        topk_group=topk_group,
        k=k,
        normalize=True,
        scale=2.5,
        backend="reference",
    )
    for token in range(len(logits)):
        scores = logits[token].sigmoid()  # float32, as the choice is made in it
        chosen, chosen_scores = gate_slowly(scores.tolist(), bias.tolist(), num_groups, topk_group, k)
        assert experts[token].tolist() == chosen
        expected = [2.5 * score / math.fsum(chosen_scores) for score in chosen_scores]
        assert weights[token].tolist() == pytest.approx(expected, rel=1e-5)


def test_no_tokens() -> None:
    experts, weights = gate_topk(torch.zeros(0, 16), torch.zeros(16), **OPTIONS)
    assert (experts.shape, weights.shape) == ((0, 3), (0, 3))


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^gate_topk: logits must be float32"):
        gate_topk(torch.zeros(1, 16, dtype=torch.bfloat16), torch.zeros(16), **OPTIONS)
    with pytest.raises(UnsupportedKernel, match=r"^gate_topk: 18 experts, 4 groups"):
        gate_topk(torch.zeros(1, 18), torch.zeros(18), **OPTIONS)
    with pytest.raises(UnsupportedKernel, match=r"^gate_topk: "):
        gate_topk(torch.zeros(1, 16), torch.zeros(16), **{**OPTIONS, "backend": "triton"})

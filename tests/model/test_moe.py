"""The router's traps, and routed experts as sums of parts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.checkpoint import Weights
from model.config import ModelConfig
from model.moe import DispatchPlan, Gate, LocalExperts, MoE, experts_of
from tests.checkpoints import facts, random_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 2.5


def gate(bias: list[float], **overrides: Any) -> Gate:
    """A gate whose weight is the identity: what it is given are its logits."""
    num_experts = len(bias)
    shape = {"hidden_size": num_experts, "n_routed_experts": num_experts, **overrides}
    config = ModelConfig.model_validate(facts(routed_scaling_factor=SCALE, **shape))
    weights = Weights({"gate.weight": torch.eye(num_experts)})
    weights["gate.e_score_correction_bias"] = torch.tensor(bias)
    return Gate(config, weights, "gate", "reference")


def logits(scores: list[float]) -> Tensor:
    """[1, E] of which the sigmoid is `scores`."""
    return torch.tensor([scores]).logit()


def route(router: Gate, scores: list[float]) -> tuple[list[int], list[float]]:
    plan = router.forward(logits(scores))
    return plan.experts[0].tolist(), plan.weights[0].tolist()


def test_bias_chooses_and_does_not_weigh() -> None:
    one_group = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    scores = [0.8, 0.6, 0.4, 0.2]
    assert route(gate([0.0] * 4, **one_group), scores)[0] == [0, 1]
    experts, weights = route(gate([0.0, 0.0, 0.0, 0.5], **one_group), scores)
    assert experts == [0, 3]
    assert weights == pytest.approx([SCALE * 0.8, SCALE * 0.2])  # 0.8 + 0.2 is 1 already


def test_group_score_is_the_sum_of_the_best_two() -> None:
    # By its best expert, group 0 would win; by the sum of all, group 2; by the best two, group 1.
    scores = [0.9, 0.1, 0.1, 0.1, 0.6, 0.6, 0.1, 0.1, 0.45, 0.45, 0.45, 0.45]
    router = gate([0.0] * 12, n_group=3, topk_group=1, num_experts_per_tok=2)
    assert route(router, scores)[0] == [4, 5]


def test_group_score_counts_the_bias() -> None:
    router = gate([0.0] * 4 + [0.3] * 4, n_group=2, topk_group=1, num_experts_per_tok=2)
    assert route(router, [0.5] * 4 + [0.4] * 4)[0] == [4, 5]


def test_dropped_groups_stay_out_when_every_biased_score_is_negative() -> None:
    """Filled with 0 in place of -inf, the groups that were dropped would win."""
    router = gate([-2.0] * 12, n_group=3, topk_group=1, num_experts_per_tok=3)
    scores = [0.2, 0.2, 0.1, 0.1, 0.9, 0.8, 0.3, 0.2, 0.5, 0.5, 0.5, 0.5]
    assert route(router, scores)[0] == [4, 5, 6]


def test_weights_are_normalised_and_then_scaled() -> None:
    shape = {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 3}
    scores = [0.5, 0.25, 0.1, 0.125, 0.1, 0.1]
    _, weights = route(gate([0.0] * 6, **shape), scores)
    assert weights == pytest.approx([SCALE * s / 0.875 for s in (0.5, 0.25, 0.125)])
    _, raw = route(gate([0.0] * 6, norm_topk_prob=False, **shape), scores)
    assert raw == pytest.approx([SCALE * s for s in (0.5, 0.25, 0.125)])


def test_ties_go_to_the_lower_group_and_expert() -> None:
    router = gate([0.0] * 16, n_group=4, topk_group=2, num_experts_per_tok=3)
    assert route(router, [0.5] * 16)[0] == [0, 1, 2]
    # Groups 1 and 3 are better than the rest and equal to each other; expert 15 is the best of all.
    scores = [0.1] * 4 + [0.5] * 4 + [0.1] * 4 + [0.3, 0.3, 0.3, 0.7]
    assert route(router, scores)[0] == [4, 5, 15]


def test_scores_are_taken_in_fp32(tensors: dict[str, Tensor], x: Tensor) -> None:
    """bf16 hidden states are widened before the product, which bf16 would round to three digits."""
    router = Gate(CONFIG, Weights(tensors), f"model.layers.{LAYER}.mlp.gate", "reference")
    low = x.bfloat16()
    assert torch.equal(router.forward(low).weights, router.forward(low.float()).weights)
    assert router.forward(low).weights.dtype == torch.float32


def route_by_hand(
    scores: list[float], bias: list[float], num_groups: int, topk_group: int, k: int
) -> dict[int, float]:
    """The router as its description reads, in Python's own numbers."""
    size = len(scores) // num_groups
    biased = [score + b for score, b in zip(scores, bias, strict=True)]
    groups = [range(g * size, (g + 1) * size) for g in range(num_groups)]
    best = sorted(groups, key=lambda group: -sum(sorted((biased[e] for e in group), reverse=True)[:2]))
    allowed = [expert for group in best[:topk_group] for expert in group]
    chosen = sorted(allowed, key=lambda expert: -biased[expert])[:k]
    total = sum(scores[expert] for expert in chosen)
    return {expert: SCALE * scores[expert] / total for expert in sorted(chosen)}


@pytest.mark.parametrize(("num_groups", "topk_group", "k"), [(1, 1, 4), (2, 1, 8), (8, 4, 8), (8, 3, 2)])
@pytest.mark.parametrize("bias_mean", [0.0, -3.0])
def test_random_routes(num_groups: int, topk_group: int, k: int, bias_mean: float) -> None:
    generator = torch.Generator().manual_seed(k)
    bias = (0.2 * torch.randn(32, generator=generator) + bias_mean).tolist()
    router = gate(bias, n_group=num_groups, topk_group=topk_group, num_experts_per_tok=k)
    x = torch.randn(200, 32, generator=generator)
    plan = router.forward(x)
    group_size = 32 // num_groups
    for row, experts, weights in zip(x.double().sigmoid(), plan.experts, plan.weights, strict=True):
        expected = route_by_hand(row.tolist(), bias, num_groups, topk_group, k)
        assert experts.tolist() == list(expected)
        assert weights.tolist() == pytest.approx(list(expected.values()), rel=1e-5)
        assert len({expert // group_size for expert in experts.tolist()}) <= topk_group


CONFIG = ModelConfig.model_validate(facts(n_routed_experts=16, num_experts_per_tok=4, n_shared_experts=2))
LAYER = 1


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return random_tensors(CONFIG, seed=0)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, CONFIG.hidden_size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def plan() -> DispatchPlan:
    generator = torch.Generator().manual_seed(2)
    experts = torch.stack([torch.randperm(16, generator=generator)[:4].sort().values for _ in range(50)])
    return DispatchPlan(experts, torch.rand(50, 4, generator=generator))


def feed_forward(tensors: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    gate_proj, up_proj, down_proj = (
        tensors[f"{prefix}.{name}_proj.weight"] for name in ("gate", "up", "down")
    )
    return F.linear(F.silu(F.linear(x, gate_proj)) * F.linear(x, up_proj), down_proj)


def groups_held(tensors: dict[str, Tensor], groups: range) -> LocalExperts:
    return LocalExperts(CONFIG, Weights(tensors), groups, "reference")


def test_experts_by_hand(tensors: dict[str, Tensor], x: Tensor, plan: DispatchPlan) -> None:
    expected = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(plan.experts[token].tolist(), plan.weights[token], strict=True):
            prefix = f"model.layers.{LAYER}.mlp.experts.{expert}"
            expected[token] += weight * feed_forward(tensors, prefix, x[token])
    out = groups_held(tensors, range(4)).forward(LAYER, x, plan)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_two_halves_sum_to_the_whole(
    tensors: dict[str, Tensor], x: Tensor, plan: DispatchPlan, cut: int
) -> None:
    low, high = groups_held(tensors, range(cut)), groups_held(tensors, range(cut, 4))
    parts = low.forward(LAYER, x, plan), high.forward(LAYER, x, plan)
    whole = groups_held(tensors, range(4)).forward(LAYER, x, plan)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-5, atol=1e-5)
    for part, groups in zip(parts, (range(cut), range(cut, 4)), strict=True):
        held = experts_of(CONFIG, groups)
        sent_here = torch.tensor([any(e in held for e in row) for row in plan.experts.tolist()])
        assert torch.equal(part.abs().amax(-1) > 0, sent_here)


def test_a_token_does_not_feel_its_neighbours(
    tensors: dict[str, Tensor], x: Tensor, plan: DispatchPlan
) -> None:
    experts = groups_held(tensors, range(4))
    whole = experts.forward(LAYER, x, plan)
    for token in (0, 17, 49):
        alone = DispatchPlan(plan.experts[token : token + 1], plan.weights[token : token + 1])
        row = experts.forward(LAYER, x[token : token + 1], alone)
        torch.testing.assert_close(row[0], whole[token], rtol=1e-5, atol=1e-5)


def test_the_shared_expert_is_added_plainly(tensors: dict[str, Tensor], x: Tensor) -> None:
    """Outside the gate: neither weighed by it nor scaled."""
    experts = groups_held(tensors, range(4))
    moe = MoE(CONFIG, Weights(tensors), LAYER, experts, "reference")
    routed: list[Tensor] = []
    out = moe.submit(x, routed).result()
    chosen = moe.gate.forward(x)
    shared = feed_forward(tensors, f"model.layers.{LAYER}.mlp.shared_experts", x)
    torch.testing.assert_close(out - experts.forward(LAYER, x, chosen), shared, rtol=1e-4, atol=1e-5)
    assert torch.equal(routed[0], chosen.experts)

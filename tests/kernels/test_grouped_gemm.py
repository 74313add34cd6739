import math

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend, UnsupportedKernel
from kernels.group_tree import add_all, blocks_of
from kernels.grouped_gemm import grouped_experts

WIDTH, INNER, NUM_EXPERTS = 6, 4, 5


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def expert_slowly(x: list[float], gate_up: list[list[float]], down: list[list[float]]) -> list[float]:
    rows = [sum(w * value for w, value in zip(row, x, strict=True)) for row in gate_up]
    gate, up = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    inner = [silu(g) * u for g, u in zip(gate, up, strict=True)]
    return [sum(w * value for w, value in zip(row, inner, strict=True)) for row in down]


def experts_slowly(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first: int
) -> Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(experts[token].tolist(), weights[token].tolist(), strict=True):
            local = expert - first
            if 0 <= local < len(gate_up):
                row = expert_slowly(x[token].tolist(), gate_up[local].tolist(), down[local].tolist())
                out[token] += weight * torch.tensor(row, dtype=torch.float64)
    return out


def total(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first: int,
    *,
    backend: Backend,
    group_size: int = 1,
) -> Tensor:
    """[T, D]: the launcher's blocks, added."""
    groups = range(first // group_size, (first + len(gate_up)) // group_size)
    sums = grouped_experts(x, experts, weights, gate_up, down, first, group_size, backend=backend)
    return add_all(zip(blocks_of(groups), sums, strict=True), Tensor.add_)


def random_plan(
    num_tokens: int, k: int, generator: torch.Generator, num_experts: int = NUM_EXPERTS
) -> tuple[Tensor, Tensor]:
    experts = torch.stack([torch.randperm(num_experts, generator=generator)[:k] for _ in range(num_tokens)])
    return experts.sort(-1).values, torch.rand(num_tokens, k, generator=generator)


def random_experts(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(NUM_EXPERTS, 2 * INNER, WIDTH, generator=generator)
    return gate_up, torch.randn(NUM_EXPERTS, WIDTH, INNER, generator=generator)


def test_one_token_worked_out_by_hand() -> None:
    """Expert 7 has gate 2, up 3, down [1, -1]; expert 8 the double of its down."""
    gate_up = torch.tensor([[[2.0], [3.0]], [[2.0], [3.0]]])
    down = torch.tensor([[[1.0]], [[2.0]]])
    x, experts, weights = torch.tensor([[1.0]]), torch.tensor([[7, 8]]), torch.tensor([[0.25, 0.5]])
    out = total(x, experts, weights, gate_up, down, 7, backend="reference")
    assert out.dtype == torch.float32
    assert out.item() == pytest.approx(3 * silu(2.0) * (0.25 + 2 * 0.5), rel=1e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 17])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_random_plans_against_a_slow_one(num_tokens: int, k: int, generator: torch.Generator) -> None:
    x = torch.randn(num_tokens, WIDTH, generator=generator)
    gate_up, down = random_experts(generator)
    experts, weights = random_plan(num_tokens, k, generator)
    out = total(x, experts, weights, gate_up, down, 0, backend="reference")
    # float32 sums of 6 products, of numbers below 100: 1e-4 is some ten ulps of the largest.
    torch.testing.assert_close(
        out.double(), experts_slowly(x, experts, weights, gate_up, down, 0), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(("first", "stop"), [(0, 2), (1, 4), (3, 5), (4, 5)])
def test_experts_held_elsewhere_are_skipped(first: int, stop: int, generator: torch.Generator) -> None:
    x = torch.randn(30, WIDTH, generator=generator)
    gate_up, down = random_experts(generator)
    experts, weights = random_plan(30, 2, generator)
    held = gate_up[first:stop], down[first:stop]
    out = total(x, experts, weights, *held, first, backend="reference")
    torch.testing.assert_close(
        out.double(), experts_slowly(x, experts, weights, *held, first), atol=1e-4, rtol=0
    )
    untouched = ((experts < first) | (experts >= stop)).all(-1)
    assert untouched.any()
    assert (out[untouched] == 0).all()


def test_the_order_in_which_a_token_names_its_experts_does_not_matter(generator: torch.Generator) -> None:
    """Bit for bit: the sum is taken by expert, ascending."""
    x = torch.randn(12, WIDTH, generator=generator)
    gate_up, down = random_experts(generator)
    experts, weights = random_plan(12, 4, generator)
    out = total(x, experts, weights, gate_up, down, 0, backend="reference")
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        again = total(x, experts[:, order], weights[:, order], gate_up, down, 0, backend="reference")
        assert torch.equal(again, out)


def test_the_sum_runs_over_ascending_experts() -> None:
    """1 + 2^24 - 2^24 is 0 or 1 in float32, by the order of the sum: 1 absorbed first is lost."""
    gate_up = torch.full((3, 2, 1), 1.0)
    down = torch.tensor([[[1.0]], [[2.0**24]], [[-(2.0**24)]]]) / silu(1.0)
    x = torch.ones(1, 1)
    forward = total(
        x, torch.tensor([[2, 1, 0]]), torch.ones(1, 3), gate_up, down, 0, backend="reference", group_size=3
    )
    one_by_one = [
        total(x, torch.tensor([[e]]), torch.ones(1, 1), gate_up, down, 0, backend="reference")
        for e in range(3)
    ]
    assert torch.equal(forward, one_by_one[0] + one_by_one[1] + one_by_one[2])
    assert not torch.equal(forward, one_by_one[2] + one_by_one[1] + one_by_one[0])


def test_every_split_into_groups_makes_the_same_bits(generator: torch.Generator) -> None:
    """Groups of two in a tree: by aligned blocks held apart, the sums of the whole come out bit for bit."""
    gate_up = torch.randn(8, 2 * INNER, WIDTH, generator=generator)
    down = torch.randn(8, WIDTH, INNER, generator=generator)
    x = torch.randn(20, WIDTH, generator=generator)
    experts, weights = random_plan(20, 5, generator, num_experts=8)
    whole = grouped_experts(x, experts, weights, gate_up, down, 0, 2, backend="reference")
    assert whole.shape == (1, 20, WIDTH)
    for size in (2, 4):
        parts = [
            grouped_experts(
                x, experts, weights, gate_up[i : i + size], down[i : i + size], i, 2, backend="reference"
            )
            for i in range(0, 8, size)
        ]
        blocks = [range(i // 2, (i + size) // 2) for i in range(0, 8, size)]
        sums = (part[0] for part in parts)
        assert torch.equal(add_all(zip(blocks, sums, strict=True), Tensor.add_), whole[0])
    assert not torch.equal(whole[0], sum(part[0] for part in parts)), "a chain rounds otherwise"


def test_bfloat16_weights_give_float32_sums(generator: torch.Generator) -> None:
    x = torch.randn(5, WIDTH, generator=generator).bfloat16()
    gate_up, down = (tensor.bfloat16() for tensor in random_experts(generator))
    experts, weights = random_plan(5, 3, generator)
    out = total(x, experts, weights, gate_up, down, 0, backend="reference")
    expected = experts_slowly(x.float(), experts, weights, gate_up.float(), down.float(), 0)
    assert out.dtype == torch.float32
    # Every expert's result passes through bf16 three times (2^-8 each), of sums that reach tens.
    scale = expected.abs().max()
    torch.testing.assert_close(out.double(), expected, atol=float(scale) * 3 * 2**-8, rtol=0)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_do(num_tokens: int, generator: torch.Generator) -> None:
    gate_up, down = random_experts(generator)
    experts = torch.full((num_tokens, 2), 99)
    out = total(
        torch.ones(num_tokens, WIDTH),
        experts,
        torch.ones(num_tokens, 2),
        gate_up,
        down,
        0,
        backend="reference",
    )
    assert torch.equal(out, torch.zeros(num_tokens, WIDTH))


def test_refusals(generator: torch.Generator) -> None:
    gate_up, down = random_experts(generator)
    x, experts, weights = torch.ones(1, WIDTH), torch.tensor([[0]]), torch.ones(1, 1)
    with pytest.raises(
        UnsupportedKernel, match=r"^grouped_experts: gate_up and down hold different experts$"
    ):
        grouped_experts(x, experts, weights, gate_up, down[1:], 0, 1, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"no groups of 2$"):
        grouped_experts(x, experts, weights, gate_up, down, 1, 2, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^grouped_experts: "):
        grouped_experts(x, experts, weights, gate_up, down, 0, 1, backend="triton")

"""Speculation and replay: drafts change no token, and as many of them stand as promised."""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.sampling import SampleRow, num_accepted
from model.sampling_params import SamplingParams
from tests.model.sampling_reference import draw, exact_distribution, make_row


def target_logits(prefix: Sequence[int], vocab_size: int = 16) -> Tensor:
    """A model: [V] logits that depend on every token of the prefix, in order."""
    state = 1
    for token in prefix:
        state = (state * 6364136223846793005 + token + 1) % 2**63
    return 2 * torch.randn(vocab_size, generator=torch.Generator().manual_seed(state))


def generate(row: SampleRow, num_tokens: int, draft: Any) -> tuple[list[int], int]:
    """Decodes with `draft(output)` tokens guessed a step; also returns how many guesses stood."""
    output: list[int] = []
    accepted = 0
    while len(output) < num_tokens:
        drafts = draft(output)
        here = replace(row, position=row.position + len(output), output=tuple(output))
        rows = [here.after(drafts[:j]) for j in range(len(drafts) + 1)]
        logits = torch.stack([target_logits([*output, *drafts[:j]]) for j in range(len(rows))])
        tokens = draw(logits, rows)
        gained = num_accepted(drafts, tokens)
        accepted += gained
        output += tokens[: gained + 1]
    return output[:num_tokens], accepted


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 2.0},
        {},
        {"top_p": 0.8},
        {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.5, "presence_penalty": 1.0},
    ],
    ids=str,
)
def test_speculation_does_not_change_a_token(params: dict[str, float]) -> None:
    row = make_row(5, seed=99, choice=1, **params)
    plain, _ = generate(row, 60, lambda output: [])
    guess = random.Random(4)

    def half_right(output: list[int]) -> list[int]:
        right = plain[len(output) : len(output) + guess.randrange(4)]
        return [token if guess.random() < 0.7 else guess.randrange(16) for token in right]

    for draft in (half_right, lambda output: [guess.randrange(16)], lambda output: plain[len(output) :][:7]):
        tokens, accepted = generate(row, 60, draft)
        assert tokens == plain
        assert accepted > 0  # or the comparison would say nothing


def test_a_replay_from_anywhere_draws_the_same_tokens() -> None:
    row = make_row(0, seed=5, frequency_penalty=0.5)
    whole, _ = generate(row, 40, lambda output: [])
    for start in (1, 17, 39):
        prefix = tuple(whole[:start])
        (token,) = draw(target_logits(prefix)[None], [replace(row, position=start, output=prefix)])
        assert token == whole[start]


@pytest.mark.parametrize(
    ("drafts", "tokens", "expected"),
    [([], [4], 0), ([4], [4, 5], 1), ([4], [5, 4], 0), ([4, 5, 6], [4, 9, 6, 1], 1), ([4, 5], [4, 5, 6], 2)],
)
def test_num_accepted(drafts: list[int], tokens: list[int], expected: int) -> None:
    assert num_accepted(drafts, tokens) == expected


def agreement(p: list[float], q: list[float]) -> float:
    pairs = list(zip(p, q, strict=True))
    return sum(1 / sum(max(pi / pj, qi / qj) for pi, qi in pairs) for pj, qj in pairs)


def test_drafts_drawn_with_the_same_noise_agree_as_promised() -> None:
    """The rate is binomial with the exact probability; 4 standard deviations are passed once in 16,000."""
    p_logits, q_logits = [0.0, 1.0, 2.0, 0.5, -1.0], [0.3, 0.2, 2.2, 1.0, -2.0]
    p, q = (exact_distribution(logits, SamplingParams(max_tokens=1)) for logits in (p_logits, q_logits))
    num = 20_000
    rows = [make_row(position, seed=8) for position in range(num)]
    model, drafts = (draw(torch.tensor([logits]).expand(num, -1), rows) for logits in (p_logits, q_logits))
    rate = sum(a == b for a, b in zip(model, drafts, strict=True)) / num
    expected = agreement(p, q)
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / num)


positive = st.lists(st.floats(0.01, 1), min_size=4, max_size=4)


@given(positive, positive)
def test_agreement_has_the_bound_of_the_docstring(p: list[float], q: list[float]) -> None:
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    distance = sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
    assert (1 - distance) / (1 + distance) - 1e-12 <= agreement(p, q) <= 1 - distance + 1e-12

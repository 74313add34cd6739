"""Sampled tokens and log-probabilities: against a reference, in distribution, beside any neighbours."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import noise, sampling
from model.sampling import Drawing, NonFiniteLogits, SampleRow, sample
from model.sampling_params import SamplingParams, logit_bias_pairs
from tests.model.sampling_reference import (
    adjusted_reference,
    draw,
    draw_reference,
    exact_distribution,
    make_row,
)

FULL_VOCAB = 129_280
# Of every statistical test here, over all seeds one could have fixed. With the seeds that are fixed the tests
# are deterministic: one that passes, passes always.
FALSE_ALARM = 1e-4


# Tokens against the reference.

# Flat, so that much is kept. Coarse logits make ties the rule; fine ones find what rounding could break.
logit_lists = st.one_of(
    st.lists(st.integers(-6, 6).map(lambda i: i / 4), min_size=1, max_size=24),
    st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=24),
)
token_lists = st.lists(st.integers(0, 23), max_size=6)


@st.composite
def params_strategy(draw: st.DrawFn) -> SamplingParams:
    def maybe(default: float, strategy: st.SearchStrategy[float]) -> float:
        return draw(st.one_of(st.just(default), strategy))

    return SamplingParams(
        max_tokens=1,
        temperature=draw(st.sampled_from([1.0, 2.0, 1.7, 0.5, 0, 1e-300])),
        top_p=maybe(1.0, st.sampled_from([0.9, 0.77, 0.5, 0.999, 0])),
        top_k=draw(st.sampled_from([0, 5, 10**400, 9, 2, 1])),
        min_p=maybe(0.0, st.sampled_from([0.03, 0.3, 1.0])),
        frequency_penalty=maybe(0.0, st.floats(-2, 2)),
        presence_penalty=maybe(0.0, st.floats(-2, 2)),
        repetition_penalty=maybe(1.0, st.floats(0.5, 2)),
        logit_bias=logit_bias_pairs(draw(st.dictionaries(st.integers(0, 23), st.floats(-3, 3), max_size=3))),
        seed=draw(st.integers(-(2**63), 2**64 - 1)),
    )


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[list[float]], list[SampleRow]]:
    logits = draw(logit_lists)
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        params = draw(params_strategy())
        bias = tuple(pair for pair in params.logit_bias if pair[0] < len(logits))
        prompt, output = ([i for i in draw(token_lists) if i < len(logits)] for _ in range(2))
        position, choice = draw(st.integers(0, 2**32 - 1)), draw(st.integers(0, 7))
        rows.append(SampleRow(replace(params, logit_bias=bias), position, choice, prompt, output))
    return [draw(st.permutations(logits)) for _ in rows], rows


@settings(max_examples=400, deadline=None)
@given(batches(), st.sampled_from([(512, 16), (1, 2), (3, 2)]))
def test_tokens_equal_the_reference(
    batch: tuple[list[list[float]], list[SampleRow]], widths: tuple[int, int]
) -> None:
    """Every parameter at once. The small widths send small vocabularies the way of large ones."""
    logits, rows = batch
    with mock.patch.multiple(sampling, _FIRST_WIDTH=widths[0], _WIDER=widths[1]):
        assert draw(torch.tensor(logits), rows) == list(map(draw_reference, logits, rows))


@given(batches())
def test_adjusted_logits_equal_the_reference(batch: tuple[list[list[float]], list[SampleRow]]) -> None:
    logits, rows = batch
    before = torch.tensor(logits)
    adjusted = sampling._adjusted(before, rows)
    assert adjusted.tolist() == [adjusted_reference(*pair) for pair in zip(logits, rows, strict=True)]
    assert before.tolist() == torch.tensor(logits).tolist()  # the caller's tensor is left as it was


def test_penalties_by_hand() -> None:
    """Token 1 generated twice, token 2 in the prompt only, token 3 both, token 0 never seen."""
    params = SamplingParams(
        max_tokens=9,
        frequency_penalty=0.5,
        presence_penalty=0.25,
        repetition_penalty=2.0,
        logit_bias=((0, 3.0),),
    )
    row = SampleRow(params, position=9, prompt=[2, 3], output=[1, 3, 1])
    adjusted = sampling._adjusted(torch.tensor([[1.0, 4.0, -1.0, 6.0]]), [row])
    assert adjusted.tolist() == [[4.0, 2.0 - 1.0 - 0.25, -2.0, 3.0 - 0.5 - 0.25]]


# Ties.


@pytest.mark.parametrize("vocab_size", [5, 1000, 8192, FULL_VOCAB])
def test_argmax_takes_the_lower_of_equals(vocab_size: int) -> None:
    logits = torch.zeros(3, vocab_size)
    logits[1, [3, 4, vocab_size - 1]] = 1.0
    logits[2, vocab_size - 1] = 1.0
    assert draw(logits, [make_row(temperature=0)] * 3) == [0, 3, vocab_size - 1]


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        pytest.param({"top_k": 2}, {1, 2}, id="top_k"),
        pytest.param({"top_p": 0.5}, {1, 2}, id="top_p, reached exactly"),
        pytest.param({"top_p": 0.51}, {1, 2, 3}, id="top_p, just not reached"),
        pytest.param({"top_p": 0.0}, {1}, id="top_p of nothing keeps one"),
        pytest.param({"top_k": 3, "top_p": 0.6}, {1, 2}, id="top_p counts what top_k left"),
        pytest.param({"top_k": 3, "top_p": 0.45}, {1, 2}, id="all that top_k left, not what was seen of it"),
        pytest.param({"top_k": 10**30, "top_p": 0.5}, {1, 2}, id="top_p of the whole vocabulary"),
        pytest.param({"min_p": 1.0}, {1, 2, 3, 4}, id="min_p keeps equals"),
        pytest.param({"top_k": 10**30}, {1, 2, 3, 4}, id="top_k beyond the vocabulary"),
    ],
)
@pytest.mark.parametrize("width", [1, 2, 512])
def test_the_edge_of_a_cut_goes_to_the_lower_id(params: dict[str, float], kept: set[int], width: int) -> None:
    """Four equal logits, two forbidden ones and a zero of the other sign; 200 draws find every kept one.

    One of four being missed has a probability of at most 4 * 0.75**200, below 1e-24.
    """
    logits = torch.tensor([[-torch.inf, 0.0, -0.0, 0.0, 0.0, -torch.inf]]).expand(200, -1)
    rows = [make_row(position, **params) for position in range(200)]
    with mock.patch.object(sampling, "_FIRST_WIDTH", width):
        assert set(draw(logits, rows)) == kept


@given(st.lists(st.integers(-2, 2), min_size=1, max_size=30), st.data())
def test_leading_is_the_front_of_a_stable_sort(logits: list[int], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(logits)))
    values, ids = sampling._leading(torch.tensor([logits], dtype=torch.float32), width)
    expected = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[:width]
    assert ids.tolist() == [expected]
    assert values.tolist() == [[logits[i] for i in expected]]


# Distributions.


def chi_square_p(observed: Sequence[int], probabilities: Sequence[float]) -> float:
    """Probability of a chi-square statistic at least as large, if the tokens come from `probabilities`."""
    assert all(n == 0 for n, p in zip(observed, probabilities, strict=True) if p == 0)
    pairs = [(n, p * sum(observed)) for n, p in zip(observed, probabilities, strict=True) if p > 0]
    assert all(expected >= 5 for _, expected in pairs), "too few draws for a chi-square test"
    statistic = sum((n - expected) ** 2 / expected for n, expected in pairs)
    half = torch.tensor([(len(pairs) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def test_chi_square_p() -> None:
    """3.841 and 18.307 are the tabled 5 % points of 1 and 10 degrees of freedom."""
    shift = math.sqrt(3.841 * 250)
    assert chi_square_p([500 + round(shift), 500 - round(shift)], [0.5, 0.5]) == pytest.approx(0.05, abs=1e-3)
    eleven = [100.0] * 11
    eleven[0] += math.sqrt(18.307 * 100 / 1.1)
    eleven = [n - (eleven[0] - 100) / 10 if i else n for i, n in enumerate(eleven)]
    assert chi_square_p(eleven, [1 / 11] * 11) == pytest.approx(0.05, abs=1e-4)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 3},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.5, "top_k": 6, "top_p": 0.9, "min_p": 0.12},
    ],
    ids=str,
)
def test_distribution_is_exact(params: dict[str, float]) -> None:
    """20,000 draws, one a position: equal to the probabilities by a chi-square test at FALSE_ALARM."""
    logits = [0.3, -1.2, 2.0, 0.3, 1.1, -0.4, 1.1, 0.0]
    rows = [make_row(position, seed=2024, **params) for position in range(20_000)]
    tokens = draw(torch.tensor([logits]).expand(len(rows), -1), rows)
    observed = [tokens.count(i) for i in range(len(logits))]
    assert chi_square_p(observed, exact_distribution(logits, rows[0].params)) > FALSE_ALARM


@pytest.mark.parametrize("what", ["seed", "choice", "position"])
def test_draws_are_independent_along(what: str) -> None:
    """Pairs of neighbouring draws fill the 4 x 4 table of a fair coin with four sides, at FALSE_ALARM."""
    places = {
        "seed": [make_row(7, seed=i) for i in range(20_000)],
        "choice": [make_row(i // 2, choice=i % 2) for i in range(20_000)],
        "position": [make_row(i) for i in range(20_000)],
    }
    tokens = draw(torch.zeros(20_000, 4), places[what])
    pairs = [4 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    assert chi_square_p([pairs.count(i) for i in range(16)], [1 / 16] * 16) > FALSE_ALARM


def test_a_tiny_temperature_still_shares_among_equals() -> None:
    """Scaled by 1e-300 the logits are 1e302: the noise must not drown in them. At FALSE_ALARM."""
    rows = [make_row(position, temperature=1e-300) for position in range(2000)]
    tokens = draw(torch.tensor([[100.0, 99.0, 100.0]]).expand(len(rows), -1), rows)
    assert chi_square_p([tokens.count(i) for i in range(3)], [0.5, 0.0, 0.5]) > FALSE_ALARM


# Independence of everything else.

MIXED_PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0, "logprobs": 3},
    {"logprobs": 0},
    {"temperature": 0.7, "top_p": 0.9, "logprobs": 20},
    {"top_k": 40},
    {"top_p": 0.999},
    {"min_p": 0.1, "top_k": 700},
    {"temperature": 1.3, "logit_bias": ((5, 4.0),), "frequency_penalty": 1.0, "logprobs": 5},
]


@pytest.mark.parametrize("vocab_size", [257, 8192, 40_001])
def test_batch_neighbours_do_not_matter(vocab_size: int) -> None:
    """Tokens and log-probabilities of a row have the same bits alone, in every half and in reverse."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        replace(make_row(i, choice=i % 3, seed=i * 2**61, **params), output=[5, 6, 5])
        for i, params in enumerate(MIXED_PARAMS)
    ]
    logits = 3 * torch.randn(len(rows), vocab_size, generator=generator)
    together = sample(logits, rows)
    assert any(logprobs is not None for logprobs in together.logprobs)
    for indices in (
        [0, 2, 3, 5],
        [1, 4, 6, 7],
        list(range(len(rows)))[::-1],
        *([i] for i in range(len(rows))),
    ):
        part = sample(logits[indices], [rows[i] for i in indices])
        assert part.tokens == [together.tokens[i] for i in indices]
        assert part.logprobs == [together.logprobs[i] for i in indices]


def test_large_batches_are_cut_into_parts() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(2))
    rows = [make_row(i, **({"top_p": 0.9} if i % 2 else {})) for i in range(9)]
    whole = draw(logits, rows)
    with mock.patch.object(sampling, "_ELEMENTS_AT_ONCE", 100):
        assert draw(logits, rows) == whole


@given(st.integers(0, 2**32), st.floats(-20, 20))
@settings(max_examples=30, deadline=None)
def test_adding_a_constant_changes_nothing(seed: int, constant: float) -> None:
    """On a grid that float32 adds exactly; only differences of logits have a meaning."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-64, 64, (4, 100), generator=generator) / 8
    rows = [
        make_row(i, **params)
        for i, params in enumerate([{"temperature": 0}, {}, {"top_p": 0.9}, {"top_k": 9}])
    ]
    assert draw(logits + round(constant * 8) / 8, rows) == draw(logits, rows)


@given(st.integers(0, 2**32), st.integers(1, 2**64 - 1))
@settings(max_examples=30, deadline=None)
def test_forbidding_a_token_that_lost_changes_nothing(generator_seed: int, seed: int) -> None:
    """The noise of a token is its own, so the winner stays the winner when another leaves the race."""
    generator = torch.Generator().manual_seed(generator_seed)
    logits = torch.randn(1, 30, generator=generator)
    row = make_row(3, seed=seed)
    (winner,) = draw(logits, [row])
    logits[0, (winner + 1) % 30] = -torch.inf
    assert draw(logits, [row]) == [winner]


def test_signed_and_unsigned_seeds_are_the_same_64_bits() -> None:
    logits = torch.randn(1, 1000, generator=torch.Generator().manual_seed(3)).expand(20, -1)
    signed, unsigned, other = (
        draw(logits, [make_row(i, seed=seed) for i in range(20)]) for seed in (-1, 2**64 - 1, 2**32 - 1)
    )
    assert signed == unsigned
    assert signed != other


def test_who_reads_settles_the_rows_that_he_wants() -> None:
    """Nuclei beyond the first look, and a row without a token."""
    logits, rows = torch.zeros(8, 2000), [make_row(i, top_p=0.99) for i in range(8)]
    logits[7] = torch.nan
    expected, drawing = draw(logits[:7], rows[:7]), Drawing(logits, rows)
    guesses = drawing.tokens.tolist()
    assert guesses[7] == -1
    assert drawing.read_tokens(wanted=()) == guesses
    assert not drawing.late
    assert drawing.read_tokens(wanted=(0, 1, 2))[:3] == expected[:3]
    assert drawing.read_tokens(wanted=range(7))[:7] == expected
    assert drawing.late == {i for i in range(7) if guesses[i] != expected[i]} != set()
    with pytest.raises(NonFiniteLogits) as failure:
        drawing.read()
    assert failure.value.rows == (7,)


def test_full_vocabulary() -> None:
    """No nucleus fits the first look here: half a vocabulary of equals, then of almost equals."""
    logits = torch.zeros(2, FULL_VOCAB)
    logits[1] = torch.linspace(0, 1e-3, FULL_VOCAB)
    tokens = draw(logits, [make_row(11, top_p=0.5)] * 2)
    noise_of = noise.gumbel(
        torch.tensor([0]), torch.tensor([0]), torch.tensor([11]), torch.arange(FULL_VOCAB)
    )
    assert tokens[0] == int(noise_of[: FULL_VOCAB // 2].argmax())
    assert tokens[1] >= FULL_VOCAB // 2 - 100  # the better half, whose mass is a little above one half
    assert draw(logits, [make_row(11, top_k=1)] * 2) == [0, FULL_VOCAB - 1]


# Log-probabilities.


def test_logprobs_are_those_of_the_raw_logits() -> None:
    """Whatever bias, temperature and cuts say. 1e-8 is what the integer masses cost (4e-9) and a little."""
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(6))
    params = {"temperature": 0.5, "top_k": 2, "logit_bias": ((17, 100.0),), "presence_penalty": 1.0}
    result = sample(logits, [make_row(1, logprobs=4, **params), make_row(2, **params)])
    assert result.tokens == [17, 17]
    assert result.logprobs[1] is None
    expected = logits[0].double().log_softmax(-1)
    found = result.logprobs[0]
    assert found is not None
    assert found.logprob == pytest.approx(expected[17].item(), abs=1e-8)
    values, ids = expected.sort(descending=True)
    assert [i for i, _ in found.top] == ids[:4].tolist()
    assert [value for _, value in found.top] == pytest.approx(values[:4].tolist(), abs=1e-8)


def test_alternatives_of_equal_and_forbidden_tokens() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, 0.0, 1.0]])
    (found,) = sample(logits, [make_row(temperature=0, logprobs=20)]).logprobs
    assert found is not None
    assert [i for i, _ in found.top] == [2, 4, 0, 3]
    (found,) = sample(logits, [make_row(temperature=0, logprobs=0)]).logprobs
    assert found is not None
    assert found.top == ()
    assert found.logprob == pytest.approx(-math.log(2 + 2 / math.e), abs=1e-8)


# Refusals.


@pytest.mark.parametrize(
    "params", [{"temperature": 0}, {}, {"top_p": 0.5}, {"temperature": 0, "logprobs": 1}], ids=str
)
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param([0.0, torch.nan, 1.0], id="nan"),
        pytest.param([0.0, torch.inf, 1.0], id="inf"),
        pytest.param([-torch.inf] * 3, id="all forbidden"),
    ],
)
def test_non_finite_logits_name_their_rows(bad: list[float], params: dict[str, Any]) -> None:
    good = [0.0, -torch.inf, 1.0]
    rows = [make_row(i, **params) for i in range(4)]
    with pytest.raises(NonFiniteLogits, match="rows 1, 3") as caught:
        sample(torch.tensor([good, bad, good, bad]), rows)
    assert caught.value.rows == (1, 3)
    # The others can be drawn again without them.
    assert len(sample(torch.tensor([good, good]), rows[:2]).tokens) == 2


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 5), []) == sampling.SampleResult([], [])


@pytest.mark.gpu
def test_same_tokens_on_gpu_and_cpu() -> None:
    """Not almost: noise, masses, sorts and log-probabilities have the same bits on both."""
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    generator = torch.Generator().manual_seed(7)
    rows = [
        replace(
            make_row(i, choice=i % 8, seed=i * 2**58, **MIXED_PARAMS[i % len(MIXED_PARAMS)]), output=[5, 6, 5]
        )
        for i in range(64)
    ]
    for vocab_size in (257, FULL_VOCAB):
        logits = 3 * torch.randn(len(rows), vocab_size, generator=generator)
        logits = (logits * 16).round() / 16  # ties by the dozen
        on_cpu = sample(logits, rows)
        assert sample(logits.cuda(), rows) == on_cpu
        assert Drawing(logits.cuda(), rows, backend="triton").read() == on_cpu

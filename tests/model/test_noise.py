import hashlib
import math
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import noise


def philox_reference(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [p1 >> 32 ^ c[1] ^ k[0], p1 % 2**32, p0 >> 32 ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def gumbel_reference(seed: int, choice: int, position: int, token_id: int) -> float:
    words = philox_reference([token_id, position, choice, 0], [seed % 2**32, (seed % 2**64) >> 32])
    uniform = ((words[0] << 20 | words[1] >> 12) + 0.5) / 2**52
    return -math.log(-math.log(uniform))


# Bits, and what is made of them.


@pytest.mark.parametrize("size", [1, 7, 64], ids=lambda size: f"{size} in a tensor")
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        pytest.param([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8", id="zeros"),
        pytest.param([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd", id="ones"),
        pytest.param(
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
            id="pi",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: str, size: int) -> None:
    """The published vectors of Random123; in several sizes, as torch has code of its own for short ends."""
    c = [torch.full((size,), word) for word in counter]
    k = [torch.full((size,), word) for word in key]
    words = noise.philox4x32((c[0], c[1], c[2], c[3]), (k[0], k[1]))
    for i in range(size):
        assert " ".join(f"{int(word[i]):08x}" for word in words) == expected


@given(
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 7),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**18 - 1),
)
def test_gumbel_equals_the_reference(seed: int, choice: int, position: int, token_id: int) -> None:
    value = noise.gumbel(*(torch.tensor([number]) for number in (seed, choice, position, token_id)))
    # Two logarithms of 4 ulp each; where the outer one passes through zero only the absolute error is small.
    expected = gumbel_reference(seed, choice, position, token_id)
    assert value.item() == pytest.approx(expected, rel=1e-14, abs=1e-14)


def test_bits_never_change() -> None:
    """A seed stands for the same tokens on every machine and in every release: this digest never changes."""
    token_id = torch.arange(20_000)
    seed, choice, position = (torch.tensor([number]) for number in (0x0123456789ABCDEF, 3, 4567))
    values = noise.gumbel(seed, choice, position, token_id)
    digest = hashlib.sha256(values.numpy().tobytes() + noise.exp(-values.abs()).numpy().tobytes())
    assert digest.hexdigest() == "fa274fa7a12e6ec68720fc1bac77eff7313b89e27383f051b16ff0610208735e"


def test_gumbel_is_finite_for_the_extreme_bits() -> None:
    for word, expected in ((0, -math.log(53 * math.log(2))), (0xFFFFFFFF, 53 * math.log(2))):
        words = tuple(torch.tensor([word]) for _ in range(4))
        with mock.patch.object(noise, "philox4x32", return_value=words):
            zero = torch.tensor([0])
            assert noise.gumbel(zero, zero, zero, zero).item() == pytest.approx(expected, rel=1e-12)


@given(st.floats(min_value=2.0**-1000, max_value=2.0**1000))
def test_log_within_4_ulp(x: float) -> None:
    expected = math.log(x)
    assert abs(noise.log(torch.tensor([x], dtype=torch.float64)).item() - expected) <= 4 * math.ulp(expected)


@given(st.floats(min_value=-700.0, max_value=0.0))
def test_exp_within_4_ulp(x: float) -> None:
    expected = math.exp(x)
    assert abs(noise.exp(torch.tensor([x], dtype=torch.float64)).item() - expected) <= 4 * math.ulp(expected)


def test_exp_of_zero_and_of_nothing() -> None:
    values = noise.exp(torch.tensor([0.0, -0.0, -701.0, -torch.inf], dtype=torch.float64))
    assert values[:2].tolist() == [1.0, 1.0]
    assert values[2] == values[3] == noise.exp(torch.tensor([-700.0], dtype=torch.float64))


def test_log_and_exp_do_not_depend_on_the_place_in_a_tensor() -> None:
    values = torch.rand(1031, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for function in (noise.log, lambda x: noise.exp(-x)):
        together = function(values)
        for start, end in ((1, 1031), (1030, 1031), (3, 10)):
            assert torch.equal(function(values[start:end].clone()), together[start:end])

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.rope import apply_rope


def rotate_slowly(row: list[float], angles: list[float], interleaved: bool) -> list[float]:
    out, half = list(row), len(row) // 2
    for i, angle in enumerate(angles):
        first, second = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        a, b = row[first], row[second]
        out[first] = a * math.cos(angle) - b * math.sin(angle)
        out[second] = a * math.sin(angle) + b * math.cos(angle)
    return out


def rotate(x: Tensor, angles: Tensor, *, interleaved: bool) -> Tensor:
    return apply_rope(x, angles.cos(), angles.sin(), interleaved=interleaved, backend="reference")


def test_a_quarter_turn_by_hand() -> None:
    """Only the second of two pairs turns: (a, b) -> (-b, a)."""
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    cos, sin = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    neighbours = apply_rope(x, cos, sin, interleaved=True, backend="reference")
    halves = apply_rope(x, cos, sin, interleaved=False, backend="reference")
    assert neighbours.tolist() == [[1.0, 2.0, -4.0, 3.0]]
    assert halves.tolist() == [[1.0, -4.0, 3.0, 2.0]]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(1, 2), (5, 8), (4, 3, 8), (1, 1, 64)])
def test_random_vectors_against_a_slow_one(
    shape: tuple[int, ...], interleaved: bool, generator: torch.Generator
) -> None:
    x = torch.randn(shape, generator=generator)
    angles = torch.randn(shape[0], shape[-1] // 2, generator=generator) * 3
    found = rotate(x, angles, interleaved=interleaved)
    assert found.shape == x.shape
    rows = x.unsqueeze(1) if x.dim() == 2 else x
    expected = [
        [rotate_slowly(head, angles[t].tolist(), interleaved) for head in rows[t].tolist()]
        for t in range(shape[0])
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected).double().view(shape), atol=2e-6, rtol=0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_products_depend_on_the_distance_alone(interleaved: bool, generator: torch.Generator) -> None:
    q, k = torch.randn(1, 8, generator=generator), torch.randn(1, 8, generator=generator)
    frequencies = torch.tensor([[1.0, 0.3, 0.1, 0.01]])
    products = [
        (
            rotate(q, (p + 7) * frequencies, interleaved=interleaved)
            * rotate(k, p * frequencies, interleaved=interleaved)
        ).sum()
        for p in (0, 3, 50)
    ]
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), atol=1e-5, rtol=0)


def test_bfloat16_is_rounded_once_at_the_end(generator: torch.Generator) -> None:
    x, angles = torch.randn(3, 2, 8, generator=generator).bfloat16(), torch.randn(3, 4, generator=generator)
    found = rotate(x, angles, interleaved=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, rotate(x.float(), angles, interleaved=True).bfloat16())


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8)])
def test_no_rows(shape: tuple[int, ...], interleaved: bool) -> None:
    assert rotate(torch.zeros(shape), torch.zeros(0, 4), interleaved=interleaved).shape == shape


def test_refusals() -> None:
    cos = sin = torch.ones(1, 4)
    with pytest.raises(UnsupportedKernel, match=r"^apply_rope: 6 channels, 4 angles$"):
        apply_rope(torch.zeros(1, 6), cos, sin, interleaved=True, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^apply_rope: "):
        apply_rope(torch.zeros(1, 8), cos, sin, interleaved=True, backend="triton")
    with pytest.raises(TypeError, match="interleaved"):  # the layout has no default
        apply_rope(torch.zeros(1, 8), cos, sin, backend="reference")  # type: ignore[call-arg]

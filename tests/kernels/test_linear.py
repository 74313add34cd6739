import math

import pytest
import torch
from torch import Tensor

import kernels.linear
from kernels.backend import UnsupportedKernel
from kernels.linear import linear, stable
from tests.kernels.alone import same_alone_and_among_others

# The demo's, with those of attention heads, and odd ones.
SHAPES = [
    (352, 256),
    (256, 768),
    (8, 256),
    (1000, 128),
    (8, 128, 32),
    (33, 77),
    (7, 5),
    (3, 40, 24),
    (1, 11, 64),
]


def rows(num_rows: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape[:-2], num_rows, shape[-1], generator=generator)


@pytest.mark.parametrize("num_rows", [0, 1, 3, 4, 70])
@pytest.mark.parametrize("shape", [(2, 3), (2, 2, 3)])
def test_whole_numbers_are_exact(num_rows: int, shape: tuple[int, ...], generator: torch.Generator) -> None:
    """Sums of small whole numbers are exact in any order, so both backends make the same bits."""
    x, weight = rows(num_rows, shape, generator).round(), torch.arange(math.prod(shape)).float().view(shape)
    out = linear(x, weight, backend="deterministic")
    assert out.shape == (*x.shape[:-1], 2)
    assert torch.equal(out, x @ weight.transpose(-1, -2))
    assert torch.equal(out, linear(x, weight, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES[:5])
def test_deterministic_is_the_reference_up_to_rounding(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    weight = torch.randn(shape, generator=generator).to(dtype)
    x = rows(85, shape, generator).to(dtype)
    out, expected = (linear(x, weight, backend=backend) for backend in ("deterministic", "reference"))
    # Sums of K products of deviation 1, rounded once to the dtype and on the way to fp32.
    torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 * shape[-1] ** 0.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_bits_of_its_own(shape: tuple[int, ...], generator: torch.Generator) -> None:
    weight = stable(torch.randn(shape, generator=generator), backend="deterministic")
    x = rows(150, shape, generator)

    def product(index: Tensor) -> Tensor:
        out = linear(x[..., index, :], weight, backend="deterministic")
        return out.transpose(0, -2)

    assert same_alone_and_among_others(product, 150)


def test_memory_does_not_matter(generator: torch.Generator) -> None:
    """Rows and weights that begin at odd addresses, or lie apart."""
    weight, x = torch.randn(64, 48, generator=generator), torch.randn(9, 48, generator=generator)
    expected = linear(x, weight, backend="deterministic")
    for offset in (1, 3):
        moved = torch.zeros(x.numel() + offset)[offset:].view(x.shape).copy_(x)
        assert torch.equal(linear(moved, weight, backend="deterministic"), expected)
    apart = torch.zeros(9, 2, 48).transpose(0, 1)
    apart[0] = x
    assert torch.equal(linear(apart[0], weight, backend="deterministic"), expected)


def test_a_library_that_breaks_the_promise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of other sizes that add up in other orders; a neighbour that is felt; a place that is felt."""
    honest = kernels.linear.linear_reference

    def by_size(x: Tensor, weight: Tensor) -> Tensor:
        if x.shape[-2] > 4:
            return honest(x, weight)
        return honest(x[..., ::2], weight[..., ::2]) + honest(x[..., 1::2], weight[..., 1::2])

    def by_neighbour(x: Tensor, weight: Tensor) -> Tensor:
        return honest(x, weight) * (1 + 2**-23 * (x[..., :1, :1] > 0))  # the first row decides

    def by_place(x: Tensor, weight: Tensor) -> Tensor:
        out = honest(x, weight)
        out[..., 5:6, :] *= 1 + 2**-23
        return out

    weight = torch.zeros(48, 32)
    for dishonest in (by_size, by_neighbour, by_place):
        kernels.linear._try_rows.cache_clear()
        monkeypatch.setattr(kernels.linear, "linear_reference", dishonest)
        with pytest.raises(
            UnsupportedKernel, match=r"^linear: .*weights \(48, 32\) of torch.float32 the bits"
        ):
            stable(weight, backend="deterministic")
        assert stable(weight, backend="reference") is weight
    kernels.linear._try_rows.cache_clear()
    monkeypatch.setattr(kernels.linear, "linear_reference", honest)
    assert stable(weight, backend="deterministic") is weight


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^linear: x \(1, 3\) does not fit weight \(2, 4\)$"):
        linear(torch.ones(1, 3), torch.ones(2, 4), backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^linear: "):
        linear(torch.ones(1, 3), torch.ones(2, 3), backend="cuda")  # type: ignore[arg-type]

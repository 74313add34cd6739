import math

import numpy as np
import pytest
import torch

from kernels.backend import UnsupportedKernel
from kernels.hadamard import hadamard, hadamard_matrix


def sylvester(dim: int) -> np.ndarray:
    """Entry (i, j) is -1 where i and j share an odd number of one-bits; float64, not divided by anything."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(dim)] for i in range(dim)])


def test_four_channels_by_hand() -> None:
    x = torch.tensor([[1.0, 2.0, 4.0, 8.0]])
    assert hadamard(x, backend="reference").tolist() == [[7.5, -2.5, -4.5, 1.5]]


@pytest.mark.parametrize("dim", [1, 2, 8, 64, 128])
def test_matrix_is_sylvesters_scaled(dim: int) -> None:
    expected = sylvester(dim) / math.sqrt(dim)
    assert np.array_equal(hadamard_matrix(dim, torch.device("cpu")).numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 64), (5, 128), (2, 3, 32), (0, 16)])
def test_random_vectors_against_float64(shape: tuple[int, ...], generator: torch.Generator) -> None:
    x = torch.randn(shape, generator=generator)
    expected = x.double().numpy() @ sylvester(shape[-1]) / math.sqrt(shape[-1])
    # float32 sums of up to 128 numbers near 1, each product exact up to the factor's rounding
    np.testing.assert_allclose(hadamard(x, backend="reference").double().numpy(), expected, atol=2e-6, rtol=0)


def test_twice_is_the_identity(generator: torch.Generator) -> None:
    x = torch.randn(4, 128, generator=generator)
    twice = hadamard(hadamard(x, backend="reference"), backend="reference")
    torch.testing.assert_close(twice, x, atol=2e-6, rtol=0)


def test_products_of_queries_and_keys_stay(generator: torch.Generator) -> None:
    q, k = torch.randn(6, 128, generator=generator), torch.randn(7, 128, generator=generator)
    turned = hadamard(q, backend="reference") @ hadamard(k, backend="reference").t()
    torch.testing.assert_close(turned, q @ k.t(), atol=5e-5, rtol=0)


def test_bfloat16_is_rounded_once_at_the_end(generator: torch.Generator) -> None:
    x = torch.randn(3, 128, generator=generator).bfloat16()
    found = hadamard(x, backend="reference")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, hadamard(x.float(), backend="reference").bfloat16())


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^hadamard: 96 channels are not a power of two$"):
        hadamard(torch.zeros(1, 96), backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^hadamard: "):
        hadamard(torch.zeros(1, 64), backend="triton")

import math

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.norm import add_rms_norm, rms_norm


def norm_slowly(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    rows = []
    for row in x.double().tolist():
        root = math.sqrt(math.fsum(value * value for value in row) / len(row) + eps)
        rows.append([value / root * w for value, w in zip(row, weight.double().tolist(), strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def test_a_row_worked_out_by_hand() -> None:
    x, weight = torch.tensor([[3.0, -4.0, 0.0, 0.0]]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rms_norm(x, weight, 0.0, backend="reference")[0].tolist() == pytest.approx([1.2, -3.2, 0.0, 0.0])


def test_eps_is_added_to_the_mean_of_squares() -> None:
    x, weight = torch.tensor([[3.0, 3.0]]), torch.ones(2)
    assert rms_norm(x, weight, 16.0, backend="reference")[0].tolist() == pytest.approx([0.6, 0.6])
    assert (rms_norm(torch.zeros(1, 2), weight, 1e-6, backend="reference") == 0).all()


@pytest.mark.parametrize("width", [1, 7, 128])
def test_random_rows_against_a_slow_one(width: int, generator: torch.Generator) -> None:
    x = torch.randn(4, width, generator=generator) * torch.tensor([[1e-3], [1.0], [1e3], [1.0]])
    weight = torch.randn(width, generator=generator)
    found = rms_norm(x, weight, 1e-6, backend="reference")
    assert found.dtype == torch.float32
    # A float32 sum of up to 128 squares, a root and two products: some ulps.
    torch.testing.assert_close(found.double(), norm_slowly(x, weight, 1e-6), atol=0, rtol=2e-6)


def test_the_weight_multiplies_before_the_cast() -> None:
    """Rounding x / rms to bf16 and then multiplying ends one bf16 number away."""
    x, weight = torch.tensor([[1.0 + 2**-7, 1.0 - 2**-7]]).bfloat16(), torch.tensor([0.7519531, 0.7519531])
    found = rms_norm(x, weight, 0.0, backend="reference")
    exact = norm_slowly(x, weight, 0.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.bfloat16())
    cast_first = (norm_slowly(x, torch.ones(2), 0.0).bfloat16() * weight.bfloat16()).bfloat16()
    assert not torch.equal(found, cast_first)


def test_add_normalises_the_sum_before_it_is_rounded() -> None:
    """1 + 2^-9 is no bf16 number: the residual becomes 1, the norm sees the sum."""
    x = torch.tensor([[2.0**-9, 0.0, 0.0, 0.0]]).bfloat16()
    residual = torch.tensor([[1.0, 1.0, 1.0, 1.0]]).bfloat16()
    weight = torch.full((4,), 1.0 + 2.0**-8)
    found, total = add_rms_norm(x, residual, weight, 0.0, backend="reference")
    assert total.dtype == found.dtype == torch.bfloat16
    assert total.tolist() == [[1.0, 1.0, 1.0, 1.0]]
    exact = norm_slowly(x.double() + residual.double(), weight, 0.0)
    assert torch.equal(found, exact.bfloat16())
    assert found[0, 0] != rms_norm(total, weight, 0.0, backend="reference")[0, 0]


def test_add_against_a_slow_one(generator: torch.Generator) -> None:
    x, residual = torch.randn(2, 5, 12, generator=generator)
    weight = torch.randn(12, generator=generator)
    before = x.clone(), residual.clone()
    found, total = add_rms_norm(x, residual, weight, 1e-6, backend="reference")
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(found.double(), norm_slowly(x + residual, weight, 1e-6), atol=0, rtol=2e-6)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_no_rows() -> None:
    none, weight = torch.zeros(0, 8), torch.ones(8)
    assert rms_norm(none, weight, 1e-6, backend="reference").shape == (0, 8)
    assert [t.shape for t in add_rms_norm(none, none, weight, 1e-6, backend="reference")] == [(0, 8)] * 2


def test_refusals() -> None:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    with pytest.raises(UnsupportedKernel, match=r"^rms_norm: weight must be float32, not torch.bfloat16$"):
        rms_norm(x, weight.bfloat16(), 1e-6, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^rms_norm: "):
        rms_norm(x, weight, 1e-6, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(UnsupportedKernel, match=r"^add_rms_norm: x .*2, 8.* and residual .*1, 8.* differ$"):
        add_rms_norm(x, x[:1], weight, 1e-6, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^add_rms_norm: "):
        add_rms_norm(x, x, weight, 1e-6, backend="cuda")  # type: ignore[arg-type]

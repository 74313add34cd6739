import math

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.swiglu import swiglu


def swiglu_slowly(gate_up: Tensor) -> Tensor:
    rows = []
    for row in gate_up.double().tolist():
        gate, up = row[: len(row) // 2], row[len(row) // 2 :]
        rows.append([g / (1 + math.exp(-g)) * u for g, u in zip(gate, up, strict=True)])
    return torch.tensor(rows, dtype=torch.float64)


def test_the_gate_comes_first() -> None:
    one = 1 / (1 + math.exp(-1))
    out = swiglu(torch.tensor([[0.0, 1.0, 5.0, 3.0]]), backend="reference")
    assert out[0].tolist() == pytest.approx([0.0, 3 * one])


@pytest.mark.parametrize("width", [1, 5, 64])
def test_random_rows_against_a_slow_one(width: int, generator: torch.Generator) -> None:
    gate_up = 4 * torch.randn(6, 2 * width, generator=generator)
    torch.testing.assert_close(
        swiglu(gate_up, backend="reference").double(), swiglu_slowly(gate_up), atol=1e-7, rtol=2e-6
    )


def test_far_out_gates() -> None:
    out = swiglu(torch.tensor([[-200.0, 200.0, 1.0, 1.0]]), backend="reference")
    assert out.tolist() == [[0.0, 200.0]]


def test_bfloat16_is_rounded_once_at_the_end(generator: torch.Generator) -> None:
    gate_up = torch.randn(50, 64, generator=generator).bfloat16()
    found = swiglu(gate_up, backend="reference")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, swiglu(gate_up.float(), backend="reference").bfloat16())


def test_the_input_is_left_as_it_was(generator: torch.Generator) -> None:
    gate_up = torch.randn(2, 8, generator=generator)
    before = gate_up.clone()
    swiglu(gate_up, backend="reference")
    assert torch.equal(gate_up, before)


def test_no_rows() -> None:
    assert swiglu(torch.zeros(0, 8), backend="reference").shape == (0, 4)


def test_refusals() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^swiglu: width 7 is odd$"):
        swiglu(torch.zeros(1, 7), backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^swiglu: "):
        swiglu(torch.zeros(1, 8), backend="triton")

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import dequantize_blocks, dequantize_reference, power_of_two_scale, quantize
from tests.e4m3 import MAGNITUDES, VALUES, nearest


def expected_scale(amax: float) -> float:
    """The smallest power of two that is at least max(amax, 1e-4) / 448, in exact arithmetic."""
    ratio = Fraction(max(amax, float(np.float32(1e-4)))) / 448
    exponent = math.floor(math.log2(ratio)) - 1
    while Fraction(2) ** exponent < ratio:
        exponent += 1
    return 2.0**exponent


def quantize_slowly(row: list[float], group: int) -> tuple[list[int], list[float]]:
    values: list[int] = []
    scales: list[float] = []
    for start in range(0, len(row), group):
        part = row[start : start + group]
        scales.append(expected_scale(max(abs(x) for x in part)))
        values.extend(nearest(x / scales[-1]) for x in part)
    return values, scales


def as_bytes(values: Tensor) -> list[int]:
    found: list[int] = values.contiguous().view(torch.uint8).flatten().tolist()
    return found


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (448, 1),
        (449, 2),
        (224, 0.5),
        (1.75, 2**-8),
        (1.0, 2**-8),
        (0, 2**-22),
        (1e-4, 2**-22),
        (1e-5, 2**-22),
    ],
)
def test_scales_of_the_official_kernel(amax: float, scale: float) -> None:
    assert power_of_two_scale(torch.tensor([amax])).item() == scale


@pytest.mark.parametrize("exponent", range(-21, 118))
def test_exact_powers_stay_and_anything_above_rounds_up(exponent: int) -> None:
    exact = torch.tensor(448 * 2.0**exponent)
    above = torch.nextafter(exact, torch.tensor(math.inf))
    assert power_of_two_scale(exact).item() == 2.0**exponent
    assert power_of_two_scale(above).item() == 2.0 ** (exponent + 1)


def test_scale_is_the_smallest_power_of_two_that_fits(generator: torch.Generator) -> None:
    amax = torch.exp(torch.empty(2000).uniform_(-14, 80, generator=generator))
    assert power_of_two_scale(amax).tolist() == [expected_scale(x) for x in amax.tolist()]


def test_every_value_of_the_format_comes_back_bitwise() -> None:
    codes = [byte for byte in range(256) if byte & 0x7F != 0x7F]
    x = torch.tensor([[VALUES[byte] * 2.0**-5 for byte in codes]])  # its amax is 448 * 2^-5
    values, scales = quantize(x, 256, backend="reference")
    assert scales.tolist() == [[2.0**-5]]
    assert as_bytes(values) == codes
    assert torch.equal(dequantize_reference(values, scales, 256), x)


def test_ties_go_to_even_through_normal_and_subnormal_values() -> None:
    middles = [(low + high) / 2 for low, high in pairwise(MAGNITUDES)]
    around = [float(np.nextafter(np.float32(m), np.float32(side))) for m in middles for side in (0, 500)]
    x = [448.0, *middles, *(-m for m in middles), *around]
    values, scales = quantize(torch.tensor([x]), len(x), backend="reference")
    assert scales.item() == 1
    assert as_bytes(values) == [nearest(number) for number in x]
    assert as_bytes(values)[1:4] == [0, 2, 2]  # 2^-10, 3 * 2^-10, 5 * 2^-10: half-way between subnormals


def test_the_largest_values_do_not_become_nan() -> None:
    # amax / 448 rounds to the power of two below it by less than an ulp; e4m3 has no value beyond 448.
    for amax in (448.0, 447.99997, 3.0e38, 448 * 2.0**-20):
        x = torch.tensor([[amax, -amax, 0.0]])
        values, scales = quantize(x, 3, backend="reference")
        assert values.float().isfinite().all()
        assert values.float().abs().max() <= 448
        assert dequantize_reference(values, scales, 3)[0, 2] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 127, 128, 129, 300])
def test_random_rows_against_a_slow_one(dtype: torch.dtype, dim: int, generator: torch.Generator) -> None:
    x = torch.randn(3, dim, generator=generator).to(dtype)
    x[1] *= 2.0**-9
    x[2, dim // 2 :] = 0
    values, scales = quantize(x, 128, backend="reference")
    assert (values.shape, scales.shape) == ((3, dim), (3, math.ceil(dim / 128)))
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    for row in range(3):
        expected_values, expected_scales = quantize_slowly(x[row].tolist(), 128)
        assert as_bytes(values[row]) == expected_values
        assert scales[row].tolist() == expected_scales


def test_leading_dimensions_are_kept(generator: torch.Generator) -> None:
    x = torch.randn(2, 3, 64, generator=generator)
    values, scales = quantize(x, 64, backend="reference")
    assert (values.shape, scales.shape) == ((2, 3, 64), (2, 3, 1))
    flat, flat_scales = quantize(x.flatten(0, 1), 64, backend="reference")
    assert as_bytes(values) == as_bytes(flat)
    assert torch.equal(scales.flatten(), flat_scales.flatten())


def test_no_rows() -> None:
    values, scales = quantize(torch.zeros(0, 130), 128, backend="reference")
    assert (values.shape, scales.shape) == ((0, 130), (0, 2))


@pytest.mark.parametrize("dim", [128, 130, 255])
def test_dequantize_multiplies_each_group_by_its_scale(dim: int) -> None:
    codes = torch.arange(2 * dim).remainder(0x7F).to(torch.uint8).view(2, dim)
    scales = torch.tensor([[0.5, 3.0], [2.0**-9, 7.0]])[:, : math.ceil(dim / 128)]
    wide = dequantize_reference(codes.view(torch.float8_e4m3fn), scales, 128)
    for row in range(2):
        for column in range(dim):
            assert wide[row, column] == VALUES[codes[row, column]] * scales[row, column // 128]


@pytest.mark.parametrize("shape", [(1, 1), (128, 128), (129, 127), (130, 257), (64, 300)])
def test_block_scales_against_a_loop(shape: tuple[int, int], generator: torch.Generator) -> None:
    rows, columns = shape
    codes = torch.randint(0, 0x7F, shape, generator=generator, dtype=torch.uint8)
    scales = torch.rand(math.ceil(rows / 128), math.ceil(columns / 128), generator=generator)
    wide = dequantize_blocks(codes.view(torch.float8_e4m3fn), scales, 128)
    code_rows, scale_rows = codes.tolist(), scales.tolist()
    expected = [
        [
            np.float32(VALUES[code_rows[r][c]]) * np.float32(scale_rows[r // 128][c // 128])
            for c in range(columns)
        ]
        for r in range(rows)
    ]
    assert wide.dtype == torch.float32
    assert np.array_equal(wide.numpy(), np.array(expected, dtype=np.float32))


@pytest.mark.parametrize("group", [0, -1])
def test_refuses_a_group_without_channels(group: int) -> None:
    with pytest.raises(UnsupportedKernel, match=r"^quantize: group must be positive"):
        quantize(torch.zeros(1, 4), group, backend="reference")


def test_refuses_another_backend() -> None:
    with pytest.raises(UnsupportedKernel, match=r"^quantize: "):
        quantize(torch.zeros(1, 4), 4, backend="triton")

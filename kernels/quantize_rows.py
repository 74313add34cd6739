"""Quantisation of activations for the block-scaled products: 1 x 128 groups, scales laid out for the product.

As `quantize` of `fp8_quant.py` with groups of 128; what differs is the layout of the scales. Shapes: T rows,
K channels, a multiple of 128.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.fp8_quant import FP8, quantize_reference
from kernels.jit import quantize_last, settle

GROUP = 128  # channels that share a scale
_SCALE_ROWS = 4  # the column of a group holds a multiple of so many rows: 16 bytes


@dataclass(frozen=True)
class _Config:
    """A program's tile, and the warps that share it."""

    rows: int
    groups: int
    num_warps: int


def quantize_rows(x: Tensor, *, backend: Backend) -> tuple[Tensor, Tensor]:
    """Quantise rows in groups of 128.

    Args:
        x: [T, K] bf16 or float32, K a multiple of 128, channels contiguous.

    Returns:
        values [T, K] e4m3, and scales [T, K / 128] float32, powers of two, stored group by group:
        stride (1, T rounded up to 4).

    Raises:
        UnsupportedKernel: width, dtype or layout are others.
    """
    require_triton_or_reference(backend, "quantize_rows")
    require(x.shape[1] % GROUP == 0, "quantize_rows", f"{x.shape[1]} channels are no groups of {GROUP}")
    if backend == "reference":
        return quantize_rows_reference(x)
    require(
        x.dtype in (torch.bfloat16, torch.float32), "quantize_rows", f"x must be bf16 or fp32, not {x.dtype}"
    )
    require(x.stride(1) == 1, "quantize_rows", "the channels of a row must be contiguous")
    return _launch(x, _config_for(x.shape[0], x.shape[1]))


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = quantize_reference(x, GROUP)
    return values, as_columns(scales)


def empty_scales(num_rows: int, num_groups: int, device: torch.device) -> Tensor:
    """[T, G] float32 to be filled, stored group by group; where rows were added, nobody reads."""
    padded = triton.cdiv(num_rows, _SCALE_ROWS) * _SCALE_ROWS
    return torch.empty(num_groups, padded, dtype=torch.float32, device=device).t()[:num_rows]


def as_columns(scales: Tensor) -> Tensor:
    """The same [T, G] scales, stored group by group."""
    return empty_scales(scales.shape[0], scales.shape[1], scales.device).copy_(scales)


def _config_for(num_rows: int, width: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100. More rows a program write the scales in longer runs, which
    only pays where there are programs enough."""
    groups = min(4, triton.next_power_of_2(width // GROUP))
    if num_rows <= 256:
        return _Config(rows=min(4, triton.next_power_of_2(num_rows)), groups=groups, num_warps=4)
    return _Config(rows=16, groups=groups, num_warps=8)


def _launch(x: Tensor, config: _Config) -> tuple[Tensor, Tensor]:
    num_rows, width = x.shape
    num_groups = width // GROUP
    values = torch.empty(num_rows, width, dtype=FP8, device=x.device)
    scales = empty_scales(num_rows, num_groups, x.device)
    if values.numel() == 0:
        return values, scales
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(num_groups, config.groups))
    _quantize_rows[grid](
        x,
        values,
        scales,
        num_rows,
        x.stride(0),
        scales.stride(1),
        NUM_GROUPS=num_groups,
        ROWS=config.rows,
        GROUPS=config.groups,
        num_warps=config.num_warps,
    )
    return values, scales


@triton.jit
def _quantize_rows(
    x_ptr,  # [T, K]
    values_ptr,  # [T, K]
    scales_ptr,  # [T, G], stored [G, ...]
    num_rows,
    x_stride,
    scale_stride,  # from group to group
    NUM_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row_ids = rows.to(tl.int64)[:, None, None]
    columns = groups[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    valid = (rows < num_rows)[:, None] & (groups < NUM_GROUPS)[None, :]
    x = tl.load(x_ptr + row_ids * x_stride + columns, mask=valid[:, :, None], other=0.0).to(tl.float32)
    values, scales = quantize_last(x)
    tl.store(values_ptr + row_ids * (NUM_GROUPS * 128) + columns, values, mask=valid[:, :, None])
    # Padded rows of the last columns are left as they are.
    tl.store(scales_ptr + groups[None, :].to(tl.int64) * scale_stride + rows[:, None], scales, mask=valid)


settle(_quantize_rows)

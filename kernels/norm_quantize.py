"""RMSNorm with the residual sum before it and the quantisation after it, in one pass over memory.

    total = x + residual;  normed = bf16(total / sqrt(mean(total^2) + eps) * w)
    values, scales = quantise(normed)
The sum is normalised in fp32, not after its rounding to bf16. What is quantised is the rounded norm, so that
the values are those of the two operations one after the other. Shapes: T rows, D width, a multiple of 128.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.fp8_quant import FP8
from kernels.jit import quantize_last, round_to_bf16, settle
from kernels.norm import add_rms_norm_reference, rms_norm_reference
from kernels.quantize_rows import GROUP, empty_scales, quantize_rows_reference


@dataclass(frozen=True)
class NormedRows:
    """What `add_rms_norm_quantize` leaves; D / 128 scales a row.

    Attributes:
        values: [T, D] e4m3, None where nothing was to be quantised.
        scales: [T, D / 128] float32, stored group by group, None likewise.
        normed: [T, D] bf16, None where it was not to be kept.
        residual: [T, D] bf16, the new residual stream.
    """

    values: Tensor | None
    scales: Tensor | None
    normed: Tensor | None
    residual: Tensor


@dataclass(frozen=True)
class _Config:
    """Rows that one program takes one after the other, and its warps."""

    rows: int
    num_warps: int


def add_rms_norm_quantize(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantize: bool = True,
    keep_normed: bool,
    backend: Backend,
) -> NormedRows:
    """Add, normalise, quantise.

    Args:
        x: [T, D] bf16, or float32 where there is a residual (experts' sums); channels contiguous, as in it.
        residual: [T, D] bf16, or None: x is the residual stream itself.
        weight: [D] float32.
        quantize: False leaves values and scales out (the last norm of all).
        keep_normed: whether the norm is wanted in bf16 too.

    Returns:
        NormedRows; its residual is x itself where no residual was given.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, "add_rms_norm_quantize")
    require(
        weight.dtype == torch.float32 and weight.shape == x.shape[1:],
        "add_rms_norm_quantize",
        f"weight is {weight.dtype} {tuple(weight.shape)}, not float32 {tuple(x.shape[1:])}",
    )
    require(
        residual is not None or x.dtype == torch.bfloat16,
        "add_rms_norm_quantize",
        f"the residual stream must be bf16, not {x.dtype}",
    )
    require(
        residual is None or (residual.shape == x.shape and residual.dtype == torch.bfloat16),
        "add_rms_norm_quantize",
        "the residual must be bf16 and of x's shape",
    )
    require(x.shape[1] % GROUP == 0, "add_rms_norm_quantize", f"width {x.shape[1]} is no groups of {GROUP}")
    if backend == "reference":
        return add_rms_norm_quantize_reference(
            x, residual, weight, eps, quantize=quantize, keep_normed=keep_normed
        )
    require(x.dtype in (torch.bfloat16, torch.float32), "add_rms_norm_quantize", f"x is {x.dtype}")
    require(
        x.stride(1) == 1 and (residual is None or residual.stride(1) == 1) and weight.is_contiguous(),
        "add_rms_norm_quantize",
        "the channels of a row must be contiguous",
    )
    return _launch(x, residual, weight, eps, quantize, keep_normed, _config_for(*x.shape))


def add_rms_norm_quantize_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantize: bool = True,
    keep_normed: bool,
) -> NormedRows:
    if residual is None:
        normed, total = rms_norm_reference(x, weight, eps), x
    else:
        normed, total = add_rms_norm_reference(x, residual, weight, eps)
    values, scales = quantize_rows_reference(normed) if quantize else (None, None)
    return NormedRows(values, scales, normed if keep_normed else None, total)


def _config_for(num_rows: int, width: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100. Few rows: many warps, to be done soonest. Many: 64 registers a
    thread, so that four programs of 8 warps run on a multiprocessor; the weights come from the first-level
    cache."""
    num_warps = min(8, triton.next_power_of_2(max(1, width // 512)))
    if num_rows <= 264:  # two programs for every multiprocessor
        return _Config(rows=1, num_warps=2 * num_warps)
    return _Config(rows=1, num_warps=num_warps)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    quantize: bool,
    keep_normed: bool,
    config: _Config,
) -> NormedRows:
    num_rows, width = x.shape
    device = x.device
    values = torch.empty(num_rows, width, dtype=FP8, device=device) if quantize else None
    scales = empty_scales(num_rows, width // GROUP, device) if quantize else None
    normed = torch.empty(num_rows, width, dtype=torch.bfloat16, device=device) if keep_normed else None
    total = x if residual is None else torch.empty(x.shape, dtype=torch.bfloat16, device=device)
    if x.numel():
        _add_rms_norm_quantize[(triton.cdiv(num_rows, config.rows),)](
            x,
            residual,
            weight,
            values,
            scales,
            normed,
            total,
            num_rows,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            0 if scales is None else scales.stride(1),
            eps,
            WIDTH=width,
            GROUPS=triton.next_power_of_2(width // GROUP),
            ROWS=config.rows,
            HAS_RESIDUAL=residual is not None,
            QUANTIZE=quantize,
            KEEP_NORMED=keep_normed,
            num_warps=config.num_warps,
        )
    return NormedRows(values, scales, normed, total)


@triton.jit
def _add_rms_norm_quantize(
    x_ptr,  # [T, D]
    residual_ptr,  # [T, D]
    weight_ptr,  # [D]
    values_ptr,  # [T, D]
    scales_ptr,  # [T, G], stored [G, ...]
    normed_ptr,  # [T, D]
    total_ptr,  # [T, D]
    num_rows,
    x_stride,
    residual_stride,
    scale_stride,  # from group to group
    eps,
    WIDTH: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    QUANTIZE: tl.constexpr,
    KEEP_NORMED: tl.constexpr,
):
    groups = tl.arange(0, GROUPS)
    columns = groups[:, None] * 128 + tl.arange(0, 128)[None, :]
    in_row = columns < WIDTH
    for step in tl.static_range(ROWS):
        row = (tl.program_id(0) * ROWS + step).to(tl.int64)
        valid = in_row & (row < num_rows)
        total = tl.load(x_ptr + row * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            total += tl.load(residual_ptr + row * residual_stride + columns, mask=valid, other=0.0).to(
                tl.float32
            )
            tl.store(total_ptr + row * WIDTH + columns, total.to(tl.bfloat16), mask=valid)
        mean_square = tl.sum(total * total) / WIDTH
        # Only here: held through the sum, the weights would take as many registers as the row.
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0, eviction_policy="evict_last")
        normed = round_to_bf16(total * tl.rsqrt(mean_square + eps) * weight)
        if KEEP_NORMED:
            tl.store(normed_ptr + row * WIDTH + columns, normed.to(tl.bfloat16), mask=valid)
        if QUANTIZE:
            values, scales = quantize_last(normed)
            tl.store(values_ptr + row * WIDTH + columns, values, mask=valid)
            tl.store(
                scales_ptr + groups.to(tl.int64) * scale_stride + row,
                scales,
                mask=(groups < WIDTH // 128) & (row < num_rows),
            )


settle(_add_rms_norm_quantize)

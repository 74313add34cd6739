"""silu(gate) * up and its quantisation, for the product that follows.

As `swiglu` and `quantize_rows` one after the other: the product is rounded to bf16 before it is quantised.
Shapes: R rows, I inner width, a multiple of 128.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.fp8_quant import FP8
from kernels.jit import quantize_last, round_to_bf16, settle
from kernels.quantize_rows import GROUP, empty_scales, quantize_rows_reference
from kernels.swiglu import swiglu_reference


@dataclass(frozen=True)
class _Config:
    """A program's tile, and the warps that share it."""

    rows: int
    groups: int
    num_warps: int


def swiglu_quantize(
    gate_up: Tensor, *, num_valid: Tensor | None = None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Combine the halves of a fused projection and quantise.

    Args:
        gate_up: [R, 2 I] bf16, gate first, channels contiguous.
        num_valid: [1] int32 on the device; rows from it on are neither read nor written. None: all rows.

    Returns:
        values [R, I] e4m3 and scales [R, I / 128] float32, powers of two, stored group by group.

    Raises:
        UnsupportedKernel: width, dtype or layout are others.
    """
    require_triton_or_reference(backend, "swiglu_quantize")
    require(
        gate_up.shape[1] % (2 * GROUP) == 0,
        "swiglu_quantize",
        f"{gate_up.shape[1]} channels are not two halves of groups of {GROUP}",
    )
    require(
        num_valid is None or (num_valid.dtype == torch.int32 and num_valid.numel() == 1),
        "swiglu_quantize",
        "num_valid must be one int32",
    )
    if backend == "reference":
        return swiglu_quantize_reference(gate_up, num_valid=num_valid)
    require(gate_up.dtype == torch.bfloat16, "swiglu_quantize", f"gate_up is {gate_up.dtype}, not bf16")
    require(gate_up.stride(1) == 1, "swiglu_quantize", "the channels of a row must be contiguous")
    return _launch(gate_up, num_valid, _config_for(gate_up.shape[0], gate_up.shape[1] // 2))


def swiglu_quantize_reference(gate_up: Tensor, *, num_valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All rows: what stands in those from num_valid on is nobody's business."""
    return quantize_rows_reference(swiglu_reference(gate_up))


def _config_for(num_rows: int, inner: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100: a row each; few rows are spread over more programs."""
    groups = triton.next_power_of_2(inner // GROUP)
    if num_rows <= 1024:
        return _Config(rows=1, groups=min(8, groups), num_warps=4)
    return _Config(rows=1, groups=min(16, groups), num_warps=8)


def _launch(gate_up: Tensor, num_valid: Tensor | None, config: _Config) -> tuple[Tensor, Tensor]:
    num_rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    num_groups = inner // GROUP
    values = torch.empty(num_rows, inner, dtype=FP8, device=gate_up.device)
    scales = empty_scales(num_rows, num_groups, gate_up.device)
    if values.numel() == 0:
        return values, scales
    grid = (triton.cdiv(num_rows, config.rows), triton.cdiv(num_groups, config.groups))
    _swiglu_quantize[grid](
        gate_up,
        num_valid,
        values,
        scales,
        num_rows,
        gate_up.stride(0),
        scales.stride(1),
        NUM_GROUPS=num_groups,
        ROWS=config.rows,
        GROUPS=config.groups,
        HAS_NUM_VALID=num_valid is not None,
        num_warps=config.num_warps,
    )
    return values, scales


@triton.jit
def _swiglu_quantize(
    gate_up_ptr,  # [R, 2 I]
    num_valid_ptr,  # [1]
    values_ptr,  # [R, I]
    scales_ptr,  # [R, G], stored [G, ...]
    num_rows,
    gate_up_stride,
    scale_stride,  # from group to group
    NUM_GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    HAS_NUM_VALID: tl.constexpr,
):
    if HAS_NUM_VALID:
        num_rows = tl.load(num_valid_ptr)
        if tl.program_id(0) * ROWS >= num_rows:
            return
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    groups = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    row_ids = rows.to(tl.int64)[:, None, None]
    columns = groups[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    valid = (rows < num_rows)[:, None] & (groups < NUM_GROUPS)[None, :]
    gates = gate_up_ptr + row_ids * gate_up_stride + columns
    gate = tl.load(gates, mask=valid[:, :, None], other=0.0).to(tl.float32)
    up = tl.load(gates + NUM_GROUPS * 128, mask=valid[:, :, None], other=0.0).to(tl.float32)
    inner = round_to_bf16(gate / (1.0 + tl.exp(-gate)) * up)
    values, scales = quantize_last(inner)
    tl.store(values_ptr + row_ids * (NUM_GROUPS * 128) + columns, values, mask=valid[:, :, None])
    tl.store(scales_ptr + groups[None, :].to(tl.int64) * scale_stride + rows[:, None], scales, mask=valid)


settle(_swiglu_quantize)

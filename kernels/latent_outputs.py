"""From attention's result in latent space to what the output projection reads, in one launch.

    out[t, h] = W_uv[h] attended[t, h];  values, scales = quantise(bf16(out)), 128 channels a scale
A scale covers one head of 128 channels, or several narrower ones, which a program then computes twice: for
the largest value, and to quantise. Shapes: T rows, H heads, V v_head_dim, C kv_lora_rank.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.bf16_gemm import per_head_gemm_reference
from kernels.fp8_quant import FP8
from kernels.jit import power_of_two_scale, round_to_bf16
from kernels.quantize_rows import GROUP, empty_scales, quantize_rows_reference

_OPERATION = "latent_outputs"


class _Config(NamedTuple):
    """Rows and latent channels of a tile, warps, stages of loads."""

    rows: int
    channels: int
    num_warps: int
    num_stages: int


def latent_outputs(attended: Tensor, w_uv: Tensor, *, backend: Backend) -> tuple[Tensor, Tensor]:
    """Leave latent space, and quantise.

    Args:
        attended: [T, H, C] bf16, contiguous.
        w_uv: [H, V, C] bf16, contiguous; V divides 128, and H * V is a multiple of it.

    Returns:
        values [T, H * V] e4m3 and scales [T, H * V / 128] float32, stored group by group.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others, or C is no multiple of 64.
    """
    num_heads, v_head_dim, width = w_uv.shape
    require_triton_or_reference(backend, _OPERATION)
    require(
        attended.shape[1:] == (num_heads, width),
        _OPERATION,
        f"attended {tuple(attended.shape)} does not fit w_uv {tuple(w_uv.shape)}",
    )
    require(
        v_head_dim >= 16 and GROUP % v_head_dim == 0 == num_heads * v_head_dim % GROUP,
        _OPERATION,
        f"{num_heads} heads of {v_head_dim} channels make no groups of {GROUP}",
    )
    if backend == "reference":
        return latent_outputs_reference(attended, w_uv)
    require(attended.dtype == w_uv.dtype == torch.bfloat16, _OPERATION, f"needs bf16, not {attended.dtype}")
    require(attended.is_contiguous() and w_uv.is_contiguous(), _OPERATION, "both must be contiguous")
    require(width % 64 == 0, _OPERATION, f"{width} channels are no multiple of 64")
    return _launch(attended, w_uv, _config_for(attended.shape[0]))


def latent_outputs_reference(attended: Tensor, w_uv: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_rows_reference(per_head_gemm_reference(attended, w_uv).flatten(1))


def _config_for(num_rows: int) -> _Config:
    """From the sweep of the same product without quantising, 2026-11-22 on an H100."""
    if num_rows <= 32:
        return _Config(16 if num_rows <= 16 else 32, 64, 4, 4)
    return _Config(64 if num_rows <= 256 else 128, 64, 8, 3)


def _launch(attended: Tensor, w_uv: Tensor, config: _Config) -> tuple[Tensor, Tensor]:
    num_rows = attended.shape[0]
    num_heads, v_head_dim, width = w_uv.shape
    num_groups = num_heads * v_head_dim // GROUP
    values = torch.empty(num_rows, num_heads * v_head_dim, dtype=FP8, device=attended.device)
    scales = empty_scales(num_rows, num_groups, attended.device)
    if num_rows == 0:
        return values, scales
    _latent_outputs[(num_groups, triton.cdiv(num_rows, config.rows))](
        attended,
        w_uv,
        values,
        scales,
        num_rows,
        scales.stride(1),
        H=num_heads,
        V=v_head_dim,
        C=width,
        HEADS=GROUP // v_head_dim,
        ROWS=config.rows,
        CHANNELS=config.channels,
        UPCAST=attended.device.type == "cpu",  # the interpreter cannot multiply bf16
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return values, scales


@triton.jit
def _latent_outputs(
    attended_ptr,  # [T, H, C] bf16
    w_uv_ptr,  # [H, V, C] bf16
    values_ptr,  # [T, H * V] e4m3
    scales_ptr,  # [T, groups] f32, stored [groups, ...]
    num_rows,
    scale_stride,  # from group to group
    H: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    group = tl.program_id(0)
    rows = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    valid = rows < num_rows
    v = tl.arange(0, V)
    first = group * HEADS
    out = _head(attended_ptr, w_uv_ptr, first, rows, num_rows, H, V, C, ROWS, CHANNELS, UPCAST)  # [V, ROWS]
    amax = tl.max(tl.abs(out), axis=0)
    for other in tl.static_range(1, HEADS):
        more = _head(attended_ptr, w_uv_ptr, first + other, rows, num_rows, H, V, C, ROWS, CHANNELS, UPCAST)
        amax = tl.maximum(amax, tl.max(tl.abs(more), axis=0))
    scale, inverse = power_of_two_scale(amax)
    tl.store(scales_ptr + group.to(tl.int64) * scale_stride + rows, scale, mask=valid)
    for head in tl.static_range(0, HEADS):
        if head > 0:
            out = _head(attended_ptr, w_uv_ptr, first + head, rows, num_rows, H, V, C, ROWS, CHANNELS, UPCAST)
        places = rows[None, :] * (H * V) + (first + head) * V + v[:, None]
        tl.store(values_ptr + places, (out * inverse[None, :]).to(tl.float8e4nv), mask=valid[None, :])


@triton.jit
def _head(
    attended_ptr, w_uv_ptr, head, rows, num_rows,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """[V, ROWS] fp32 on bf16's grid: one head of some rows."""
    channels = tl.arange(0, CHANNELS)
    left_rows = w_uv_ptr + (head * V + tl.arange(0, V))[:, None] * C
    right_rows = attended_ptr + (tl.minimum(rows, num_rows - 1) * H + head)[None, :] * C
    acc = tl.zeros((V, ROWS), tl.float32)
    for start in range(0, C, CHANNELS):
        left = tl.load(left_rows + (start + channels)[None, :])  # [V, CHANNELS]
        right = tl.load(right_rows + (start + channels)[:, None])  # [CHANNELS, ROWS]
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    return round_to_bf16(acc)

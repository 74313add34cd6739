"""`fp8_gemm` for many rows, for NVIDIA Hopper alone: the launcher of the kernel in `fp8_tiles_gluon.py`.

Shapes: T rows, K inputs (a multiple of 128), N outputs, e experts.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.fp8_tiles import BLOCK
from kernels.fp8_tiles_gluon import tiles_kernel


class GluonPrefill(NamedTuple):
    """A program makes `tokens` x 128 of the result, tile after tile."""

    tokens: int  # 128 or 256
    stages: int
    group: int  # row tiles that are walked together, so that they find the weights in L2
    programs: int  # at most: as many as there are processors


_REGISTERS = 240  # of a thread that multiplies: two sums and a product, 64 each
_VALUES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
_SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
_RESULTS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def fits_gluon(num_outputs: int, out_dtype: torch.dtype) -> bool:
    """Whether TMA can store the result."""
    return out_dtype == torch.bfloat16 and num_outputs % 8 == 0


def scales_fit_gluon(x_scales: Tensor) -> bool:
    """Whether TMA can fetch the scales as they are, from multiples of 16 bytes."""
    return x_scales.stride(0) == 1 and x_scales.stride(1) % 4 == 0 and x_scales.data_ptr() % 16 == 0


def gluon_config(num_rows: int, num_outputs: int, sms: int) -> GluonPrefill:
    """From the sweep of 2026-11-22 on an H100, where groups of 4 to 8 were alike.

    256 x 128 is 5 to 10% faster than 128 x 128 for its work, as it reads less from L2, but its last wave may
    leave more processors idle.
    """
    half = num_outputs % BLOCK if num_outputs % BLOCK <= BLOCK // 2 else 0
    columns = triton.cdiv(num_outputs - half, BLOCK) + (0.5 if half else 0.0)
    waves = math.ceil(triton.cdiv(num_rows, 128) * columns / sms)
    waves_of_256 = math.ceil(triton.cdiv(num_rows, 256) * columns / sms)
    if 2 * waves_of_256 <= 1.1 * waves:
        return GluonPrefill(256, stages=3, group=6, programs=sms)
    return GluonPrefill(128, stages=5, group=8, programs=sms)


def launch_gluon(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    out: Tensor,
    config: GluonPrefill,
) -> None:
    """Fill `out`, [T, N]; it and the scales must fit."""
    num_outputs = weight.shape[0]
    row_tiles = triton.cdiv(x.shape[0], config.tokens)
    launch_tiles(x, x_scales, weight, weight_scales, None, out, num_outputs, row_tiles, config)


def launch_tiles(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    tiles: Tensor | None,
    out: Tensor,
    num_outputs: int,
    row_tiles: int,
    config: GluonPrefill,
) -> None:
    """weight: of all experts, [e * N, K]; tiles: table of row tiles, one after the other in x_scales."""
    programs = min(config.programs, row_tiles * triton.cdiv(num_outputs, BLOCK))
    scale_stride = x_scales.stride(1)
    num_scales = (x_scales.shape[1] - 1) * scale_stride + x_scales.shape[0]
    tiles_kernel[(programs,)](
        _described(x, 64, _VALUES),
        TensorDescriptor(x_scales, [num_scales], [1], [64], _SCALES),
        _described(weight, BLOCK, _VALUES),
        weight_scales,
        tiles if tiles is not None else weight_scales,
        _described(out, 64, _RESULTS),
        out,
        row_tiles,
        out.shape[0],
        num_outputs,
        x.shape[1],
        scale_stride,
        ROWS=config.tokens,
        GROUPED=tiles is not None,
        NARROW=tiles is None and 0 < num_outputs % BLOCK <= BLOCK // 2,
        GROUP=config.group,
        STAGES=config.stages,
        REGISTERS=_REGISTERS,
        num_warps=4,
    )


def _described(matrix: Tensor, rows: int, layout: gl.NVMMASharedLayout) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK], layout)

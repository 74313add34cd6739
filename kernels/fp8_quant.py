"""Quantisation to e4m3 with power-of-two scales, and the block scales of checkpoint matrices.

One scale for every `group` neighbouring channels of a row (1 x 128 in DeepSeek-V3.2):
    amax = max(max|v|, 1e-4);  scale = 2^ceil(log2(amax / 448));  v8 = e4m3(clamp(v / scale, -448, 448))
The ceil-log2 is read off the exponent bits of amax * fp32(1/448), any non-zero mantissa rounding up, as the
official kernel does; exact powers of two stay. Shapes: G groups of a row; N x K a weight matrix.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-4
FP8 = torch.float8_e4m3fn


def quantize(x: Tensor, group: int, *, backend: Backend) -> tuple[Tensor, Tensor]:
    """Quantise groups of the last dimension; the last group may be short.

    Args:
        x: [..., D], any float dtype.
        group: channels that share a scale.

    Returns:
        values [..., D] e4m3 and scales [..., G] float32, G = ceil(D / group), all powers of two.
    """
    require(group > 0, "quantize", f"group must be positive, not {group}")
    require_torch(backend, "quantize")
    return quantize_reference(x, group)


def quantize_reference(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    num_groups = math.ceil(dim / group)
    padded = F.pad(x.float(), (0, num_groups * group - dim)).unflatten(-1, (num_groups, group))
    scales = power_of_two_scale(padded.abs().amax(-1))
    values = (padded / scales.unsqueeze(-1)).clamp(-E4M3_MAX, E4M3_MAX).to(FP8)
    return values.flatten(-2)[..., :dim], scales


def dequantize_reference(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Undo `quantize`: [..., D] e4m3 and [..., G] float32 to [..., D] float32."""
    dim = values.shape[-1]
    return values.float() * scales.repeat_interleave(group, dim=-1)[..., :dim]


def power_of_two_scale(amax: Tensor) -> Tensor:
    """The smallest power of two that is at least amax / 448; float32 of amax's shape."""
    ratio = amax.float().clamp_min(AMAX_FLOOR) * (1.0 / E4M3_MAX)
    bits = ratio.view(torch.int32)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(torch.int32)
    return (exponent << 23).view(torch.float32)


def dequantize_blocks(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Widen a block-scaled matrix; edge blocks may be short.

    Args:
        values: [N, K] e4m3.
        scales: [ceil(N / block), ceil(K / block)] float32, multipliers.

    Returns:
        [N, K] float32.
    """
    wide = values.float()
    for strip, factors in zip(
        wide.split(block), scales.repeat_interleave(block, 1)[:, : values.shape[1]], strict=True
    ):
        strip.mul_(factors)
    return wide

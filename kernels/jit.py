"""Pieces of Triton kernels that several of them share: quantising, the Hadamard signs, the interleaved RoPE.

All of them take and give fp32 and are bit for bit what the references do, up to the order of a sum.
"""

import triton
import triton.language as tl

_AMAX_FLOOR = tl.constexpr(1e-4)
_INVERSE_E4M3_MAX = tl.constexpr(1.0 / 448.0)


@triton.jit
def power_of_two_scale(amax):
    """The smallest power of two that is at least amax / 448, and its inverse, both exact."""
    ratio = tl.maximum(amax, _AMAX_FLOOR) * _INVERSE_E4M3_MAX
    bits = ratio.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    return scale, ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def quantize_last(x):
    """e4m3 values and scales of x [..., channels], one scale for all channels of the last axis.

    Nothing is clamped: v / scale passes 448 by rounding at most, and the cast saturates.
    """
    scale, inverse = power_of_two_scale(tl.max(tl.abs(x), axis=-1))
    return (x * tl.expand_dims(inverse, -1)).to(tl.float8e4nv), scale


@triton.jit
def round_to_bf16(x):
    """fp32 holding what a bf16 tensor between two operations would have held."""
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def hadamard_signs(first_row: tl.constexpr, num_rows: tl.constexpr, dim: tl.constexpr):
    """Rows of the Sylvester matrix of +-1, [num_rows, dim] bf16: the parity of the bits in common."""
    common = (first_row + tl.arange(0, num_rows))[:, None] & tl.arange(0, dim)[None, :]
    common ^= common >> 8
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return (1 - 2 * (common & 1)).to(tl.float32).to(tl.bfloat16)


@triton.jit
def rotated_hadamard(a, b, rest, cos, sin, scale, rope_dim: tl.constexpr, dim: tl.constexpr):
    """RoPE on halves, then Hadamard, each rounded to bf16 as it would be between two operations.

    Args:
        a, b: [rows, rope_dim / 2], the halves that turn; rest: [rows, dim - rope_dim].
        cos, sin: [rows, rope_dim / 2].
        scale: dim ** -0.5.

    Returns:
        [rows, dim] fp32 on bf16's grid.
    """
    half: tl.constexpr = rope_dim // 2
    first = (a * cos - b * sin).to(tl.bfloat16)
    second = (a * sin + b * cos).to(tl.bfloat16)
    # The product with +-1 is exact, so the only rounding is that of the fp32 sum. It is cut along K into the
    # three parts, which then need not be brought together in one tile.
    out = tl.dot(first, hadamard_signs(0, half, dim))
    out = tl.dot(second, hadamard_signs(half, half, dim), out)
    out = tl.dot(rest.to(tl.bfloat16), hadamard_signs(rope_dim, dim - rope_dim, dim), out)
    return round_to_bf16(out * scale)

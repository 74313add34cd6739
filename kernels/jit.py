"""Pieces of Triton kernels that several of them share: quantising, the Hadamard transform, RoPE on halves.

All of them take and give fp32 and are bit for bit what the references do, up to the order of a sum.
"""

import triton
import triton.language as tl
from triton.runtime import JITFunction


def settle(*kernels: JITFunction) -> None:
    """Name kernels for Triton's disk cache: callees first, then their callers.

    Triton 3.6 lets a caller's name cover a callee's constants only where the callee was named before, so that
    a process would not find what another has compiled if it ran kernels in another order.
    """
    for kernel in kernels:
        names = {*kernel.fn.__code__.co_names}
        callees = (value for name, value in kernel.fn.__globals__.items() if name in names)
        settle(*(callee for callee in callees if isinstance(callee, JITFunction) and callee is not kernel))
        kernel.cache_key  # noqa: B018 - making it is what is wanted


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
def rotate_halves(x, cos, sin, rope_dim: tl.constexpr):
    """RoPE on halves of the first rope_dim channels of x [rows, channels], not yet rounded.

    cos and sin of each channel, [rows or 1, channels]: 1 and 0 where nothing turns, and sin of either half is
    that of the pair.
    """
    rows: tl.constexpr = x.shape[0]
    dim: tl.constexpr = x.shape[1]
    half: tl.constexpr = rope_dim // 2
    # The two halves meet by sums in which the other one is zero: no trip through shared memory.
    pairs = tl.reshape(x, [rows, dim // rope_dim, 2, half])
    is_first = (tl.arange(0, 2) == 0)[None, None, :, None]
    first = tl.sum(tl.where(is_first, pairs, 0.0), axis=2, keep_dims=True)
    second = tl.sum(tl.where(is_first, 0.0, pairs), axis=2, keep_dims=True)
    other = tl.reshape(tl.where(is_first, -second, first), [rows, dim])
    return x * cos + other * sin


@triton.jit
def hadamard(x):
    """The Sylvester matrix of +-1 times each row of x [rows, channels] fp32, a power of two from 16 on.

    By sums of pairs: those of eight neighbours within a thread, the others by one shuffle each.
    """
    rows: tl.constexpr = x.shape[0]
    dim: tl.constexpr = x.shape[1]
    x = tl.reshape(x, [rows, dim // 8, 2, 2, 2])
    for _ in tl.static_range(3):
        a, b = tl.split(x)
        x = tl.permute(tl.join(a + b, a - b), (0, 1, 4, 2, 3))
    is_second = (tl.arange(0, 2) * -2.0)[None, None, :, None]
    for level in tl.static_range(3, 12):
        if dim >> level > 1:
            x = tl.reshape(x, [rows, dim >> (level + 1), 2, 1 << level])
            x = tl.sum(x, axis=2, keep_dims=True) + x * is_second  # a + b, and (a + b) - 2 b
    return tl.reshape(x, [rows, dim])

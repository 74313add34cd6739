"""Random numbers that belong to a place rather than to a moment.

The noise of a vocabulary entry is a function of (seed, choice, position, token id) and of nothing else: no
generator is carried along, so nothing depends on how often or in which order it is asked for.

Everything here gives the same bits on every device, in every batch shape and at every place of a tensor. The
generator is integer arithmetic. `log` and `exp` are built from single IEEE operations (+, -, *, / and bit
patterns), each correctly rounded everywhere; torch's own may differ in the last bit between devices, and on a
CPU between the middle and the tail of the same tensor.
"""

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)

_MANTISSA_BITS = 52
_EXPONENT_BIAS = 1023
_SQRT_HALF_BITS = 0x3FE6A09E667F3BCD  # the bit pattern of sqrt(1/2)
_LN2_HIGH = 0.693147180369123816490  # 32 significant bits, so that its products with exponents are exact
_LN2_LOW = 1.90821492927058770002e-10
_LOG_TERMS = 11  # s**22 / 23 < 2**-55 at the largest s, 0.1716
_EXP_TERMS = 13  # r**14 / 14! < 2**-55 at the largest r, 0.3466
_EXP_FLOOR = -700.0  # keeps the result a normal number

_TOKEN_NOISE = 0  # fourth counter word: another use of the generator takes another number


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32-10 (Salmon et al., SC 2011): a block cipher used as a random function.

    Args:
        counter: four int64 tensors of 32-bit words, broadcastable.
        key: two int64 tensors, broadcastable with them; their low 32 bits count.
    Returns:
        Four int64 tensors of 32-bit words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for round_index in range(_ROUNDS):
        if round_index:
            k0 = k0 + _KEY_STEPS[0]
            k1 = k1 + _KEY_STEPS[1]
        # Wraps around in int64, which leaves all 64 bits of the unsigned product in place.
        p0 = c0 * _MULTIPLIERS[0]
        p1 = c2 * _MULTIPLIERS[1]
        # c1, c3 and the key may have bits above the 32nd; the masks drop them.
        c0 = ((p1 >> 32) ^ (c1 ^ k0)).bitwise_and_(_MASK)
        c2 = ((p0 >> 32) ^ (c3 ^ k1)).bitwise_and_(_MASK)
        c1, c3 = p1, p0
    return c0, c1 & _MASK, c2, c3 & _MASK


def gumbel(seed: Tensor, choice: Tensor, position: Tensor, token_id: Tensor) -> Tensor:
    """Standard Gumbel noise of vocabulary entries.

    The seed is the key and (token id, position, choice) the counter, so no two places share a number. Two of
    the four words make a uniform number of 52 bits between 0 and 1, both excluded: the noise lies between
    -3.7 and 36.8.

    Args:
        seed: int64, a 64-bit number as a signed one.
        choice, position, token_id: int64 below 2**32. All four broadcastable.
    Returns:
        float64 noise of their common shape.
    """
    counter = (token_id, position, choice, torch.full_like(choice, _TOKEN_NOISE))
    high, low, _, _ = philox4x32(counter, (seed, seed >> 32))
    bits = (high << 20).bitwise_or_(low >> 12)
    # 52 bits and not 53: the half would be rounded away at the top, giving log(1) and infinite noise.
    uniform = bits.double().add_(0.5).mul_(2.0**-52)
    return log(log(uniform).neg_()).neg_()


def log(x: Tensor) -> Tensor:
    """Natural logarithm of float64 x, positive and normal, to within a few units in the last place."""
    bits = x.contiguous().view(torch.int64)
    exponent = (bits - _SQRT_HALF_BITS) >> _MANTISSA_BITS
    mantissa = (bits - (exponent << _MANTISSA_BITS)).view(torch.float64)  # in [sqrt(1/2), sqrt(2))
    # log m = 2 atanh(s) = 2 s (1 + s**2 / 3 + s**4 / 5 + ...) with s = (m - 1) / (m + 1)
    s = (mantissa - 1.0).div_(mantissa + 1.0)
    s_squared = s * s
    series = torch.full_like(s, 2.0 / (2 * _LOG_TERMS - 1))
    for term in range(_LOG_TERMS - 2, -1, -1):
        series.mul_(s_squared).add_(2.0 / (2 * term + 1))
    exponent_part = exponent.double()
    return series.mul_(s).add_(exponent_part * _LN2_LOW).add_(exponent_part.mul_(_LN2_HIGH))


def exp(x: Tensor) -> Tensor:
    """Exponential of float64 x <= 0, -inf included, to within a few units in the last place.

    Below -700 the result stays at exp(-700), about 1e-304. exp(0) is exactly 1.
    """
    x = x.clamp(min=_EXP_FLOOR)
    exponent = (x * (1.0 / math.log(2.0))).round_()
    remainder = (x - exponent * _LN2_HIGH).sub_(exponent * _LN2_LOW)
    series = torch.full_like(x, 1.0 / math.factorial(_EXP_TERMS))
    for term in range(_EXP_TERMS - 1, -1, -1):
        series.mul_(remainder).add_(1.0 / math.factorial(term))
    power_of_two = exponent.long().add_(_EXPONENT_BIAS).bitwise_left_shift_(_MANTISSA_BITS)
    return series.mul_(power_of_two.view(torch.float64))

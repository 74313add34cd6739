"""The e4m3 format written out without torch: what each byte means, and to which byte a number rounds."""

import bisect
import math


def _value(byte: int) -> float:
    """1 sign bit, 4 exponent bits with bias 7, 3 mantissa bits; no infinity, one NaN under either sign."""
    exponent, mantissa = (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and mantissa == 0x7:
        return math.nan
    magnitude = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -magnitude if byte & 0x80 else magnitude


VALUES = [_value(byte) for byte in range(256)]
MAGNITUDES = VALUES[:0x7F]  # ascending: a larger byte is a larger number


def nearest(x: float) -> int:
    """The byte that x rounds to: to the nearest value, at ties to the even byte, beyond 448 to 448."""
    magnitude, sign = abs(x), 0x80 if math.copysign(1.0, x) < 0 else 0
    above = bisect.bisect_left(MAGNITUDES, magnitude)
    if above in (0, len(MAGNITUDES)):
        return sign | min(above, len(MAGNITUDES) - 1)
    middle = (MAGNITUDES[above - 1] + MAGNITUDES[above]) / 2  # exact in float64, as is x out of float32
    if magnitude == middle:
        return sign | (above if above % 2 == 0 else above - 1)
    return sign | (above if magnitude > middle else above - 1)

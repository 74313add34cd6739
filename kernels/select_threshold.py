"""Parts of selection that its kernels share: thresholds searched by counting scores in registers, and
positions written in order.

Scores are compared as floats, so that the two zeros are one score; only thresholds are ever turned into keys,
integers in the order of the floats, in which one can always halve a range. Searching takes six to ten counts
on scores like a normal distribution, because the first guesses come from their mean and spread and the next
ones follow the logarithm of the count, and at most some seventy on any scores whatever, because a guess that
does not halve what is left is followed by the middle of the range.
"""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-2139095040)  # the key of the least finite float, as int32(0x80800000)
ABOVE_ALL = tl.constexpr(0x7F800001)  # one more than the key of infinity


@triton.jit
def key_of(value):
    """A float32 scalar as an int64 key; both zeros have the same."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def float_of(key):
    bits = key.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def load_scores(row, position, end, VECTOR: tl.constexpr):
    """Scores before `end`, -inf behind it. VECTOR scores are loaded by one instruction: up to VECTOR - 1
    behind the end are read too, which a row padded to that many has."""
    padded = tl.multiple_of((end + VECTOR - 1) // VECTOR * VECTOR, VECTOR)
    x = tl.load(row + position, mask=position < padded, other=-float("inf"))
    return tl.where(position < end, x, -float("inf"))


@triton.jit
def count_reaching(pieces, threshold):
    """How many scores reach the threshold. Pieces: a tuple of blocks, all as large, which together are more
    scores than the kernels' later steps could handle at once."""
    reached = (pieces[0] >= threshold).to(tl.int32)
    for i in tl.static_range(1, len(pieces)):
        reached += (pieces[i] >= threshold).to(tl.int32)
    return tl.sum(reached, 0)


@triton.jit
def count_above(pieces, threshold):
    above = (pieces[0] > threshold).to(tl.int32)
    for i in tl.static_range(1, len(pieces)):
        above += (pieces[i] > threshold).to(tl.int32)
    return tl.sum(above, 0)


@triton.jit
def least_from(pieces, threshold):
    """The least of the scores that reach the threshold, infinity if there is none."""
    least = tl.where(pieces[0] >= threshold, pieces[0], float("inf"))
    for i in tl.static_range(1, len(pieces)):
        least = tl.minimum(least, tl.where(pieces[i] >= threshold, pieces[i], float("inf")))
    return tl.min(least, 0)


@triton.jit
def greatest_below(pieces, limit):
    """The greatest of the scores that do not reach the limit (NaN: of all)."""
    greatest = tl.where((pieces[0] >= limit) == 0, pieces[0], -float("inf"))
    for i in tl.static_range(1, len(pieces)):
        greatest = tl.maximum(greatest, tl.where((pieces[i] >= limit) == 0, pieces[i], -float("inf")))
    return tl.max(greatest, 0)


@triton.jit
def mean_and_spread(pieces):
    """Of the finite scores, only to guess with: an outlier or rounding makes a guess worse, nothing else."""
    count = tl.maximum(count_reaching(pieces, float_of(tl.full((), LOWEST, tl.int64))), 1).to(tl.float32)
    origin = greatest_below(pieces, float("nan"))
    y = tl.where(pieces[0] > -float("inf"), pieces[0] - origin, 0.0)
    total = y
    squares = y * y
    for i in tl.static_range(1, len(pieces)):
        y = tl.where(pieces[i] > -float("inf"), pieces[i] - origin, 0.0)
        total += y
        squares += y * y
    mean = tl.sum(total, 0) / count
    square = tl.sum(squares, 0) / count
    return origin + mean, tl.sqrt(tl.maximum(square - mean * mean, 0.0))


@triton.jit
def normal_score(share):
    """How many deviations above the mean this share of a normal distribution begins (Hastings' formula)."""
    share = tl.minimum(tl.maximum(share, 1e-6), 1.0 - 1e-6)
    t = tl.sqrt(-1.3862944 * tl.log2(tl.minimum(share, 1.0 - share)))
    z = t - (2.30753 + 0.27061 * t) / (1.0 + t * (0.99229 + t * 0.04481))
    return tl.where(share < 0.5, z, -z)


@triton.jit
def threshold_key(pieces, enough, most, guess, step):
    """The key of a threshold that between `enough` and `most` scores reach; or, where ties leave no such
    threshold, of one that more reach but fewer than `enough` exceed. LOWEST if at most `most` are finite.

    The pieces hold -inf where there is no score. The first two thresholds tried are `guess` and `step` to
    that side of it where the answer lies.
    """
    lowest = tl.full((), LOWEST, tl.int64)
    reach_low = count_reaching(pieces, float_of(lowest))  # how many reach `low`: enough, at first too many
    low = lowest
    high = lowest + 1
    if reach_low > most:
        low = key_of(least_from(pieces, float_of(lowest)))
        high = key_of(greatest_below(pieces, float("nan"))) + 1
    reach_high = tl.zeros_like(reach_low)  # how many reach `high`: never enough
    aim = (enough + most).to(tl.float32) * 0.5
    tried = tl.zeros_like(reach_low)
    slow = tried > 0
    while (reach_low > most) & (high - low > 1):
        many = reach_low.to(tl.float32)
        few = tl.maximum(reach_high.to(tl.float32), 0.5)
        down = tl.log2(many / aim) / tl.log2(many / few)
        followed = low + ((high - low).to(tl.float32) * down).to(tl.int64)
        key = tl.where(slow, (low + high) >> 1, followed)
        key = tl.where(tried < 2, key_of(guess), key)
        key = tl.minimum(tl.maximum(key, low + 1), high - 1)
        reach = count_reaching(pieces, float_of(key))
        between = reach_low - reach_high
        is_low = reach >= enough
        low = tl.where(is_low, key, low)
        reach_low = tl.where(is_low, reach, reach_low)
        high = tl.where(is_low, high, key)
        reach_high = tl.where(is_low, reach_high, reach)
        guess = tl.where(is_low, guess + step, guess - step)
        slow = (tried > 1) & ((reach_low - reach_high) * 2 > between) & (slow == 0)
        tried += 1
        if (tried % 4 == 3) & (reach_low > most):
            # Bring both ends to scores that exist: that ends the search early where they tie.
            low = key_of(least_from(pieces, float_of(low)))
            high = key_of(greatest_below(pieces, float_of(high))) + 1
    return low


@triton.jit
def store_selected(x, position, threshold, room, out, table, TRANSLATE: tl.constexpr, PAGE: tl.constexpr):
    """Write, in order, the position or slot of every score of a block above the threshold, and of the first
    `room` that equal it. At most 32,768 scores. Returns how many were written and how much room is left."""
    above = x > threshold
    equal = x == threshold
    # Two counts in one scan: of those above in the low half of the word, of those equal in the high half.
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, 0) - both
    equal_before = (before >> 16) & 0xFFFF
    chosen = above | (equal & (equal_before < room))
    place = (before & 0xFFFF) + tl.minimum(equal_before, room)
    if TRANSLATE:
        page = tl.load(table + position // PAGE, mask=chosen, other=0).to(tl.int32)
        slot = page * PAGE + position % PAGE
    else:
        slot = position
    tl.store(out + place, slot, mask=chosen)
    counts = tl.sum(both, 0)
    equals = tl.minimum((counts >> 16) & 0xFFFF, room)
    return (counts & 0xFFFF) + equals, room - equals


@triton.jit
def store_none(out, selected, k, K_BLOCK: tl.constexpr):
    """-1 in what is left of a row."""
    place = tl.arange(0, K_BLOCK)
    tl.store(out + place, tl.full((K_BLOCK,), -1, tl.int32), mask=(place >= selected) & (place < k))

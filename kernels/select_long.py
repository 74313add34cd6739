"""Selection from rows that do not fit the registers of a program: guess a threshold from a sample, keep what
reaches it, and select exactly among those.

A row is read once if between k and `CANDIDATES` scores reach the guess, which is so unless the scores are
such that a sample says little. If fewer or more do, the row is read again with a better threshold, in the end
by halving the range of the threshold; if a great many tie at it, selection is from the row itself.
What a row keeps is first a bit for each score, 32 to a word: that takes no more than some five instructions a
score and no waiting, while writing the positions as they are met takes seventy. The positions are then read
off the words.
Shapes: T rows, L scores a row.
"""

import triton
import triton.language as tl

from kernels.jit import settle
from kernels.select_threshold import (
    ABOVE_ALL,
    LOWEST,
    count_above,
    float_of,
    key_of,
    load_scores,
    mean_and_spread,
    normal_score,
    store_none,
    store_selected,
    threshold_key,
)


@triton.jit
def select_rows_by_sample(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
    scratch,  # [programs, WORDS + CANDIDATES] int32
    num_rows,
    stride,
    table_stride,
    k,
    wanted,
    N: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSLATE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """A program selects from one row after another, alone."""
    words = scratch + tl.program_id(0).to(tl.int64) * (WORDS + CANDIDATES)
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        t = index + tl.zeros((), tl.int64)
        row = logits + t * stride
        seen = tl.load(visible + t).to(tl.int32)
        to = out + t * k
        table = page_table + (t // N) * table_stride
        selected = _select_row(
            row, seen, k, wanted, to, table, words, logits, SAMPLE, TILE, WORDS, CANDIDATES, STAGES, VECTOR,
            TRANSLATE, PAGE, False,
        )  # fmt: skip
        store_none(to, selected, k, K_BLOCK)
        tl.debug_barrier()  # what is kept of this row is read before that of the next is written


@triton.jit
def mark_shares(
    logits,  # [T, stride]
    visible,  # [T]
    scratch,  # [T, WORDS + CANDIDATES] int32
    guesses,  # [T, 3] float32: threshold, mean, spread
    stride,
    wanted,
    share,
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Several programs to a row: each marks what reaches the guess in its share, all guess alike."""
    split, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    row = logits + t * stride
    start = split * share
    if start < seen:
        key, mean, spread = _guess(row, seen, wanted, SAMPLE, CANDIDATES)
        threshold = float_of(key)
        if split == 0:
            tl.store(guesses + t * 3, threshold)
            tl.store(guesses + t * 3 + 1, mean)
            tl.store(guesses + t * 3 + 2, spread)
        words = scratch + t * (WORDS + CANDIDATES)
        _mark(row, start, tl.minimum(start + share, seen), threshold, words, TILE, STAGES, VECTOR)


@triton.jit
def select_from_shares(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
    scratch,  # [T, WORDS + CANDIDATES] int32
    guesses,  # [T, 3]
    stride,
    table_stride,
    k,
    wanted,
    N: tl.constexpr,
    K_BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSLATE: tl.constexpr,
    PAGE: tl.constexpr,
):
    """The second launch of rows in shares: select among what was marked, or else as from any row."""
    t = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    to = out + t * k
    selected = _select_row(
        logits + t * stride, seen, k, wanted, to, page_table + (t // N) * table_stride,
        scratch + t * (WORDS + CANDIDATES), guesses + t * 3, SAMPLE, TILE, WORDS, CANDIDATES, STAGES, VECTOR,
        TRANSLATE, PAGE, True,
    )  # fmt: skip
    store_none(to, selected, k, K_BLOCK)


@triton.jit
def _select_row(
    row,
    seen,
    k,
    wanted,
    out,
    table,
    words,  # [WORDS + CANDIDATES] int32, of this row alone
    guesses,  # [3] where the row is marked already
    SAMPLE: tl.constexpr,
    TILE: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSLATE: tl.constexpr,
    PAGE: tl.constexpr,
    MARKED: tl.constexpr,
):
    low = tl.full((), LOWEST, tl.int64)  # enough scores reach it, unless it is the lowest
    high = tl.full((), ABOVE_ALL, tl.int64)  # too few reach it
    threshold = float_of(low)
    mean = tl.zeros((), tl.float32)
    spread = tl.zeros((), tl.float32)
    kept = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    aim = wanted
    tried = tl.zeros((), tl.int32)
    state = tl.where(seen > 0, 1, 0)
    while state == 1:
        key = (low + high) >> 1
        marked = tried < 0
        if MARKED:
            marked = tried == 0
        if marked:
            key = key_of(tl.load(guesses))
            mean = tl.load(guesses + 1)
            spread = tl.load(guesses + 2)
        else:
            if tried < 3:
                guess, mean, spread = _guess(row, seen, aim, SAMPLE, CANDIDATES)
                key = tl.where((guess >= low) & (guess < high), guess, key)
            tl.debug_barrier()  # nobody still reads what the last attempt kept
            _mark(row, 0, seen, float_of(key), words, TILE, STAGES, VECTOR)
            tl.debug_barrier()  # what all threads marked is there for all
        threshold = float_of(key)
        kept = _collect(words, seen, WORDS, CANDIDATES)
        if kept > CANDIDATES:
            above = _count_above_of_row(row, seen, threshold, TILE, VECTOR)
            state = tl.where(above < k, 2, 1)  # 2: the rest tie at the threshold
            low = key + 1
        else:
            state = tl.where((kept >= k) | (key == LOWEST), 0, 1)
            high = key
        ratio = wanted.to(tl.float32) / tl.maximum(kept, 1).to(tl.float32)
        aim = tl.maximum((aim.to(tl.float32) * tl.minimum(tl.maximum(ratio, 0.05), 20.0)).to(tl.int32), 1)
        tried += 1
    tl.debug_barrier()  # what all threads collected is there for all
    selected = tl.zeros((), tl.int32)
    if state == 0:
        candidate = tl.arange(0, CANDIDATES)
        position = tl.load(words + WORDS + candidate, mask=candidate < kept, other=0)
        x = tl.load(row + position, mask=candidate < kept, other=-float("inf"))
        least = _threshold_of_kept((x,), kept, seen, threshold, mean, spread, k)
        room = k - count_above((x,), least)
        selected, room = store_selected(x, position, least, room, out, table, TRANSLATE, PAGE)
    else:
        room = k - above
        for start in range(0, seen, TILE):
            position = start + tl.arange(0, TILE)
            x = load_scores(row, position, seen, VECTOR)
            stored, room = store_selected(
                x, position, threshold, room, out + selected, table, TRANSLATE, PAGE
            )
            selected += stored
    return selected


@triton.jit
def _mark(row, start, end, threshold, words, TILE: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr):
    """Bit i of word w says whether score 32 w + i reaches the threshold."""
    bit = tl.arange(0, 32)[None, :]
    for first in tl.range(start, end, TILE, num_stages=STAGES):
        x = load_scores(row, first + tl.arange(0, TILE), end, VECTOR)
        reaches = tl.reshape((x >= threshold).to(tl.int32), (TILE // 32, 32))
        word = first // 32 + tl.arange(0, TILE // 32)
        tl.store(words + word, tl.sum(reaches << bit, 1), mask=word * 32 < end)


@triton.jit
def _bits_in(word):
    """How many bits of a word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def _collect(words, seen, WORDS: tl.constexpr, CANDIDATES: tl.constexpr):
    """Write the positions of all marked scores behind the words, in order, if they are candidates few enough;
    returns how many there are."""
    index = tl.arange(0, WORDS)
    rest = tl.load(words + index, mask=index * 32 < seen, other=0)
    count = _bits_in(rest)
    place = tl.cumsum(count, 0) - count
    kept = tl.sum(count, 0)
    most = tl.where(kept <= CANDIDATES, tl.max(count, 0), 0)
    done = tl.zeros_like(kept)
    while done < most:
        for _ in tl.static_range(4):
            lowest = rest & (0 - rest)
            position = index * 32 + _bits_in(lowest - 1)
            tl.store(words + WORDS + place, position, mask=rest != 0)
            place += 1
            rest = rest & (rest - 1)
        done += 4
    return kept


@triton.jit
def _threshold_of_kept(scores, kept, seen, threshold, mean, spread, k):
    # From the threshold that `kept` reach to the one that k reach, on a normal distribution.
    length = tl.maximum(seen, 1).to(tl.float32)
    further = normal_score(k.to(tl.float32) / length) - normal_score(kept.to(tl.float32) / length)
    return float_of(threshold_key(scores, k, k, threshold + further * spread, spread * 0.03))


@triton.jit
def _guess(row, seen, aim, SAMPLE: tl.constexpr, CANDIDATES: tl.constexpr):
    """A threshold that about `aim` scores of the row should reach, by a sample of 32-byte pieces all over it;
    the lowest if the row fits among the candidates. With mean and spread of the sample."""
    key = tl.full((), LOWEST, tl.int64)
    mean = tl.zeros((), tl.float32)
    spread = tl.zeros((), tl.float32)
    if seen > CANDIDATES:
        i = tl.arange(0, SAMPLE)
        piece = (i // 8) * seen // (SAMPLE // 8)
        x = tl.load(row + (piece // 8) * 8 + i % 8)
        pieces = (x,)
        mean, spread = mean_and_spread(pieces)
        share = aim.to(tl.float32) / seen.to(tl.float32)
        rank = tl.minimum(share * SAMPLE, SAMPLE - 1.0)
        enough = tl.maximum((rank * 0.93).to(tl.int32), 1)
        most = tl.maximum((rank * 1.07).to(tl.int32), enough)
        key = threshold_key(pieces, enough, most, mean + normal_score(share) * spread, spread * 0.05)
    return key, mean, spread


@triton.jit
def _count_above_of_row(row, seen, threshold, TILE: tl.constexpr, VECTOR: tl.constexpr):
    above = tl.zeros((), tl.int32)
    for first in range(0, seen, TILE):
        position = first + tl.arange(0, TILE)
        x = load_scores(row, position, seen, VECTOR)
        above += tl.sum((x > threshold).to(tl.int32), 0)
    return above


settle(select_rows_by_sample, mark_shares, select_from_shares)

"""The kernels of selection that work in shared memory (select_shared.py). NVIDIA only.

A row of up to 32,768 scores is held in the registers of one program. A longer one is read once: a sample
gives a threshold that some 3,000 scores should reach, their positions are marked, and selection is among
those. If they turn out fewer than k or more than 4,096, it is read again with a better threshold, in the end
by halving the range of the threshold; if a great many tie at it, selection is from the row itself.
Shapes: T rows, L scores a row.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kernels.jit import settle
from kernels.select_shared import (
    exact_threshold,
    guess,
    keep_marked,
    kept_positions,
    mark_eights,
    mark_quads,
    pages_of,
    reserve,
    store_kept,
    store_quads,
    words_of_marks,
)
from kernels.select_threshold import ABOVE_ALL, LOWEST, float_of, key_of, load_scores, store_none


@triton.jit
def select_in_registers(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
    stride,
    table_stride,
    k,
    N: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSLATE: tl.constexpr,
    PAGE: tl.constexpr,
):
    memory = reserve()
    t = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    row = logits + t * stride
    piece = tl.arange(0, BLOCK // PIECES)
    pieces = ()
    for i in tl.static_range(PIECES):
        x = load_scores(row, i * (BLOCK // PIECES) + piece, seen, VECTOR)
        pieces = pieces + (x,)  # type: ignore[assignment]  # noqa: RUF005
    table = page_table + (t // N) * table_stride
    page = pages_of(0, seen, table, BLOCK, TRANSLATE, PAGE)
    threshold = tl.full((), -float("inf"), tl.float32)
    room = tl.zeros_like(k)
    if seen > k:
        threshold, above = exact_threshold(pieces, k, -3.4028234663852886e38, memory, 1024)
        room = k - above
    mark_quads(pieces, threshold, memory)
    tl.debug_barrier()
    to = out + t * k
    selected, _ = store_quads(0, page, room, to, memory, BLOCK, TRANSLATE, PAGE)
    if selected < k:
        store_none(to, selected, k, K_BLOCK)


@triton.jit
def select_by_marks(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
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
    memory = reserve()
    for index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        t = num_rows - 1 - index + tl.zeros((), tl.int64)  # the last of a chunk see most
        seen = tl.load(visible + t).to(tl.int32)
        table = page_table + (t // N) * table_stride
        _select_row(
            logits + t * stride, seen, k, wanted, out + t * k, table, memory, out, tl.zeros((), tl.float32),
            K_BLOCK, SAMPLE, TILE, WORDS, CANDIDATES, STAGES, VECTOR, TRANSLATE, PAGE, False,
        )  # fmt: skip
        tl.debug_barrier()  # what is kept of this row is read before that of the next is written


@triton.jit
def mark_parts(
    logits,  # [T, stride]
    visible,  # [T]
    marks,  # [T, WORDS] int32
    thresholds,  # [T] float32
    stride,
    wanted,
    SAMPLE: tl.constexpr,
    PART: tl.constexpr,
    WORDS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Several programs to a row: each marks what reaches the guess in its part, all guess alike."""
    memory = reserve()
    gdc_launch_dependents()
    part, t = tl.program_id(0), tl.program_id(1).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    row = logits + t * stride
    start = part * PART
    if start < seen:
        x = load_scores(row, start + tl.arange(0, PART), seen, VECTOR)
        threshold = _guess_of_row(row, seen, wanted, memory, SAMPLE, CANDIDATES)
        if part == 0:
            tl.store(thresholds + t, threshold)
        bit = tl.arange(0, 32)[None, :]
        word = tl.sum(tl.where(tl.reshape(x, (PART // 32, 32)) >= threshold, 1 << bit, 0), 1)
        tl.store(marks + t * WORDS + start // 32 + tl.arange(0, PART // 32), word)


@triton.jit
def select_from_parts(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
    marks,  # [T, WORDS]
    thresholds,  # [T]
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
    """The second launch of rows in parts."""
    memory = reserve()
    t = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    table = page_table + (t // N) * table_stride
    gdc_wait()  # what the first launch wrote is there
    threshold = tl.load(thresholds + t)
    _select_row(
        logits + t * stride, seen, k, wanted, out + t * k, table, memory, marks + t * WORDS, threshold,
        K_BLOCK, SAMPLE, TILE, WORDS, CANDIDATES, STAGES, VECTOR, TRANSLATE, PAGE, True,
    )  # fmt: skip


@triton.jit
def _guess_of_row(row, seen, wanted, memory, SAMPLE: tl.constexpr, CANDIDATES: tl.constexpr):
    """A threshold that about `wanted` scores should reach, by a sample of 32-byte pieces all over the row;
    the least finite score if the row fits among the candidates."""
    threshold = tl.full((), -3.4028234663852886e38, tl.float32)
    if seen > CANDIDATES:
        i = tl.arange(0, SAMPLE)
        piece = (i // 8) * seen // (SAMPLE // 8)
        x = tl.load(row + (piece // 8) * 8 + i % 8)
        rank = (wanted.to(tl.float32) / seen.to(tl.float32) * SAMPLE).to(tl.int32)
        threshold = guess(x, tl.maximum(rank, 1), memory, 1024)
    return threshold


@triton.jit
def _select_row(
    row,
    seen,
    k,
    wanted,
    out,
    table,
    memory,
    marks,  # [WORDS] where the row is marked already, with
    given,  # this threshold
    K_BLOCK: tl.constexpr,
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
    kept = tl.zeros((), tl.int32)
    above = tl.zeros((), tl.int32)
    aim = wanted
    tried = tl.zeros((), tl.int32)
    state = tl.where(seen > 0, 1, 0)
    words = tl.arange(0, WORDS)
    while state == 1:
        key = (low + high) >> 1
        marked = tried < 0
        if MARKED:
            marked = tried == 0
        if marked:
            key = key_of(given)
            word = tl.load(marks + words, mask=words * 32 < seen, other=0)
        else:
            if tried < 3:
                found = key_of(_guess_of_row(row, seen, aim, memory, SAMPLE, CANDIDATES))
                key = tl.where((found >= low) & (found < high), found, key)
            _mark_row(row, seen, float_of(key), memory, TILE, STAGES, VECTOR)
            word = words_of_marks(words, seen, memory, WORDS)
        threshold = float_of(key)
        kept = keep_marked(word, words * 32, memory, CANDIDATES)
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
    selected = tl.zeros((), tl.int32)
    if state == 0:
        index = tl.arange(0, CANDIDATES)
        position = kept_positions(index, kept, memory)
        x = tl.load(row + position, mask=index < kept, other=-float("inf"))
        page = position
        if TRANSLATE:
            page = tl.load(table + position // PAGE, mask=index < kept, other=0).to(tl.int32)
        tl.debug_barrier()  # the positions are read
        least, above = exact_threshold((x,), k, threshold, memory, 1024)
        selected = store_kept(x, position, page, least, k - above, out, memory, TRANSLATE, PAGE)
    else:
        room = k - above
        for first in range(0, seen, TILE):
            x = load_scores(row, first + tl.arange(0, TILE), seen, VECTOR)
            page = pages_of(first, seen, table, TILE, TRANSLATE, PAGE)
            mark_quads((x,), threshold, memory)
            tl.debug_barrier()
            stored, room = store_quads(first, page, room, out + selected, memory, TILE, TRANSLATE, PAGE)
            tl.debug_barrier()
            selected += stored
    if selected < k:
        store_none(out, selected, k, K_BLOCK)


@triton.jit
def _mark_row(row, seen, threshold, memory, TILE: tl.constexpr, STAGES: tl.constexpr, VECTOR: tl.constexpr):
    whole = seen // TILE * TILE
    for first in tl.range(0, whole, TILE, num_stages=STAGES):
        x = tl.load(row + first + tl.arange(0, TILE))
        mark_eights(x, first, threshold, memory)
    if whole < seen:
        x = load_scores(row, whole + tl.arange(0, TILE), seen, VECTOR)
        mark_eights(x, whole, threshold, memory)
    tl.debug_barrier()


@triton.jit
def _count_above_of_row(row, seen, threshold, TILE: tl.constexpr, VECTOR: tl.constexpr):
    above = tl.zeros((), tl.int32)
    for first in range(0, seen, TILE):
        x = load_scores(row, first + tl.arange(0, TILE), seen, VECTOR)
        above += tl.sum((x > threshold).to(tl.int32), 0)
    return above


settle(select_in_registers, select_by_marks, mark_parts, select_from_parts)

"""Steps of selection in a program's shared memory. NVIDIA only: inline PTX, because `tl` cannot address
shared memory.

A histogram of 2,048 bins between bounds that hold the answer for certain takes the place of ten counts; the
scores of its one bin, some tens, are then compared with each other. Marks are bits in shared memory, which
one scan turns into positions in order.
Nothing here depends on the order in which threads arrive: counts and sets do not.
"""

import triton
import triton.language as tl

from kernels.select_threshold import count_above, float_of, threshold_key

BINS = tl.constexpr(2048)
FEW = tl.constexpr(1024)  # members of a bin that are compared with each other
MARKS = tl.constexpr(20480)  # bytes of marks
_FEW_AT = tl.constexpr(8192)
_COUNTER_AT = tl.constexpr(12288)
_BIN_AT = tl.constexpr(12292)
_ABOVE_AT = tl.constexpr(12296)
_THRESHOLD_AT = tl.constexpr(12300)
_TOTAL_AT = tl.constexpr(20480)
_MARKS_AT = tl.constexpr(0)  # marks and bins are never needed at once
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def reserve():
    """The address of this program's 20 KB: bins, the members of one and a counter, or marks."""
    return tl.inline_asm_elementwise(
        "{ .shared .align 16 .b8 selection[20496]; mov.u32 $0, selection; }",
        "=r,r",
        [tl.zeros((), tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _read(address):
    return tl.inline_asm_elementwise(
        "ld.shared.b32 $0, [$1];", "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _read_float(address):
    return tl.inline_asm_elementwise(
        "ld.shared.f32 $0, [$1];", "=f,r", [address], dtype=tl.float32, is_pure=False, pack=1
    )


@triton.jit
def _write(address, value):
    tl.inline_asm_elementwise(
        "st.shared.b32 [$1], $2; mov.u32 $0, 0;",
        "=r,r,r",
        [address, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _write_if(address, value, when):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.shared.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,r,r,r",
        [address, value, when.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _write_byte(address, value):
    tl.inline_asm_elementwise(
        "st.shared.u8 [$1], $2; mov.u32 $0, 0;",
        "=r,r,r",
        [address, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _count_if(address, when):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }",
        "=r,r,r",
        [address, when.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _append_if(counter, to, value, when):
    """Put the value at the next free place; places go by arrival."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 place;
        setp.ne.s32 p, $4, 0;
        @p atom.shared.add.u32 place, [$1], 4;
        @p add.u32 place, place, $2;
        @p st.shared.f32 [place], $3;
        mov.u32 $0, 0;
        }""",
        "=r,r,r,f,r",
        [counter, to, value, when.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def bits_in(word):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [word], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _lowest_bits(word, count):
    """The `count` lowest set bits of a word."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 rest, left, below;
        mov.u32 rest, $1;
        mov.u32 left, $2;
        more:
        setp.le.s32 p, left, 0;
        @p bra done;
        sub.u32 below, rest, 1;
        and.b32 rest, rest, below;
        sub.u32 left, left, 1;
        bra more;
        done:
        xor.b32 $0, $1, rest;
        }""",
        "=r,r,r",
        [word, count],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _store_bits(word, base, to):
    """base + i at the next place of `to`, for every set bit i of the word."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 rest, below, place, value;
        .reg .u64 address;
        mov.u32 rest, $1;
        mov.u64 address, $3;
        more:
        setp.eq.u32 p, rest, 0;
        @p bra done;
        brev.b32 place, rest;
        clz.b32 place, place;
        add.u32 value, place, $2;
        st.global.u32 [address], value;
        add.u64 address, address, 4;
        sub.u32 below, rest, 1;
        and.b32 rest, rest, below;
        bra more;
        done:
        mov.u32 $0, 0;
        }""",
        "=r,r,r,l",
        [word, base, to],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _keep_bits(word, base, to):
    """The same into shared memory."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .u32 rest, below, place, value, address;
        mov.u32 rest, $1;
        mov.u32 address, $3;
        more:
        setp.eq.u32 p, rest, 0;
        @p bra done;
        brev.b32 place, rest;
        clz.b32 place, place;
        add.u32 value, place, $2;
        st.shared.u32 [address], value;
        add.u32 address, address, 4;
        sub.u32 below, rest, 1;
        and.b32 rest, rest, below;
        bra more;
        done:
        mov.u32 $0, 0;
        }""",
        "=r,r,r,r",
        [word, base, to],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _two_greatest(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(tl.minimum(a, c), tl.maximum(b, d))


@triton.jit
def _extent(a, b, c, d):
    return tl.minimum(a, c), tl.maximum(b, d)


@triton.jit
def _extents(a, b, c, d, e, f):
    return tl.minimum(a, d), tl.maximum(b, e), tl.maximum(c, f)


@triton.jit
def _two_of_each_column(pieces, COLUMNS: tl.constexpr):
    first = pieces[0]
    second = tl.full(first.shape, -float("inf"), tl.float32)
    for i in tl.static_range(1, len(pieces)):
        second = tl.maximum(second, tl.minimum(first, pieces[i]))
        first = tl.maximum(first, pieces[i])
    shape: tl.constexpr = (COLUMNS, first.shape[0] // COLUMNS)
    return tl.reduce((tl.reshape(first, shape), tl.reshape(second, shape)), 1, _two_greatest)


@triton.jit
def _bin_of(x, low, scale):
    """Grows with the score. Adding 2^23 rounds to an integer in the low bits."""
    y = tl.fma(x - low, scale, 8388608.0)
    y = tl.minimum(tl.maximum(y, 8388608.0), 8388608.0 + (BINS - 1))
    return y.to(tl.int32, bitcast=True) & (BINS - 1)


@triton.jit
def _fill_bins(pieces, low, scale, memory):
    """How many scores from `low` on lie in each bin."""
    i = tl.arange(0, BINS)
    _write(memory + 4 * i, tl.zeros_like(i))
    _write(memory + _COUNTER_AT, tl.zeros((), tl.int32))
    _write(memory + _BIN_AT, tl.full((), -1, tl.int32))
    tl.debug_barrier()
    for i in tl.static_range(len(pieces)):
        _count_if(memory + 4 * _bin_of(pieces[i], low, scale), pieces[i] >= low)
    tl.debug_barrier()


@triton.jit
def _find_bin(k, memory):
    """The bin of the k-th greatest and how many lie in those above; -1 if there are fewer."""
    i = tl.arange(0, BINS)
    count = _read(memory + 4 * (BINS - 1 - i))
    reached = tl.cumsum(count, 0)
    it = (reached >= k) & (reached - count < k)
    _write_if(memory + _BIN_AT, BINS - 1 - i, it)
    _write_if(memory + _ABOVE_AT, reached - count, it)
    tl.debug_barrier()
    return _read(memory + _BIN_AT), _read(memory + _ABOVE_AT)


@triton.jit
def guess(sample, rank, memory, COLUMNS: tl.constexpr):
    """About the `rank`-th greatest of a sample; of its mark a lone outlier moves nothing."""
    first, second = _two_of_each_column((sample,), COLUMNS)
    low, usual, high = tl.reduce((first, second, first), 0, _extents)
    high = tl.minimum(high, usual + (usual - low))
    low = tl.maximum(low, -_LARGEST)
    scale = tl.where(high > low, (BINS - 1) / (high - low), 0.0)
    _fill_bins((sample,), low, scale, memory)
    place, _ = _find_bin(rank, memory)
    tl.debug_barrier()  # the bins are read
    found = low + tl.maximum(place.to(tl.float32) - 0.5, 0.0) / scale
    return tl.where((place > 0) & (scale > 0.0) & (found >= low), found, low)


@triton.jit
def exact_threshold(pieces, k, floor, memory, COLUMNS: tl.constexpr):
    """The k-th greatest of the scores from `floor` on, and how many exceed it; the floor if there are fewer.
    At most 32,768 scores; k at most twice COLUMNS.

    The two greatest of each column bound it: all the seconds and as many firsts are no less than the least
    second, and no more than COLUMNS scores exceed the greatest.
    """
    first, second = _two_of_each_column(pieces, COLUMNS)
    low, high = tl.reduce((second, tl.where(k > COLUMNS, second, first)), 0, _extent)
    low = tl.maximum(low, floor)
    high = tl.minimum(high, _LARGEST)
    threshold = low
    above = tl.zeros_like(k)
    if high > low:
        scale = (BINS - 1) / (high - low)
        _fill_bins(pieces, low, scale, memory)
        place, above = _find_bin(k, memory)
        if place < 0:
            above = count_above(pieces, floor)
            threshold = floor
        else:
            members = _read(memory + 4 * place)
            if members > 64:
                least = tl.full((), float("inf"), tl.float32)
                greatest = tl.full((), -float("inf"), tl.float32)
                lows = tl.full(pieces[0].shape, float("inf"), tl.float32)
                highs = tl.full(pieces[0].shape, -float("inf"), tl.float32)
                for i in tl.static_range(len(pieces)):
                    inside = (_bin_of(pieces[i], low, scale) == place) & (pieces[i] >= low)
                    lows = tl.minimum(lows, tl.where(inside, pieces[i], float("inf")))
                    highs = tl.maximum(highs, tl.where(inside, pieces[i], -float("inf")))
                least, greatest = tl.reduce((lows, highs), 0, _extent)
                threshold = least
                if least == greatest:
                    members = tl.zeros_like(members)
                elif members > FEW:
                    threshold = float_of(threshold_key(pieces, k, k, least, (greatest - least) * 0.1))
                    above = count_above(pieces, threshold)
                    members = tl.zeros_like(members)
            if members > 0:
                for i in tl.static_range(len(pieces)):
                    inside = (_bin_of(pieces[i], low, scale) == place) & (pieces[i] >= low)
                    _append_if(memory + _COUNTER_AT, memory + _FEW_AT, pieces[i], inside)
                tl.debug_barrier()
                i = tl.arange(0, FEW)
                x = _read_float(memory + _FEW_AT + 4 * i)
                greater = tl.zeros_like(i)
                reached = tl.zeros_like(i)
                for j in range(members):
                    other = _read_float(memory + _FEW_AT + 4 * j)
                    greater += (other > x).to(tl.int32)
                    reached += (other >= x).to(tl.int32)
                it = (i < members) & (greater < k - above) & (reached >= k - above)
                _write_if(memory + _THRESHOLD_AT, x.to(tl.int32, bitcast=True), it)
                _write_if(memory + _ABOVE_AT, above + greater, it)
                tl.debug_barrier()
                threshold = _read_float(memory + _THRESHOLD_AT)
                above = _read(memory + _ABOVE_AT)
        tl.debug_barrier()  # what shared memory holds is read
    else:
        above = count_above(pieces, low)
    return threshold, above


@triton.jit
def _last_of(sums, memory):
    """The last value of a scan."""
    size: tl.constexpr = sums.shape[0]
    _write_if(memory + _TOTAL_AT, sums, tl.arange(0, size) == size - 1)
    tl.debug_barrier()
    return _read(memory + _TOTAL_AT)


@triton.jit
def mark_quads(pieces, threshold, memory):
    """A byte for every four scores: those above the threshold in the low half, equal ones in the high."""
    size: tl.constexpr = pieces[0].shape[0]
    bit = tl.arange(0, 4)[None, :]
    quad = tl.arange(0, size // 4)
    for i in tl.static_range(len(pieces)):
        x = tl.reshape(pieces[i], (size // 4, 4))
        above = tl.where(x > threshold, 1 << bit, 0)
        equal = tl.where(x == threshold, 16 << bit, 0)
        _write_byte(memory + _MARKS_AT + i * (size // 4) + quad, tl.sum(above | equal, 1))


@triton.jit
def _halves_joined(word):
    """The low halves of a word's four bytes, side by side."""
    word = word & 0x0F0F0F0F
    word = (word | (word >> 4)) & 0x00FF00FF
    return (word | (word >> 8)) & 0xFFFF


@triton.jit
def pages_of(first, seen, table, SIZE: tl.constexpr, TRANSLATE: tl.constexpr, PAGE: tl.constexpr):
    """Of every 32 positions from `first` on, what `store_quads` needs: loaded early, it is there in time."""
    position = first + tl.arange(0, SIZE // 32) * 32
    page = position
    if TRANSLATE:
        page = tl.load(table + position // PAGE, mask=position < seen, other=0).to(tl.int32)
    return page


@triton.jit
def store_quads(
    first, page, room, out, memory, BLOCK: tl.constexpr, TRANSLATE: tl.constexpr, PAGE: tl.constexpr
):
    """Write in order the positions or slots marked as above, and the first `room` of those marked as equal.
    Returns how many, and how much room is left."""
    index = tl.arange(0, BLOCK // 32)
    left = _read(memory + _MARKS_AT + 8 * index)
    right = _read(memory + _MARKS_AT + 8 * index + 4)
    above = _halves_joined(left) | (_halves_joined(right) << 16)
    equal = _halves_joined(left >> 4) | (_halves_joined(right >> 4) << 16)
    both = bits_in(above) + (bits_in(equal) << 16)
    before = tl.cumsum(both, 0)
    counts = _last_of(before, memory)
    before -= both
    equal_before = (before >> 16) & 0xFFFF
    allowed = tl.minimum(tl.maximum(room - equal_before, 0), (both >> 16) & 0xFFFF)
    chosen = above | _lowest_bits(equal, allowed)
    place = (before & 0xFFFF) + tl.minimum(equal_before, room)
    base = first + index * 32
    if TRANSLATE:
        base = page * PAGE + base % PAGE
    _store_bits(chosen, base, (out + place).to(tl.int64))
    equals = tl.minimum((counts >> 16) & 0xFFFF, room)
    return (counts & 0xFFFF) + equals, room - equals


@triton.jit
def mark_eights(x, first, threshold, memory):
    """A bit for every score of a tile from position `first` on: whether it reaches the threshold."""
    size: tl.constexpr = x.shape[0]
    bit = tl.arange(0, 8)[None, :]
    marks = tl.sum(tl.where(tl.reshape(x, (size // 8, 8)) >= threshold, 1 << bit, 0), 1)
    _write_byte(memory + _MARKS_AT + first // 8 + tl.arange(0, size // 8), marks)


@triton.jit
def words_of_marks(words, seen, memory, WORDS: tl.constexpr):
    return tl.where(words * 32 < seen, _read(memory + _MARKS_AT + 4 * tl.minimum(words, MARKS // 4 - 1)), 0)


@triton.jit
def keep_marked(word, first, memory, CANDIDATES: tl.constexpr):
    """Put the positions of all set bits, in order, where the marks were, if they are few enough; returns how
    many there are."""
    count = bits_in(word)
    place = tl.cumsum(count, 0)
    kept = _last_of(place, memory)
    place -= count
    if kept <= CANDIDATES:
        _keep_bits(word, first, memory + _MARKS_AT + 4 * place)
    tl.debug_barrier()
    return kept


@triton.jit
def kept_positions(index, kept, memory):
    return tl.where(index < kept, _read(memory + _MARKS_AT + 4 * index), 0)


@triton.jit
def _store_if(to, value, when):
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.b32 [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [to, value, when.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_kept(x, position, page, threshold, room, out, memory, TRANSLATE: tl.constexpr, PAGE: tl.constexpr):
    """As `store_selected`, in the layout that the scores have."""
    above = x > threshold
    equal = x == threshold
    both = above.to(tl.int32) + (equal.to(tl.int32) << 16)
    before = tl.cumsum(both, 0)
    counts = _last_of(before, memory)
    before -= both
    equal_before = (before >> 16) & 0xFFFF
    chosen = above | (equal & (equal_before < room))
    place = (before & 0xFFFF) + tl.minimum(equal_before, room)
    slot = position
    if TRANSLATE:
        slot = page * PAGE + position % PAGE
    _store_if((out + place).to(tl.int64), slot, chosen)
    return (counts & 0xFFFF) + tl.minimum((counts >> 16) & 0xFFFF, room)

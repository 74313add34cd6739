"""Tokens from logits, greedy and sampled rows together, in two to four launches whatever the rows ask for.

What a row draws is defined in `model/sampling.py`, which is the reference: float64 noise and scores, sums of
integers. Here scores are float32, of which only so much is claimed as their rounding allows: a token counts
as settled where every error within `_CLOSE` and `_SHARE` leaves it the winner, all others (some in 10,000)
are left to whoever knows the definition. So the tokens are the same on every device.

    look    each tile of the vocabulary: its largest logit, the largest of each of its groups, and of a row
            that draws from the whole vocabulary the largest score and the next
    bound   each row that is cut (by top-k, top-p or min-p): a bound that 512 groups reach, so at least as
            many logits do
    gather  each tile of such a row: its mass, and the logits that reach the bound: candidates, at most 2,048
    settle  each row: the token, and whether it is settled

Shapes: R rows, V vocabulary entries, P tiles, G groups of a row, C candidates.
"""

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import require
from kernels.jit import settle

_TILE = 2048
_MOST_GROUPS = 2048  # of a row; none is of two tiles
_CANDIDATES = 2048
_LEAST_CANDIDATES = tl.constexpr(512)
_MOST_WANTED = tl.constexpr(1024)  # by top-k; with more, too many candidates would find no place
_KEY_BITS = tl.constexpr(12)  # that a bound does without: fewer steps to find it, a few candidates more
_NOTHING = tl.constexpr(-2139095041 >> 12)  # -inf as such a bound
# Of two scores: scaled logits err by 1.2e-5 where they can win at all (above -41), noise by 1.5e-5.
_CLOSE = tl.constexpr(2.0**-14)
_SHARE = tl.constexpr(2.0**-15)  # of the mass: exp errs by 1e-5 in all but the lightest tokens
_EDGE = tl.constexpr(2.0**-20)  # of a scaled logit that is compared with min-p
_LN_2 = tl.constexpr(math.log(2.0))
_NO_TOKEN = tl.constexpr(2**31 - 1)

_TABLE_ROW = struct.Struct("=dddqqqq")
_COLUMNS = tl.constexpr(7)
_BELOW_ONE = 1 - 2**-24  # the largest that float32 has
_ALL = tl.constexpr(-1e30)  # as the logarithm of min-p; finite, so that its error is a number


class DrawParams(NamedTuple):
    """How a row is drawn.

    Args:
        temperature: 0 for the largest logit, whatever else is said; below 3e-39 nothing else is settled.
        top_k: 0 for all.
        top_p, min_p: as probabilities; 1 and 0 for all.
        seed: 64 bits as a signed number; choice, position: below 2**32.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    choice: int
    position: int


def draw_tokens(logits: Tensor, params: Sequence[DrawParams]) -> Tensor:
    """Draw a token a row, asking the device nothing.

    Args:
        logits: [R, V] float32, rows contiguous; -inf for what must not be drawn.
        params: R.

    Returns:
        [2, R] int64: tokens, -1 in rows that hold NaN or +inf or nothing finite; and 1 where the token is but
        a good guess.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    num_rows, vocab_size = logits.shape
    require(logits.dtype == torch.float32, "draw_tokens", f"logits are {logits.dtype}, not float32")
    require(logits.stride(1) == 1, "draw_tokens", "the logits of a row must be contiguous")
    require(len(params) == num_rows, "draw_tokens", f"{len(params)} params for {num_rows} rows")
    device, stride = logits.device, logits.stride(0)
    out = torch.empty(2, num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return out
    sampled = [row for row in params if row.temperature]
    is_cut = any(row.top_k or row.top_p < 1 or row.min_p for row in sampled)
    table = _table(params, vocab_size, device) if sampled else out  # any pointer: it is not read
    num_tiles = triton.cdiv(vocab_size, _TILE)
    group = triton.next_power_of_2(triton.cdiv(num_tiles * _TILE, _MOST_GROUPS))
    num_groups = num_tiles * (_TILE // group)
    tile_floats = torch.empty(4, num_rows, num_tiles, device=device)  # largest, score, next score, mass
    tile_tokens = torch.empty(2, num_rows, num_tiles, dtype=torch.int32, device=device)
    row_ints = torch.empty(num_rows, 2, dtype=torch.int32, device=device)  # bound, number of candidates
    row_bests = torch.empty(num_rows, device=device)
    groups = torch.empty(num_rows, num_groups if is_cut else 0, device=device)
    values = torch.empty(num_rows, _CANDIDATES if is_cut else 0, device=device)
    ids = torch.empty(values.shape, dtype=torch.int32, device=device)
    grid, size = (num_tiles, num_rows), {"TILE": _TILE, "GROUP": group}
    kind = {"SAMPLED": bool(sampled), "CUT": is_cut}
    kind["PTX"] = device.type == "cuda" and torch.version.cuda is not None  # the interpreter has none
    _look[grid](
        logits, table, tile_floats, tile_tokens, groups, stride, vocab_size, **size, **kind, num_warps=8
    )
    if is_cut:
        _bound[(num_rows,)](
            table, groups, row_bests, row_ints, num_groups, G=triton.next_power_of_2(num_groups), num_warps=8
        )
        _gather[grid](
            logits, table, row_bests, row_ints, tile_floats, values, ids, stride, vocab_size,
            **size, C=_CANDIDATES, num_warps=8,
        )  # fmt: skip
    _settle[(num_rows,)](
        table, tile_floats, tile_tokens, row_ints, values, ids, out, num_tiles, num_rows,
        P=triton.next_power_of_2(num_tiles), C=_CANDIDATES, **kind, num_warps=8 if is_cut else 4,
    )  # fmt: skip
    return out


def _table(params: Sequence[DrawParams], vocab_size: int, device: torch.device) -> Tensor:
    """[R, 7] int64, the first three float64 by their bits. One copy, which nobody waits for."""
    packed = bytearray()
    for row in params:
        packed += _TABLE_ROW.pack(
            1.0 / row.temperature if row.temperature else 0.0,
            min(row.top_p, _BELOW_ONE) if row.top_p < 1 else 1.0,
            math.log(row.min_p) if row.min_p else _ALL.value,
            row.top_k if row.top_k < vocab_size else 0,
            row.seed,
            row.choice,
            row.position,
        )
    table = torch.frombuffer(packed, dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
def _float(table, column: tl.constexpr):
    return tl.load(table + column).to(tl.float64, bitcast=True).to(tl.float32)


@triton.jit
def _is_cut(table):
    return (tl.load(table + 3) > 0) | (_float(table, 1) < 1.0) | (_float(table, 2) > _ALL)


@triton.jit
def _tokens_of_tile(tile, num_tiles, TILE: tl.constexpr, GROUP: tl.constexpr):
    """[GROUP, TILE / GROUP] int32, a group a column: all over the vocabulary, where neighbours are alike."""
    width: tl.constexpr = TILE // GROUP
    return tl.arange(0, GROUP)[:, None] * (num_tiles * width) + tile * width + tl.arange(0, width)[None, :]


@triton.jit
def _key(x):
    """int32 in the order of the floats; both zeros are one."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _cut(keys, weights, limit):
    """The least key from the least of these on above which the weights are together less than the limit."""
    low = tl.min(keys, 0).to(tl.int64)
    high = tl.max(keys, 0).to(tl.int64)
    while low < high:
        middle = (low + high) >> 1
        is_enough = tl.sum(tl.where(keys > middle, weights, 0.0), 0) < limit
        high = tl.where(is_enough, middle, high)
        low = tl.where(is_enough, low, middle + 1)
    return low


@triton.jit
def _log(x, PTX: tl.constexpr):
    """Of normal numbers, by one instruction where there is one."""
    if PTX:
        return _LN_2 * tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log(x)


@triton.jit
def _gumbel(table, token, PTX: tl.constexpr):
    """Noise as `model/noise.py` defines it, to within 1.5e-5.

    The uniform number is taken by its distance from the nearer of 0 and 1, which float32 holds.
    """
    seed = tl.load(table + 4)
    choice = tl.load(table + 5).to(tl.uint32)
    position = tl.load(table + 6).to(tl.uint32)
    high, low, _, _ = tl.philox(seed, token.to(tl.uint32), position, choice, 0)
    is_upper = high >= 0x80000000
    mask = tl.where(is_upper, 0xFFFFFFFF, 0).to(tl.uint32)
    distance = (high ^ mask).to(tl.float32) * 2.0**-32
    distance += (((low ^ mask) >> 12).to(tl.float32) + 0.5) * 2.0**-52
    series = 1.0 / 3 + distance * (0.25 + distance * 0.2)
    series = distance * (1.0 + distance * (0.5 + distance * series))  # -log(1 - distance)
    exact = -_log(tl.where(is_upper, 1.0 - distance, distance), PTX)
    return -_log(tl.where(is_upper & (distance < 1.0 / 32), series, exact), PTX)


@triton.jit
def _largest(scores, tokens):
    """The largest score, the lowest of its tokens, and the largest score of the others."""
    best = tl.max(scores)
    token = tl.min(tl.where(scores == best, tokens, _NO_TOKEN))
    return best, token, tl.max(tl.where(tokens == token, -float("inf"), scores))


@triton.jit(do_not_specialize=["stride", "V"])
def _look(
    logits,  # [R, stride] f32
    table,  # [R, 7] i64
    tile_floats,  # [4, R, P] f32
    tile_tokens,  # [2, R, P] i32
    groups,  # [R, G] f32
    stride,
    V,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    SAMPLED: tl.constexpr,  # not all rows are greedy
    CUT: tl.constexpr,  # some are cut
    PTX: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles, num_rows = tl.num_programs(0), tl.num_programs(1)
    place, part = row * num_tiles + tile, num_rows.to(tl.int64) * num_tiles
    token = _tokens_of_tile(tile, num_tiles, TILE, GROUP)
    x = tl.load(logits + row * stride + token, mask=token < V, other=-float("inf"))
    x = tl.where(x != x, float("inf"), x)  # so that it wins
    best = tl.max(x)
    tl.store(tile_floats + place, best)
    tl.store(tile_tokens + place, tl.min(tl.where(x == best, token, _NO_TOKEN)))
    if CUT:
        width: tl.constexpr = TILE // GROUP
        tl.store(groups + place * width + tl.arange(0, width), tl.max(x, 0))
    if SAMPLED:
        params = table + row * _COLUMNS
        inverse = _float(params, 0)
        if (inverse > 0.0) & (_is_cut(params) == 0):
            # Against the tile's own largest logit: that of the row is not known yet.
            scaled = tl.where(x > -float("inf"), (x - best) * inverse, -float("inf"))
            score, at, next_score = _largest(scaled + _gumbel(params, token, PTX), token)
            tl.store(tile_floats + part + place, score)
            tl.store(tile_floats + 2 * part + place, next_score)
            tl.store(tile_tokens + part + place, at)


@triton.jit(do_not_specialize=["num_groups"])
def _bound(
    table,  # [R, 7] i64
    groups,  # [R, G] f32
    row_bests,  # [R] f32
    row_ints,  # [R, 2] i32
    num_groups,
    G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, G)
    group = tl.load(groups + row * num_groups + each, mask=each < num_groups, other=-float("inf"))
    wanted = tl.load(table + row * _COLUMNS + 3)
    wanted = tl.minimum(tl.maximum(wanted, _LEAST_CANDIDATES), _MOST_WANTED).to(tl.float32)
    bound = _cut(_key(group) >> _KEY_BITS, tl.full((G,), 1.0, tl.float32), wanted)
    tl.store(row_bests + row, tl.max(group))
    tl.store(row_ints + 2 * row, bound.to(tl.int32))
    tl.store(row_ints + 2 * row + 1, 0)


@triton.jit(do_not_specialize=["stride", "V"])
def _gather(
    logits,  # [R, stride] f32
    table,  # [R, 7] i64
    row_bests,  # [R] f32
    row_ints,  # [R, 2] i32
    tile_floats,  # [4, R, P] f32
    values,  # [R, C] f32
    ids,  # [R, C] i32
    stride,
    V,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
    C: tl.constexpr,
):
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    num_tiles, num_rows = tl.num_programs(0), tl.num_programs(1)
    params = table + row * _COLUMNS
    inverse = _float(params, 0)
    if (inverse > 0.0) & _is_cut(params):
        best, bound = tl.load(row_bests + row), tl.load(row_ints + 2 * row)
        token = _tokens_of_tile(tile, num_tiles, TILE, GROUP)
        x = tl.load(logits + row * stride + token, mask=token < V, other=-float("inf"))
        mass = tl.sum(tl.exp((x - best) * inverse))
        tl.store(tile_floats + (3 * num_rows + row) * num_tiles + tile, mass)
        is_candidate = ((_key(x) >> _KEY_BITS) >= bound) & (x > -float("inf"))
        counter = row_ints + 2 * row + 1 + token * 0
        to = tl.atomic_add(counter, 1, mask=is_candidate, sem="relaxed")
        is_kept = is_candidate & (to < C)
        tl.store(values + row * C + to, x, mask=is_kept)
        tl.store(ids + row * C + to, token, mask=is_kept)


@triton.jit(do_not_specialize=["num_tiles", "num_rows"])
def _settle(
    table,  # [R, 7] i64
    tile_floats,  # [4, R, P] f32
    tile_tokens,  # [2, R, P] i32
    row_ints,  # [R, 2] i32
    values,  # [R, C] f32
    ids,  # [R, C] i32
    out,  # [2, R] i64
    num_tiles,
    num_rows,
    P: tl.constexpr,
    C: tl.constexpr,
    SAMPLED: tl.constexpr,
    CUT: tl.constexpr,
    PTX: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = num_rows.to(tl.int64) * num_tiles
    tile = tl.arange(0, P)
    is_tile = tile < num_tiles
    place = row * num_tiles + tile
    largest = tl.load(tile_floats + place, mask=is_tile, other=-float("inf"))
    tokens = tl.load(tile_tokens + place, mask=is_tile, other=_NO_TOKEN)
    best, token, _ = _largest(largest, tokens)
    is_settled = best == best
    if SAMPLED:
        params = table + row * _COLUMNS
        inverse = _float(params, 0)
        if inverse > 0.0:
            is_cut = _is_cut(params)
            if CUT and is_cut:
                mass = tl.sum(tl.load(tile_floats + 3 * part + place, mask=is_tile, other=0.0), 0)
                token, is_settled = _drawn_of_candidates(
                    params, values + row * C, ids + row * C, row_ints + 2 * row, mass, best, inverse, C, PTX
                )
            else:
                scores = tl.load(tile_floats + part + place, mask=is_tile, other=-float("inf"))
                next_scores = tl.load(tile_floats + 2 * part + place, mask=is_tile, other=-float("inf"))
                tokens = tl.load(tile_tokens + part + place, mask=is_tile, other=_NO_TOKEN)
                lower = tl.where(is_tile, (largest - best) * inverse, -float("inf"))
                score, token, next_score = _largest(scores + lower, tokens)
                own = tl.max(tl.where(tokens == token, next_scores + lower, -float("inf")), 0)
                is_settled = score - tl.maximum(next_score, own) > _CLOSE
    is_finite = (best > -float("inf")) & (best < float("inf"))
    token = tl.where(token < _NO_TOKEN, token, 0)  # of scores that float32 does not hold
    tl.store(out + row, tl.where(is_finite, token, -1).to(tl.int64))
    tl.store(out + num_rows + row, (is_finite & (is_settled == 0)).to(tl.int64))


@triton.jit
def _drawn_of_candidates(
    params,  # [7] i64
    values,  # [C] f32
    ids,  # [C] i32
    row_ints,  # [2] i32
    mass,  # of the vocabulary
    best,
    inverse,
    C: tl.constexpr,
    PTX: tl.constexpr,
):
    """A token of those that top-k, top-p and min-p may leave, and whether it is settled.

    Candidates are all logits from some value on, in any order. May be left: who stays with every error in his
    favour. The winner of these is settled if he would stay with every error, and every tie, against him.
    """
    top_p, min_p, top_k = _float(params, 1), _float(params, 2), tl.load(params + 3)
    most, count = top_k.to(tl.float32), tl.load(row_ints + 1)
    place = tl.arange(0, C)
    is_there = place < count
    x = tl.load(values + place, mask=is_there, other=-float("inf"))
    token = tl.load(ids + place, mask=is_there, other=_NO_TOKEN)
    key, scaled, ones = _key(x), (x - best) * inverse, is_there.to(tl.float32)
    masses = tl.where(is_there, tl.exp(scaled), 0.0)
    may_stay = is_there & (scaled >= min_p * (1.0 + _EDGE))
    # Whether nothing stays that is no candidate.
    is_complete = tl.min(tl.where(is_there, scaled, 0.0), 0) < min_p * (1.0 + _EDGE)
    if top_k > 0:
        last = _cut(key, ones, most)
        may_stay &= key >= last
        above, of_last = tl.where(key > last, ones, 0.0), tl.where(key == last, masses, 0.0)
        room = tl.minimum(most - tl.sum(above, 0), tl.sum(tl.where(key == last, ones, 0.0), 0))
        mass = tl.sum(above * masses, 0) + room * tl.max(of_last, 0)
        is_complete = count >= top_k
    needed, error = mass * top_p, mass * _SHARE
    if top_p < 1.0:
        may_stay &= key >= _cut(key, masses, needed + error)
        is_complete |= (top_k == 0) & (tl.sum(masses, 0) >= needed + error)
    is_complete = (is_complete | (tl.load(row_ints) == _NOTHING)) & (count <= C)
    scores = tl.where(may_stay, scaled + _gumbel(params, token, PTX), -float("inf"))
    score, winner, next_score = _largest(scores, token)
    is_winner = token == winner
    reach = key >= tl.max(tl.where(is_winner, key, -0x80000000), 0)
    rank = tl.sum(tl.where(reach, ones, 0.0), 0)  # of the last of those that equal it, from 1 on
    before = tl.sum(tl.where(reach & (is_winner == 0), masses, 0.0), 0)
    stays = (top_k == 0) | (rank <= most)
    stays &= (top_p == 1.0) | (rank == 1.0) | (before < needed - error)
    stays &= tl.max(tl.where(is_winner, scaled, -float("inf")), 0) >= min_p * (1.0 - _EDGE)
    return winner, is_complete & stays & (score - next_score > _CLOSE)


settle(_look, _bound, _gather, _settle)

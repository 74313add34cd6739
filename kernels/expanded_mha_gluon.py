"""`expanded_mha` for NVIDIA Hopper alone, in Gluon: a warp fetches, two warp groups attend, 64 queries each.

The fetching warp takes pieces of work (128 queries of a head) off a counter until none is left and runs ahead
over their ends. A warp group issues the scores of the next tile of keys before the weighted sum of the last
one, and does its softmax while the latter runs; weights stay in registers. Keys go from the last visible
ones down, as only these need comparing with limits.
Shapes: T queries, H heads, L keys, N qk_nope_head_dim, R rotated channels, V v_head_dim, K chosen, W words.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.device import num_sms
from kernels.gluon_layouts import stored_layout
from kernels.latent_tiles import LOG2_E
from kernels.softmax_gluon import by_word, hide, in_pairs, operand, packed, seen_bits, weigh

_ROWS = 64  # queries of a warp group
_KEYS = 128  # of a tile: with two stages of them and the queries shared memory is full
_STAGES = 2
_HEADS = 8  # that are walked together, so that the programs of a head find its keys in L2


def launch_gluon(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    visible: Tensor,
    mask: Tensor | None,
    num_chosen: int,
    out: Tensor,
    scale: float,
) -> None:
    """Fill out [T, H, V]; mask: [T, W] int32 bits of chosen keys, of rows that see more than num_chosen."""
    num_rows, num_heads, nope_dim = q_nope.shape
    num_keys, rope_dim = k_pe.shape
    pieces = triton.cdiv(num_rows, 2 * _ROWS) * num_heads
    _attend[(min(pieces, num_sms(out.device)),)](
        _described(by_head(q_nope), _ROWS, nope_dim),
        _described(by_head(q_pe), _ROWS, rope_dim),
        _described(by_head(k_nope), _KEYS, nope_dim),
        _described(k_pe, _KEYS, rope_dim),
        _described(by_head(v), _KEYS, v.shape[2]),
        visible,
        visible if mask is None else mask,
        out,
        torch.zeros(1, dtype=torch.int32, device=out.device),
        scale * LOG2_E,
        num_rows,
        num_heads,
        num_keys,
        num_chosen,
        pieces,
        q_nope.stride(1),
        q_pe.stride(1),
        k_nope.stride(1),
        v.stride(1),
        visible.stride(0),
        0 if mask is None else mask.stride(0),
        N=nope_dim,
        R=rope_dim,
        V=v.shape[2],
        KEYS=_KEYS,
        STAGES=_STAGES,
        HEADS=_HEADS,
        MASKED=mask is not None,
        num_warps=4,
    )


def by_head(heads: Tensor) -> Tensor:
    """[*, H, channels] as a matrix in which a head begins at a multiple of its stride."""
    length, num_heads, channels = heads.shape
    width = (num_heads - 1) * heads.stride(1) + channels
    return heads.as_strided((length, width), (heads.stride(0), 1))


def _described(matrix: Tensor, rows: int, channels: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, channels], gl.bfloat16)
    return TensorDescriptor.from_tensor(matrix, [rows, channels], layout)


@gluon.jit
def _piece(
    work, T, H, visible, visible_stride, L, HEADS: gl.constexpr, ROWS: gl.constexpr, KEYS: gl.constexpr
):
    """A piece's head, first query and number of key tiles: those with most keys first among HEADS heads."""
    blocks = gl.cdiv(T, 2 * ROWS)
    first_head = work // (HEADS * blocks) * HEADS
    heads = gl.minimum(H - first_head, HEADS)
    place = work % (HEADS * blocks)
    head = first_head + place % heads
    row = (blocks - 1 - place // heads) * (2 * ROWS)
    last = gl.minimum(row + 2 * ROWS, T) - 1
    end = gl.minimum(gl.load(visible + last.to(gl.int64) * visible_stride).to(gl.int32), L)
    return head, row, gl.maximum(gl.cdiv(end, KEYS), 1)


@gluon.jit
def _produce(
    sources, shape, visible, counter, q_tiles, k_tiles, q_barriers, k_barriers, N: gl.constexpr,
    R: gl.constexpr, V: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr,
    ROWS: gl.constexpr,
):  # fmt: skip
    q_nope, q_pe, k_nope, k_pe, v, q_nope_head, q_pe_head, k_nope_head, v_head = sources
    T, H, L, pieces, visible_stride = shape[0], shape[1], shape[2], shape[4], shape[5]
    qn_tiles, qp_tiles, told = q_tiles
    kn_tiles, kp_tiles, v_tiles = k_tiles
    q_ready, q_free = q_barriers
    k_ready, k_free, v_ready, v_free = k_barriers
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    turn = 0
    work = gl.program_id(0)
    while work < pieces:
        ahead = gl.num_programs(0) + gl.atomic_add(counter, 1, sem="relaxed")
        head, row, tiles = _piece(work, T, H, visible, visible_stride, L, HEADS, ROWS, KEYS)
        # A buffer's first use waits for the phase before the first, which counts as over.
        mbarrier.wait(q_free, (turn & 1) ^ 1)
        told.store(gl.full([1], work, gl.int32, ONE))
        mbarrier.expect(q_ready, 2 * ROWS * (N + R) * 2)
        for half in gl.static_range(2):
            first = row + half * ROWS
            tma.async_copy_global_to_shared(
                q_nope, [first, head * q_nope_head], q_ready, qn_tiles.index(half)
            )
            tma.async_copy_global_to_shared(q_pe, [first, head * q_pe_head], q_ready, qp_tiles.index(half))
        turn += 1
        for tile in range(tiles):
            stage = step % STAGES
            phase = ((step // STAGES) & 1) ^ 1
            start = (tiles - 1 - tile) * KEYS
            mbarrier.wait(k_free.index(stage), phase)
            landed = k_ready.index(stage)
            mbarrier.expect(landed, KEYS * (N + R) * 2)
            tma.async_copy_global_to_shared(
                k_nope, [start, head * k_nope_head], landed, kn_tiles.index(stage)
            )
            tma.async_copy_global_to_shared(k_pe, [start, 0], landed, kp_tiles.index(stage))
            mbarrier.wait(v_free.index(stage), phase)
            landed = v_ready.index(stage)
            mbarrier.expect(landed, KEYS * V * 2)
            tma.async_copy_global_to_shared(v, [start, head * v_head], landed, v_tiles.index(stage))
            step += 1
        work = ahead
    mbarrier.wait(q_free, (turn & 1) ^ 1)
    told.store(gl.full([1], work, gl.int32, ONE))
    mbarrier.arrive(q_ready)


@gluon.jit
def _score(q_tiles, k_tiles, k_ready, stage, phase, half: gl.constexpr, nothing):
    qn_tiles, qp_tiles = q_tiles[0], q_tiles[1]
    kn_tiles, kp_tiles = k_tiles[0], k_tiles[1]
    mbarrier.wait(k_ready.index(stage), phase)
    token = warpgroup_mma(
        qn_tiles.index(half), kn_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
    )
    return warpgroup_mma(qp_tiles.index(half), kp_tiles.index(stage).permute((1, 0)), token, is_async=True)


@gluon.jit
def _further(
    step, tile, tiles, state, where, q_tiles, k_tiles, k_barriers, mask, scale, nothing,
    half: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HIDE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Scores of a tile beside the weighted sum over the one before; then the tile's weights."""
    acc, words, row_max, row_sum = state
    k_ready, k_free, v_ready, v_free = k_barriers
    v_tiles = k_tiles[2]
    weights = operand(words, gl.DotOperandLayout(0, acc.type.layout, 2))
    stage, last = step % STAGES, (step - 1) % STAGES
    token = _score(q_tiles, k_tiles, k_ready, stage, (step // STAGES) & 1, half, nothing)
    total = warpgroup_mma(weights, v_tiles.index(last), acc, is_async=True)
    if HIDE:
        bits = seen_bits((tiles - 1 - tile) * KEYS, where, mask, nothing, MASKED)
    scores = warpgroup_mma_wait(1, deps=[token])
    mbarrier.arrive(k_free.index(stage))
    if HIDE:
        scores = hide(scores, bits)
    pairs, row_max, row_sum, shrink = weigh(scores, row_max, row_sum, scale)
    # Waited for here, a loop that ptxas does not move the softmax over: it would, to behind the next line.
    mbarrier.wait(v_ready.index(stage), (step // STAGES) & 1)
    acc, words = warpgroup_mma_wait(0, deps=[total, words])  # read until now
    mbarrier.arrive(v_free.index(last))
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    # Only now: what ptxas sees made for a product while another is under way makes it run them one by one.
    return acc, packed(pairs), row_max, row_sum


@gluon.jit
def _consume(
    half: gl.constexpr, shape, visible, mask, out, scale, q_tiles, k_tiles, q_barriers, k_barriers,
    V: gl.constexpr, KEYS: gl.constexpr, STAGES: gl.constexpr, HEADS: gl.constexpr, ROWS: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """64 queries of every piece."""
    T, H, L, K, pieces, visible_stride, mask_stride = shape
    told, v_tiles = q_tiles[2], k_tiles[2]
    q_ready, q_free = q_barriers
    k_ready, k_free, v_ready, v_free = k_barriers
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, V, 16])
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    nothing = gl.zeros((ROWS, KEYS), gl.float32, SCORES)
    BY_ROW: gl.constexpr = gl.SliceLayout(1, in_pairs(nothing)[0].type.layout)
    BY_WORD: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, by_word(nothing).type.layout))
    nth = gl.arange(0, ROWS, layout=BY_WORD)
    step = 0
    turn = 0
    mbarrier.wait(q_ready, 0)
    work = gl.max(told.load(ONE), 0)
    while work < pieces:
        head, row, tiles = _piece(work, T, H, visible, visible_stride, L, HEADS, ROWS, KEYS)
        row += half * ROWS
        rows = gl.minimum(row + nth, T - 1)
        limits = gl.minimum(gl.load(visible + rows.to(gl.int64) * visible_stride).to(gl.int32), L)
        # What all rows see whole is not compared; nor chosen, where all that is seen is.
        fewest = gl.minimum(gl.load(visible + gl.minimum(row, T - 1).to(gl.int64) * visible_stride), L)
        hidden = tiles - fewest.to(gl.int32) // KEYS
        if MASKED:
            most = gl.load(visible + gl.minimum(row + ROWS, T).to(gl.int64) * visible_stride - visible_stride)
            hidden = gl.where(most > K, tiles, hidden)
            # A row that sees more than it may choose counts by its mask, which is zero for the others.
            limits = gl.where(limits > K, 0, limits)
        where = (limits, rows * mask_stride)
        token = _score(q_tiles, k_tiles, k_ready, step % STAGES, (step // STAGES) & 1, half, nothing)
        bits = seen_bits((tiles - 1) * KEYS, where, mask, nothing, MASKED)
        scores = hide(warpgroup_mma_wait(0, deps=[token]), bits)
        mbarrier.arrive(k_free.index(step % STAGES))
        row_max = gl.full((ROWS,), float("-inf"), gl.float32, BY_ROW)
        row_sum = gl.zeros((ROWS,), gl.float32, BY_ROW)
        pairs, row_max, row_sum, _ = weigh(scores, row_max, row_sum, scale)
        words = packed(pairs)
        acc = gl.zeros((ROWS, V), gl.float32, OUT)
        mbarrier.wait(v_ready.index(step % STAGES), (step // STAGES) & 1)
        step += 1
        for tile in range(1, gl.minimum(hidden, tiles)):
            acc, words, row_max, row_sum = _further(
                step, tile, tiles, (acc, words, row_max, row_sum), where, q_tiles, k_tiles, k_barriers,
                mask, scale, nothing, half, KEYS, STAGES, True, MASKED,
            )  # fmt: skip
            step += 1
        for tile in range(gl.maximum(hidden, 1), tiles):
            acc, words, row_max, row_sum = _further(
                step, tile, tiles, (acc, words, row_max, row_sum), where, q_tiles, k_tiles, k_barriers,
                mask, scale, nothing, half, KEYS, STAGES, False, MASKED,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_free)
        last = (step - 1) % STAGES
        weights = operand(words, gl.DotOperandLayout(0, OUT, 2))
        total = warpgroup_mma(weights, v_tiles.index(last), acc, is_async=True)
        acc, words = warpgroup_mma_wait(0, deps=[total, words])
        mbarrier.arrive(v_free.index(last))
        share = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
        acc = acc * gl.convert_layout(share, gl.SliceLayout(1, OUT))[:, None]
        # Sixteen bytes a thread, which shuffles bring together.
        STORED: gl.constexpr = stored_layout(ROWS, V)
        rows = row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, STORED))
        columns = gl.arange(0, V, layout=gl.SliceLayout(0, STORED))
        at = out + (rows.to(gl.int64) * H + head)[:, None] * V + columns[None, :]
        gl.store(at, gl.convert_layout(acc.to(out.dtype.element_ty), STORED), mask=(rows < T)[:, None])
        turn += 1
        mbarrier.wait(q_ready, turn & 1)
        work = gl.max(told.load(ONE), 0)


@gluon.jit(do_not_specialize=["T", "L", "K", "pieces"])
def _attend(
    q_nope,  # [T, H * N], described by heads
    q_pe,
    k_nope,
    k_pe,  # [L, R]
    v,
    visible,  # [T]
    mask,  # [T, W], if MASKED
    out,  # [T, H, V]
    counter,  # [1], zero
    scale,
    T,
    H,
    L,
    K,
    pieces,
    q_nope_head,  # from one head to the next
    q_pe_head,
    k_nope_head,
    v_head,
    visible_stride,
    mask_stride,
    N: gl.constexpr,
    R: gl.constexpr,
    V: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    HEADS: gl.constexpr,
    MASKED: gl.constexpr,
):
    ROWS: gl.constexpr = 64  # what the queries' tiles are described with
    qn_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, N], q_nope.layout)
    qp_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, ROWS, R], q_pe.layout)
    kn_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, N], k_nope.layout)
    kp_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, R], k_pe.layout)
    v_tiles = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, V], v.layout)
    told = gl.allocate_shared_memory(gl.int32, [1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_free, count=2)  # both warp groups
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    gl.thread_barrier()

    sources = (q_nope, q_pe, k_nope, k_pe, v, q_nope_head, q_pe_head, k_nope_head, v_head)
    shape = (T, H, L, K, pieces, visible_stride, mask_stride)
    q_tiles = (qn_tiles, qp_tiles, told)
    k_tiles = (kn_tiles, kp_tiles, v_tiles)
    q_barriers = (q_ready, q_free)
    k_barriers = (k_ready, k_free, v_ready, v_free)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, shape, visible, mask, out, scale, q_tiles, k_tiles, q_barriers, k_barriers, V,
                    KEYS, STAGES, HEADS, ROWS, MASKED,
                ),
            ),
            (
                _consume,
                (
                    1, shape, visible, mask, out, scale, q_tiles, k_tiles, q_barriers, k_barriers, V,
                    KEYS, STAGES, HEADS, ROWS, MASKED,
                ),
            ),
            (
                _produce,
                (
                    sources, shape, visible, counter, q_tiles, k_tiles, q_barriers, k_barriers, N, R, V, KEYS,
                    STAGES, HEADS, ROWS,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip

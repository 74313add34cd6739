"""`sparse_mla_prefill` for NVIDIA Hopper alone, in Gluon: one group of warps gathers, two compute.

In plain Triton the warps that compute also fetch, and both warp groups compute the same scores, since 64
heads are the rows of one. Here four warps gather the next tile by asynchronous copies while eight compute:
the scores of half the keys each, then half the output's columns each. What passes between them are two
buffers and, for each, two barriers: `ready` (a tile has landed) and `free` (its last reader is done).
Shapes: T queries, H heads, K positions a query, L keys, C kv_lora_rank, R rotated channels.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from kernels.backend import require, require_aligned
from kernels.latent_tiles import LOG2_E, require_prefill

_OPERATION = "sparse_mla_prefill_gluon"
_HEADS = 64  # the rows of one warp group's products
_KEYS = 64  # of a tile: two tiles and the queries fill shared memory
PRODUCER_REGISTERS = 72  # what the gathering warps leave goes to those that hold the accumulator


def sparse_mla_prefill_gluon(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    """Attend to chosen positions; arguments and result as in `sparse_mla_prefill`, bf16 only."""
    require_prefill(_OPERATION, q, latents, positions, kv_lora_rank)
    require(q.dtype == torch.bfloat16, _OPERATION, f"queries must be bfloat16, not {q.dtype}")
    require_aligned(_OPERATION, latents=latents)
    rope_dim = q.shape[2] - kv_lora_rank
    require(
        kv_lora_rank <= 512 and rope_dim <= 64,
        _OPERATION,
        f"{kv_lora_rank} and {rope_dim} channels do not fit",
    )
    return _launch(q, latents, positions, scale, kv_lora_rank, PRODUCER_REGISTERS)


def _launch(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int, registers: int
) -> Tensor:
    num_rows, num_heads, _ = q.shape
    out = q.new_empty(num_rows, num_heads, kv_lora_rank)
    if out.numel() == 0:
        return out
    _prefill[(triton.cdiv(num_heads, _HEADS) * num_rows,)](
        q,
        latents,
        positions,
        out,
        scale * LOG2_E,
        num_heads,
        positions.shape[1],
        positions.stride(0),
        C=kv_lora_rank,
        R=q.shape[2] - kv_lora_rank,
        BLOCK_H=_HEADS,
        BLOCK_K=_KEYS,
        REGISTERS=registers,
        num_warps=8,
    )
    return out


@gluon.jit
def slots_of(row, at, end, PAGE: gl.constexpr, PAGED: gl.constexpr):
    """Slots at places of a row of slots or, PAGED, of pages; -1 beyond its end."""
    if PAGED:
        page = gl.load(row + at // PAGE, mask=at < end, other=0).to(gl.int32)
        slots = gl.where(at < end, page * PAGE + at % PAGE, -1)
    else:
        slots = gl.load(row + at, mask=at < end, other=-1).to(gl.int32)
    return slots


@gluon.jit
def count_tiles(begin, end, BLOCK_K: gl.constexpr):
    """At least one, perhaps of skipped keys."""
    return gl.maximum(gl.cdiv(end - begin, BLOCK_K), 1)


@gluon.jit
def produce(
    latents, row, begin, end, c_tiles, pe_tiles, ready, free,
    C: gl.constexpr, R: gl.constexpr, BLOCK_K: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    """Gather the row's slots [begin, end) into the two buffers, tile after tile.

    Eight threads fetch 128 bytes together. PAGED: row holds pages of BLOCK_K slots, and all are read.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    PE_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (R // 8), R // 8], [4, 1], [1, 0])
    channels = gl.arange(0, C, layout=gl.SliceLayout(0, LAYOUT))
    rotated = C + gl.arange(0, R, layout=gl.SliceLayout(0, PE_LAYOUT))
    keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, LAYOUT))
    ahead = slots_of(row, begin + keys, end, BLOCK_K, PAGED)
    for tile in range(count_tiles(begin, end, BLOCK_K)):
        here = ahead
        ahead = slots_of(row, begin + (tile + 1) * BLOCK_K + keys, end, BLOCK_K, PAGED)
        here_pe = gl.convert_layout(here, gl.SliceLayout(1, PE_LAYOUT))
        stage = tile % 2
        # A buffer's first use waits for the phase before the first, which counts as over.
        mbarrier.wait(free.index(stage), ((tile // 2) & 1) ^ 1)
        rows = latents + here.to(gl.int64)[:, None] * (C + R)
        async_copy.async_copy_global_to_shared(
            c_tiles.index(stage), rows + channels[None, :], mask=(here >= 0)[:, None]
        )
        rows_pe = latents + here_pe.to(gl.int64)[:, None] * (C + R)
        async_copy.async_copy_global_to_shared(
            pe_tiles.index(stage), rows_pe + rotated[None, :], mask=(here_pe >= 0)[:, None]
        )
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def seen_of(row, at, end, PAGED: gl.constexpr):
    """What is -1 where a tile's key is skipped."""
    return gl.where(at < end, 0, -1) if PAGED else gl.load(row + at, mask=at < end, other=-1)


@gluon.jit
def by_group(scores):
    """[M, K] as [M, 2, K / 2]: what each of two warp groups holds."""
    return scores.reshape([scores.shape[0], 2, scores.shape[1] // 2])


@gluon.jit
def weigh(scores, chosen, factor, acc, row_max, sums, weights_tile, maxima):
    """One step of the softmax: the weights of a tile of keys go to shared memory for both warp groups."""
    scores = gl.where((chosen >= 0)[None, :], scores * factor[:, None], float("-inf"))
    # Each warp group's own maximum, then both: Triton's reduction over warps has three barriers, this one.
    halves = gl.max(by_group(scores), 2)
    BOTH: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    maxima._reinterpret(gl.float32, [2, halves.shape[0]], BOTH).store(halves.permute((1, 0)))
    gl.thread_barrier()
    ROWS: gl.constexpr = row_max.type.layout
    new_max = gl.maximum(row_max, gl.maximum(maxima.index(0).load(ROWS), maxima.index(1).load(ROWS)))
    base = gl.where(new_max == float("-inf"), 0.0, new_max)
    weights = gl.exp2(scores - base[:, None])
    shrink = gl.exp2(row_max - base)
    weights_tile.store(weights.to(weights_tile.dtype))
    fence_async_shared()
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    gl.thread_barrier()  # both halves of the weights are there
    kept = gl.convert_layout(shrink, gl.SliceLayout(1, sums.type.layout))[:, None]
    return acc, new_max, sums * kept + gl.sum(by_group(weights), 2)


@gluon.jit
def consume(
    row, begin, end, q_c, q_pe, c_tiles, pe_tiles, weights_tile, maxima, ready, free, factor, out, log_sums,
    first, H, head_block, C: gl.constexpr, BLOCK_H: gl.constexpr, BLOCK_K: gl.constexpr, SPLIT: gl.constexpr,
    PAGED: gl.constexpr,
):  # fmt: skip
    """Scores, softmax and weighted sum over slots [begin, end) of a row, tile after tile, by two warp groups.

    factor: [BLOCK_H], what scores are multiplied by, log2(e) in it; first: row of `out` of the first head.
    """
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, BLOCK_K // 2, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    ROWS: gl.constexpr = gl.SliceLayout(1, SCORES)
    factor = gl.convert_layout(factor, ROWS)
    acc = gl.zeros((BLOCK_H, C), gl.float32, OUT)
    nothing = gl.zeros((BLOCK_H, BLOCK_K), gl.float32, SCORES)
    row_max = gl.full((BLOCK_H,), float("-inf"), gl.float32, ROWS)
    HALVES: gl.constexpr = gl.max(by_group(nothing), 2).type.layout
    sums = gl.zeros((BLOCK_H, 2), gl.float32, HALVES)  # of each warp group, added up at the end
    keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, SCORES))
    tiles = count_tiles(begin, end, BLOCK_K)
    chosen = seen_of(row, begin + keys, end, PAGED)
    mbarrier.wait(ready.index(0), 0)
    fence_async_shared()
    token = warpgroup_mma(q_c, c_tiles.index(0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    token = warpgroup_mma(q_pe, pe_tiles.index(0).permute((1, 0)), token, is_async=True)
    scores = warpgroup_mma_wait(0, deps=[token])
    for tile in range(1, tiles):
        # The tile before is weighed, then the tensor cores go on with this one's scores.
        stage, last = tile % 2, (tile + 1) % 2
        acc, row_max, sums = weigh(scores, chosen, factor, acc, row_max, sums, weights_tile, maxima)
        total = warpgroup_mma(weights_tile, c_tiles.index(last), acc, is_async=True)
        chosen = seen_of(row, begin + tile * BLOCK_K + keys, end, PAGED)
        mbarrier.wait(ready.index(stage), (tile // 2) & 1)
        fence_async_shared()
        token = warpgroup_mma(
            q_c, c_tiles.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True
        )
        token = warpgroup_mma(q_pe, pe_tiles.index(stage).permute((1, 0)), token, is_async=True)
        acc = warpgroup_mma_wait(2, deps=[total])  # the two just issued may still run
        # A wait is one warp group's own: the other may still be reading weights and tile.
        gl.thread_barrier()
        mbarrier.arrive(free.index(last))
        scores = warpgroup_mma_wait(0, deps=[token])
    acc, row_max, sums = weigh(scores, chosen, factor, acc, row_max, sums, weights_tile, maxima)
    token = warpgroup_mma(weights_tile, c_tiles.index((tiles - 1) % 2), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[token])
    row_sum = gl.convert_layout(gl.sum(sums, 1), ROWS)
    empty = row_sum == 0.0
    row_sum = gl.where(empty, 1.0, row_sum)
    acc = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUT))[:, None]
    heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, OUT))
    columns = gl.arange(0, C, layout=gl.SliceLayout(0, OUT))
    where = out + (first + heads.to(gl.int64))[:, None] * C + columns[None, :]
    gl.store(where, acc.to(out.dtype.element_ty), mask=(heads < H)[:, None])
    if SPLIT:
        heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=ROWS)
        log_sum = gl.where(empty, float("-inf"), row_max + gl.log2(row_sum))
        gl.store(log_sums + first + heads.to(gl.int64), log_sum, mask=heads < H)


@gluon.jit
def _prefill(
    q,  # [T, H, C + R]
    latents,  # [L, C + R]
    positions,  # [T, K]
    out,  # [T, H, C]
    scale,
    H,
    K,
    positions_stride,
    C: gl.constexpr,
    R: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_K: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    # The head blocks of a query run side by side and share its latents through L2.
    program = gl.program_id(0)
    head_blocks = gl.cdiv(H, BLOCK_H)
    t = (program // head_blocks).to(gl.int64)
    head_block = program % head_blocks
    kind: gl.constexpr = q.dtype.element_ty

    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    PE_LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (R // 8), R // 8], [8, 1], [1, 0])
    C_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, C], kind)
    PE_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, R], kind)
    W_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, BLOCK_K], kind)
    q_c = gl.allocate_shared_memory(kind, [BLOCK_H, C], C_SHARED)
    q_pe = gl.allocate_shared_memory(kind, [BLOCK_H, R], PE_SHARED)
    c_tiles = gl.allocate_shared_memory(kind, [2, BLOCK_K, C], C_SHARED)
    pe_tiles = gl.allocate_shared_memory(kind, [2, BLOCK_K, R], PE_SHARED)
    weights_tile = gl.allocate_shared_memory(kind, [BLOCK_H, BLOCK_K], W_SHARED)
    maxima = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(ready.index(stage), count=128)  # every gathering thread, when its copies have landed
        mbarrier.init(free.index(stage), count=1)

    heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LOADED))
    at = q + (t * H + heads)[:, None] * (C + R) + gl.arange(0, C, layout=gl.SliceLayout(0, LOADED))[None, :]
    q_c.store(gl.load(at, mask=(heads < H)[:, None], other=0.0))
    heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, PE_LOADED))
    rotated = C + gl.arange(0, R, layout=gl.SliceLayout(0, PE_LOADED))
    at = q + (t * H + heads)[:, None] * (C + R) + rotated[None, :]
    q_pe.store(gl.load(at, mask=(heads < H)[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    factor = gl.full((BLOCK_H,), scale, gl.float32, gl.SliceLayout(1, LOADED))
    row = positions + t * positions_stride
    gl.warp_specialize(
        [
            (
                consume,
                (
                    row, 0, K, q_c, q_pe, c_tiles, pe_tiles, weights_tile, maxima, ready, free, factor,
                    out, out, t * H, H, head_block, C, BLOCK_H, BLOCK_K, False, False,
                ),
            ),
            (produce, (latents, row, 0, K, c_tiles, pe_tiles, ready, free, C, R, BLOCK_K, False)),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip

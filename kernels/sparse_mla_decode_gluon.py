"""`sparse_mla_decode` over FP8 records for NVIDIA Hopper alone, in Gluon: some warps widen, eight compute.

Widening is what limits this operation: done in between by the warps that compute, it stops the tensor cores.
Here other warps fetch records, widen them and lay them into one of two buffers while eight warps compute on
the other (`consume` of `sparse_mla_prefill_gluon`). They widen to fp16 and not to bf16: from e4m3 that is one
instruction for two values, to bf16 it is five. Scales are powers of two of at least 2^-22, so products are
exact within fp16's range: they become infinite above 65504 (a normalised latent stays below sqrt(C) times
its norm's weight) and are rounded to 2^-25 below 2^-14. Each head's query is brought into range by a power of
two, which its scores' factor undoes. k_pe, which nothing normalises, stays bf16.
Shapes: T queries, H heads, K slots a query, C = 512 kv_lora_rank, R = 64 rotated channels, P pages.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.backend import require, require_aligned
from kernels.device import num_sms
from kernels.latent_tiles import (
    LOG2_E,
    choose_splits,
    combine,
    is_full_size,
    make_partials,
    require_latents,
)
from kernels.sparse_mla_prefill_gluon import consume, count_tiles, slots_of

_OPERATION = "sparse_mla_decode_gluon"
_HEADS = 64  # the rows of one warp group's products
_KEYS = 64  # of a tile: two tiles and the queries fill shared memory
_RANK = 512


class WidenConfig(NamedTuple):
    """Who widens: warps, and their registers."""

    num_warps: int
    registers: int


# The best of a sweep on an H100 (2026-11-22).
# With more than 12 warps in all none may hold an accumulator of half the register file.
CONFIG = WidenConfig(4, 112)


def sparse_mla_decode_gluon(
    q: Tensor, latent_pages: Tensor, slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    """Attend to chosen slots; arguments and result as in `sparse_mla_decode`, full-size FP8 records only."""
    require(latent_pages.dtype == torch.uint8, _OPERATION, f"needs FP8 records, not {latent_pages.dtype}")
    require_gluon_latents(_OPERATION, q, latent_pages, kv_lora_rank)
    require(q.shape[0] == slots.shape[0], _OPERATION, f"{q.shape[0]} queries, {slots.shape[0]} slot rows")
    require(slots.stride(1) == 1 or slots.shape[1] <= 1, _OPERATION, "rows of slots must be contiguous")
    return _launch(q, latent_pages, slots, scale, CONFIG)


def require_gluon_latents(operation: str, q: Tensor, pages: Tensor, kv_lora_rank: int) -> None:
    """What both kernels of decode in Gluon need of queries and pages."""
    require_latents(operation, q, pages, kv_lora_rank)
    require_aligned(operation, pages=pages)
    require(q.dtype == torch.bfloat16, operation, f"queries must be bfloat16, not {q.dtype}")
    require(
        is_full_size(kv_lora_rank, q.shape[2] - kv_lora_rank),
        operation,
        f"serves full-size latents, not {kv_lora_rank} of {q.shape[2]} channels",
    )


def _launch(
    q: Tensor,
    latent_pages: Tensor,
    slots: Tensor,
    scale: float,
    config: WidenConfig,
    splits: int | None = None,
) -> Tensor:
    """`splits` only for measuring; the product leaves it to `choose_splits`."""
    num_rows, num_heads, _ = q.shape
    out = q.new_empty(num_rows, num_heads, _RANK)
    if out.numel() == 0:
        return out
    num_tiles = triton.cdiv(slots.shape[1], _KEYS)
    head_blocks = triton.cdiv(num_heads, _HEADS)
    if splits is None:
        splits = choose_splits(num_rows * head_blocks, num_tiles, num_sms(q.device))
    partials = make_partials(num_rows, splits, num_heads, _RANK, q.device) if splits > 1 else None
    _decode[(head_blocks * splits * num_rows,)](
        q,
        latent_pages,
        slots,
        out if partials is None else partials.out,
        out if partials is None else partials.log_sum,
        scale * LOG2_E,
        num_heads,
        slots.shape[1],
        slots.stride(0),
        splits,
        triton.cdiv(num_tiles, splits) * _KEYS,
        BLOCK_H=_HEADS,
        BLOCK_K=_KEYS,
        SPLIT=partials is not None,
        WIDENERS=config.num_warps,
        REGISTERS=config.registers,
        num_warps=8,
    )
    if partials is not None:
        combine(partials, out)
    return out


@gluon.jit
def fetch(records, here, words, FIRST: gl.constexpr):
    """A group of 128 channels of records in words of four, twice [K, 16] int32, and its scales [K]."""
    values = (records + FIRST).to(gl.pointer_type(gl.int32), bitcast=True)[:, None] + words[None, :]
    scales = (records + (512 + FIRST // 32)).to(gl.pointer_type(gl.float32), bitcast=True)
    there = here[:, None]
    left, right = gl.load(values, mask=there, other=0), gl.load(values + 16, mask=there, other=0)
    return left, right, gl.load(scales, mask=here, other=0.0)


@gluon.jit
def put(pairs, left, right, scales, FIRST: gl.constexpr):
    """Lay a fetched group into its tile of pairs of fp16, [K, 256] int32."""
    half = scales.to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    both = half | (half << 16)
    # In one store: Triton puts a barrier between two to the same tile.
    whole = gl.join(scaled(left, both), scaled(right, both)).permute((0, 2, 1))
    pairs.slice(FIRST // 2, 64, dim=1).store(whole.reshape([left.shape[0], 64]))


@gluon.jit
def scaled(words, scales):
    """Pairs of fp16, [K, 32] int32, of words of four e4m3 [K, 16], multiplied by pairs of scales [K]."""
    low, high = gl.inline_asm_elementwise(
        """
        {
            .reg .b16 first, second;
            mov.b32 {first, second}, $2;
            cvt.rn.f16x2.e4m3x2 $0, first;
            cvt.rn.f16x2.e4m3x2 $1, second;
            mul.rn.f16x2 $0, $0, $3;
            mul.rn.f16x2 $1, $1, $3;
        }
        """,
        "=&r,=&r,r,r",
        [words, scales[:, None]],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )
    return gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])


@gluon.jit
def widen(
    pages, row, begin, end, c_tiles, pe_tiles, ready, free, BLOCK_K: gl.constexpr, PAGED: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Fill the two buffers in turn with the row's slots [begin, end), widened to fp16.

    When a group of channels lies in its buffer, the group three further on is sent for, be it of the next
    tile: three are always under way, and no more,
    as registers would not hold them. PAGED: row holds pages of BLOCK_K slots, and all are read.
    """
    GROUP: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [WARPS, 1], [1, 0])  # 64 bytes of a row
    PE: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    keys = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(1, GROUP))
    words = gl.arange(0, 16, layout=gl.SliceLayout(0, GROUP))
    rotated = gl.arange(0, 64, layout=gl.SliceLayout(0, PE))
    halves = pages.to(gl.pointer_type(gl.bfloat16), bitcast=True) + 264
    PAIRS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, 256], gl.int32)
    pairs = c_tiles._reinterpret(gl.int32, [2, BLOCK_K, 256], PAIRS)
    slots = slots_of(row, begin + keys, end, BLOCK_K, PAGED)
    ahead = slots_of(row, begin + BLOCK_K + keys, end, BLOCK_K, PAGED)
    here = slots >= 0
    records = pages + slots.to(gl.int64) * 656
    l0, r0, s0 = fetch(records, here, words, 0)
    l1, r1, s1 = fetch(records, here, words, 128)
    l2, r2, s2 = fetch(records, here, words, 256)
    for tile in range(count_tiles(begin, end, BLOCK_K)):
        pe_slots = gl.convert_layout(slots, gl.SliceLayout(1, PE))
        pe_at = (halves + pe_slots.to(gl.int64) * 328)[:, None] + rotated[None, :]
        slots, present, current = ahead, here, records
        ahead = slots_of(row, begin + (tile + 2) * BLOCK_K + keys, end, BLOCK_K, PAGED)
        here = slots >= 0
        records = pages + slots.to(gl.int64) * 656
        stage = tile % 2
        # A buffer's first use waits for the phase before the first, which counts as over.
        mbarrier.wait(free.index(stage), ((tile // 2) & 1) ^ 1)
        async_copy.async_copy_global_to_shared(pe_tiles.index(stage), pe_at, mask=(pe_slots >= 0)[:, None])
        async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
        c_tile = pairs.index(stage)
        put(c_tile, l0, r0, s0, 0)
        l3, r3, s3 = fetch(current, present, words, 384)
        put(c_tile, l1, r1, s1, 128)
        l0, r0, s0 = fetch(records, here, words, 0)
        put(c_tile, l2, r2, s2, 256)
        l1, r1, s1 = fetch(records, here, words, 128)
        put(c_tile, l3, r3, s3, 384)
        l2, r2, s2 = fetch(records, here, words, 256)
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(ready.index(stage))
    async_copy.wait_group(0)


@gluon.jit
def place_query(q, first, heads, there, q_c, q_pe, C: gl.constexpr, R: gl.constexpr, LAYOUT: gl.constexpr):
    """Lay queries into shared memory, brought into fp16's range; returns what undoes that, [BLOCK_H].

    first: row of q of head 0; a head's greatest number comes to lie in [256, 512).
    """
    at = q + (first + heads)[:, None] * (C + R)
    channels = gl.arange(0, C, layout=gl.SliceLayout(0, LAYOUT))
    rotated = C + gl.arange(0, R, layout=gl.SliceLayout(0, LAYOUT))
    wide = gl.load(at + channels[None, :], mask=there[:, None], other=0.0).to(gl.float32)
    # Exponents are biased, as in fp32.
    exponent = (gl.max(gl.abs(wide), 1).to(gl.int32, bitcast=True) >> 23) & 0xFF
    up = gl.minimum(262 - exponent, 254)
    raised = (up << 23).to(gl.float32, bitcast=True)
    q_c.store((wide * raised[:, None]).to(gl.float16))
    pe = gl.load(at + rotated[None, :], mask=there[:, None], other=0.0).to(gl.float32)
    q_pe.store((pe * raised[:, None]).to(gl.bfloat16))
    return (gl.maximum(254 - up, 1) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _decode(
    q,  # [T, H, 576]
    pages,
    slots,  # [T, K]
    out,  # [T, H, 512], or with SPLIT [T, splits, H, 512] float32
    log_sums,  # [T, splits, H]
    scale,
    H,
    K,
    slots_stride,
    splits,
    split_keys,  # keys a split, a multiple of BLOCK_K
    BLOCK_H: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLIT: gl.constexpr,
    WIDENERS: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    # Programs that read the same latents run side by side and share them through L2.
    program = gl.program_id(0)
    head_blocks = gl.cdiv(H, BLOCK_H)
    head_block, split = program % head_blocks, (program // head_blocks) % splits
    t = (program // (head_blocks * splits)).to(gl.int64)
    C: gl.constexpr = 512
    R: gl.constexpr = 64

    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    C_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, C], gl.float16)
    PE_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, R], gl.bfloat16)
    W_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, BLOCK_K], gl.float16)
    q_c = gl.allocate_shared_memory(gl.float16, [BLOCK_H, C], C_SHARED)
    q_pe = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, R], PE_SHARED)
    c_tiles = gl.allocate_shared_memory(gl.float16, [2, BLOCK_K, C], C_SHARED)
    pe_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_K, R], PE_SHARED)
    weights_tile = gl.allocate_shared_memory(gl.float16, [BLOCK_H, BLOCK_K], W_SHARED)
    maxima = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        mbarrier.init(ready.index(stage), count=32 * WIDENERS + 1)  # threads' copies; values
        mbarrier.init(free.index(stage), count=1)

    heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LOADED))
    undo = place_query(q, t * H, heads, heads < H, q_c, q_pe, C, R, LOADED)
    fence_async_shared()
    gl.thread_barrier()

    row = slots + t * slots_stride
    begin = split * split_keys
    end = gl.minimum(begin + split_keys, K)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    row, begin, end, q_c, q_pe, c_tiles, pe_tiles, weights_tile, maxima, ready, free,
                    undo * scale, out, log_sums, (t * splits + split) * H, H, head_block, C, BLOCK_H,
                    BLOCK_K, SPLIT, False,
                ),
            ),
            (
                widen,
                (pages, row, begin, end, c_tiles, pe_tiles, ready, free, BLOCK_K, False, WIDENERS),
            ),
        ],
        [WIDENERS],
        [REGISTERS],
    )  # fmt: skip

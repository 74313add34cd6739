"""`dense_mla_decode` for NVIDIA Hopper, in Gluon, of the parts of the two kernels over chosen slots.

Full pages are gathered as in `sparse_mla_prefill_gluon`, FP8 records widened to fp16 as in
`sparse_mla_decode_gluon`, whose limits hold here too. A program serves 64 heads of one query and a split of
its keys; rows of one sequence share keys through L2.
Shapes: T queries, n rows a sequence, S sequences, H heads, C kv_lora_rank, R rotated channels, P pages.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from kernels.backend import require
from kernels.device import num_sms
from kernels.latent_tiles import LOG2_E, choose_splits, combine, make_partials
from kernels.sparse_mla_decode_gluon import CONFIG, WidenConfig, place_query, require_gluon_latents, widen
from kernels.sparse_mla_prefill_gluon import PRODUCER_REGISTERS, consume, produce

_OPERATION = "dense_mla_decode_gluon"
_HEADS = 64
_PAGE = 64  # keys of a tile, and of a page


def dense_mla_decode_gluon(
    q: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
    scale: float,
    kv_lora_rank: int,
) -> Tensor:
    """Attend to the visible keys; arguments and result as in `dense_mla_decode`."""
    require_gluon_latents(_OPERATION, q, latent_pages, kv_lora_rank)
    require(
        page_table.shape[0] * rows_per_sequence == q.shape[0] == visible.shape[0],
        _OPERATION,
        f"{q.shape[0]} queries, {visible.shape[0]} lengths, {page_table.shape[0]} x {rows_per_sequence} rows",
    )
    require(
        latent_pages.shape[1] == _PAGE, _OPERATION, f"serves pages of {_PAGE}, not {latent_pages.shape[1]}"
    )
    most = page_table.shape[1] * _PAGE
    require(max_visible <= most, _OPERATION, f"max_visible {max_visible}, but the table's pages hold {most}")
    contiguous = page_table.stride(1) == 1 or page_table.shape[1] <= 1
    require(contiguous, _OPERATION, "a row of the page table must be contiguous")
    return _launch(
        q, latent_pages, page_table, visible, rows_per_sequence, max_visible, scale, kv_lora_rank,
        _config_for(fp8=latent_pages.dtype == torch.uint8),
    )  # fmt: skip


def _config_for(*, fp8: bool) -> WidenConfig:
    return CONFIG if fp8 else WidenConfig(4, PRODUCER_REGISTERS)


def _launch(
    q: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    visible: Tensor,
    rows_per_sequence: int,
    max_visible: int,
    scale: float,
    kv_lora_rank: int,
    config: WidenConfig,
    splits: int | None = None,
) -> Tensor:
    """`splits` only for measuring; the product leaves it to `choose_splits`."""
    num_rows, num_heads, width = q.shape
    out = q.new_empty(num_rows, num_heads, kv_lora_rank)
    if out.numel() == 0:
        return out
    head_blocks = triton.cdiv(num_heads, _HEADS)
    if splits is None:
        num_tiles = max(1, triton.cdiv(max_visible, _PAGE))
        splits = choose_splits(num_rows * head_blocks, num_tiles, num_sms(q.device))
    partials = make_partials(num_rows, splits, num_heads, kv_lora_rank, q.device) if splits > 1 else None
    _decode[(head_blocks * splits * num_rows,)](
        q,
        latent_pages,
        page_table,
        visible,
        out if partials is None else partials.out,
        out if partials is None else partials.log_sum,
        scale * LOG2_E,
        num_heads,
        rows_per_sequence,
        page_table.stride(0),
        visible.stride(0),
        splits,
        C=kv_lora_rank,
        R=width - kv_lora_rank,
        BLOCK_H=_HEADS,
        BLOCK_K=_PAGE,
        SPLIT=partials is not None,
        FP8=latent_pages.dtype == torch.uint8,
        WARPS=config.num_warps,
        REGISTERS=config.registers,
        num_warps=8,
    )
    if partials is not None:
        combine(partials, out)
    return out


@gluon.jit
def _decode(
    q,  # [T, H, C + R]
    pages,
    page_table,  # [S, max_pages]
    visible,  # [T]
    out,  # [T, H, C], or with SPLIT [T, splits, H, C] float32
    log_sums,  # [T, splits, H]
    scale,
    H,
    n,
    table_stride,
    visible_stride,
    splits,
    C: gl.constexpr,
    R: gl.constexpr,
    BLOCK_H: gl.constexpr,
    BLOCK_K: gl.constexpr,
    SPLIT: gl.constexpr,
    FP8: gl.constexpr,
    WARPS: gl.constexpr,  # that fetch
    REGISTERS: gl.constexpr,
):
    program = gl.program_id(0)
    head_blocks = gl.cdiv(H, BLOCK_H)
    head_block, split = program % head_blocks, (program // head_blocks) % splits
    t = (program // (head_blocks * splits)).to(gl.int64)
    kind: gl.constexpr = gl.float16 if FP8 else gl.bfloat16

    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    PE_LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [32 // (R // 8), R // 8], [8, 1], [1, 0])
    C_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, C], kind)
    PE_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_K, R], gl.bfloat16)
    W_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, BLOCK_K], kind)
    q_c = gl.allocate_shared_memory(kind, [BLOCK_H, C], C_SHARED)
    q_pe = gl.allocate_shared_memory(gl.bfloat16, [BLOCK_H, R], PE_SHARED)
    c_tiles = gl.allocate_shared_memory(kind, [2, BLOCK_K, C], C_SHARED)
    pe_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, BLOCK_K, R], PE_SHARED)
    weights_tile = gl.allocate_shared_memory(kind, [BLOCK_H, BLOCK_K], W_SHARED)
    maxima = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(2):
        # Every fetching thread, when its copies have landed; the widened values.
        mbarrier.init(ready.index(stage), count=32 * WARPS + (1 if FP8 else 0))
        mbarrier.init(free.index(stage), count=1)

    heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, LOADED))
    if FP8:
        factor = scale * place_query(q, t * H, heads, heads < H, q_c, q_pe, C, R, LOADED)
    else:
        factor = gl.full((BLOCK_H,), scale, gl.float32, gl.SliceLayout(1, LOADED))
        at = (
            q
            + (t * H + heads)[:, None] * (C + R)
            + gl.arange(0, C, layout=gl.SliceLayout(0, LOADED))[None, :]
        )
        q_c.store(gl.load(at, mask=(heads < H)[:, None], other=0.0))
        heads = head_block * BLOCK_H + gl.arange(0, BLOCK_H, layout=gl.SliceLayout(1, PE_LOADED))
        rotated = C + gl.arange(0, R, layout=gl.SliceLayout(0, PE_LOADED))
        at = q + (t * H + heads)[:, None] * (C + R) + rotated[None, :]
        q_pe.store(gl.load(at, mask=(heads < H)[:, None], other=0.0))
    fence_async_shared()
    gl.thread_barrier()

    row = page_table + (t // n) * table_stride
    limit = gl.load(visible + t * visible_stride).to(gl.int32)
    share = gl.cdiv(gl.cdiv(limit, BLOCK_K), splits) * BLOCK_K
    begin = split * share
    end = gl.minimum(begin + share, limit)
    if FP8:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        row, begin, end, q_c, q_pe, c_tiles, pe_tiles, weights_tile, maxima, ready, free,
                        factor,
                        out, log_sums, (t * splits + split) * H, H, head_block, C, BLOCK_H, BLOCK_K, SPLIT,
                        True,
                    ),
                ),
                (widen, (pages, row, begin, end, c_tiles, pe_tiles, ready, free, BLOCK_K, True, WARPS)),
            ],
            [WARPS],
            [REGISTERS],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (
                    consume,
                    (
                        row, begin, end, q_c, q_pe, c_tiles, pe_tiles, weights_tile, maxima, ready, free,
                        factor,
                        out, log_sums, (t * splits + split) * H, H, head_block, C, BLOCK_H, BLOCK_K, SPLIT,
                        True,
                    ),
                ),
                (produce, (pages, row, begin, end, c_tiles, pe_tiles, ready, free, C, R, BLOCK_K, True)),
            ],
            [WARPS],
            [REGISTERS],
        )  # fmt: skip

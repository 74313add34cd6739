"""Absorbed multi-head latent attention over everything visible, for a few queries of each sequence: decode.

    out[t, h] = sum_p softmax_p(scale * q[t, h] . latent[p]) * c[p]      p < visible[t]
The rows of a sequence (its newest token and drafts) see nearly the same keys: rows and heads together are the
rows of a tile, so 4 rows of 16 heads read the keys once. A sequence's keys are split over programs.
On Hopper, full size has a kernel of its own where it gains (`dense_mla_decode_gluon.py`).
Shapes: T queries, n rows a sequence, S sequences, H heads, C kv_lora_rank, R rotated channels, P pages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.dense_mla import dense_mla_reference
from kernels.dense_mla_decode_gluon import dense_mla_decode_gluon
from kernels.device import is_hopper, num_sms
from kernels.latent_pages import unpack_latents_reference
from kernels.latent_tiles import (
    LOG2_E,
    TileConfig,
    attend_tile,
    choose_splits,
    combine,
    is_full_size,
    make_partials,
    read_query,
    read_tile,
    require_latents,
    write_result,
)

_OPERATION = "dense_mla_decode"


def dense_mla_decode(
    q: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
    scale: float,
    kv_lora_rank: int,
    backend: Backend,
) -> Tensor:
    """Attend to the first `visible[t]` keys of a row's sequence.

    Args:
        q: [T, H, C + R] bf16, contiguous; row t belongs to sequence t // n.
        latent_pages: [P, 64, record_bytes] uint8, or [P, 64, C + R] bf16; contiguous.
        page_table: [S, max_pages], any integer dtype, rows contiguous.
        visible: [T], any integer dtype; a row that sees nothing gives zeros.
        max_visible: no row sees more; what the grid is made for.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] bf16; softmax in fp32.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, _OPERATION)
    require_latents(_OPERATION, q, latent_pages, kv_lora_rank)
    require(
        page_table.shape[0] * rows_per_sequence == q.shape[0] == visible.shape[0],
        _OPERATION,
        f"{q.shape[0]} queries, {visible.shape[0]} lengths, {page_table.shape[0]} x {rows_per_sequence} rows",
    )
    most = page_table.shape[1] * latent_pages.shape[1]
    require(max_visible <= most, _OPERATION, f"max_visible {max_visible}, but the table's pages hold {most}")
    contiguous = page_table.stride(1) == 1 or page_table.shape[1] <= 1
    require(contiguous, _OPERATION, "a row of the page table must be contiguous")
    if backend == "reference":
        return dense_mla_decode_reference(
            q,
            latent_pages,
            page_table,
            visible,
            rows_per_sequence=rows_per_sequence,
            max_visible=max_visible,
            scale=scale,
            kv_lora_rank=kv_lora_rank,
        )
    require(q.dtype == torch.bfloat16, _OPERATION, f"queries must be bfloat16, not {q.dtype}")
    if _gluon_gains(q, latent_pages, rows_per_sequence, kv_lora_rank):
        return dense_mla_decode_gluon(
            q,
            latent_pages,
            page_table,
            visible,
            rows_per_sequence=rows_per_sequence,
            max_visible=max_visible,
            scale=scale,
            kv_lora_rank=kv_lora_rank,
        )
    config = _config_for(rows_per_sequence * q.shape[1], fp8=latent_pages.dtype == torch.uint8)
    aligned = latent_pages.shape[1] % config.block_keys == 0
    require(aligned, _OPERATION, f"pages of {latent_pages.shape[1]} are no multiple of {config.block_keys}")
    return _launch(
        q, latent_pages, page_table, visible, rows_per_sequence, max_visible, scale, kv_lora_rank, config
    )


def dense_mla_decode_reference(
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
    out = q.new_zeros(*q.shape[:2], kv_lora_rank)
    for sequence, pages in enumerate(page_table):
        first = sequence * rows_per_sequence
        for row in range(first, first + rows_per_sequence):
            if visible[row] == 0:
                continue
            used = pages[: -(-int(visible[row]) // latent_pages.shape[1])].long()
            latents = latent_pages[used].flatten(0, 1)
            if latents.dtype == torch.uint8:
                latents = unpack_latents_reference(latents, kv_lora_rank)
            latents = latents[: int(visible[row])]
            rows = slice(row, row + 1)
            out[rows] = dense_mla_reference(q[rows], latents, visible[rows], scale, kv_lora_rank)
    return out


def _gluon_gains(q: Tensor, latent_pages: Tensor, rows_per_sequence: int, kv_lora_rank: int) -> bool:
    """On Hopper, but where rows of few heads fill one tile between them: Gluon gives every row its own."""
    full_size = is_full_size(kv_lora_rank, q.shape[2] - kv_lora_rank) and latent_pages.shape[1] == 64
    fills = q.shape[1] >= 64 or rows_per_sequence == 1
    return full_size and fills and is_hopper(q.device)


def _config_for(rows: int, *, fp8: bool) -> TileConfig:
    """As for chosen slots: 64 rows fill the tensor cores, fewer wait for memory."""
    if rows <= 16:
        return TileConfig(16, 32, 4, 3, 2)
    return TileConfig(64, 64, 8, 2) if fp8 else TileConfig(64, 32, 8, 3)


def _launch(
    q: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    visible: Tensor,
    rows_per_sequence: int,
    max_visible: int,
    scale: float,
    kv_lora_rank: int,
    config: TileConfig,
    splits: int | None = None,
) -> Tensor:
    """`splits` only for measuring; the product leaves it to `choose_splits`."""
    num_rows, num_heads, width = q.shape
    out = q.new_empty(num_rows, num_heads, kv_lora_rank)
    if out.numel() == 0:
        return out
    num_tiles = max(1, triton.cdiv(max_visible, config.block_keys))
    num_sequences, page_size = page_table.shape[0], latent_pages.shape[1]
    row_blocks = triton.cdiv(rows_per_sequence * num_heads, config.block_rows)
    if splits is None:
        room = num_sms(q.device) * config.programs_per_sm
        splits = choose_splits(num_sequences * row_blocks, num_tiles, room)
    fp8 = latent_pages.dtype == torch.uint8
    partials = make_partials(num_rows, splits, num_heads, kv_lora_rank, q.device) if splits > 1 else None
    _decode[(row_blocks * splits * num_sequences,)](
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
        RECORD=latent_pages.shape[-1] if fp8 else 0,
        PAGE=page_size,
        BLOCK_M=config.block_rows,
        BLOCK_K=config.block_keys,
        ROWS=triton.next_power_of_2(rows_per_sequence),
        SPLIT=partials is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if partials is not None:
        combine(partials, out)
    return out


@triton.jit
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
    C: tl.constexpr,
    R: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,  # n, rounded up to a power of two
    SPLIT: tl.constexpr,
):
    program = tl.program_id(0)
    row_blocks = tl.cdiv(n * H, BLOCK_M)
    row_block, split = program % row_blocks, (program // row_blocks) % splits
    sequence = (program // (row_blocks * splits)).to(tl.int64)

    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)  # of the sequence's n * H
    there = rows < n * H
    t = sequence * n + rows // H
    limits = tl.load(visible + t * visible_stride, mask=there, other=0).to(tl.int32)
    drafts = tl.arange(0, ROWS)
    every = tl.load(visible + (sequence * n + drafts) * visible_stride, mask=drafts < n, other=0).to(tl.int32)
    # Tiles are shared out by the sequence's own length, the same for all of its row blocks.
    tiles = tl.cdiv(tl.cdiv(tl.max(every, 0), BLOCK_K), splits)
    begin = split * tiles * BLOCK_K
    end = tl.minimum(begin + tiles * BLOCK_K, tl.max(limits, 0))

    q_left, q_right, q_pe = read_query(q, sequence * n * H + rows, there, C, R)
    acc_left = tl.zeros((BLOCK_M, C // 2), tl.float32)
    acc_right = tl.zeros((BLOCK_M, C // 2), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    keys = tl.arange(0, BLOCK_K)
    table = page_table + sequence * table_stride
    # The next tile's page is carried along: a tile whose page was loaded in the same turn of the loop could
    # not be fetched ahead. A tile lies in one page.
    ahead = tl.load(table + begin // PAGE, mask=begin < end, other=0).to(tl.int64)
    for start in range(begin, end, BLOCK_K):
        page = ahead
        following = start + BLOCK_K
        ahead = tl.load(table + following // PAGE, mask=following < end, other=0).to(tl.int64)
        # The hint: Triton 3.6 takes such sums for multiples of 16, and loads of records that are none trap.
        slots = tl.multiple_of(tl.where(start + keys < end, page * PAGE + start % PAGE + keys, -1), 1)
        left, right, k_pe = read_tile(pages, slots, C, R, RECORD, q.dtype.element_ty)
        seen = (start + keys)[None, :] < limits[:, None]
        acc_left, acc_right, row_max, row_sum = attend_tile(
            acc_left, acc_right, row_max, row_sum, q_left, q_right, q_pe, left, right, k_pe, seen, scale
        )

    where = ((sequence * n + rows // H) * splits + split) * H + rows % H if SPLIT else sequence * n * H + rows
    write_result(out, log_sums, where, there, acc_left, acc_right, row_max, row_sum, C, SPLIT)

"""Absorbed multi-head latent attention over chosen slots of the pages, for few queries: decode.

All heads share one key a token, [c | k_pe], and its first part c is the value too:
    out[t, h] = sum_s softmax_s(scale * q[t, h] . latent[s]) * c[s]      s over the slots of row t
Few queries do not fill a GPU, so each one's slots are split over programs, which leave partial results that a
second kernel combines, always in the same order. Pages are FP8 records or bf16 (kernels/latent_pages.py).
On Hopper, full-size FP8 records have a kernel of their own (`sparse_mla_decode_gluon.py`).
Shapes: T queries, H heads, K slots a query, C kv_lora_rank, R rotated channels, P pages.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
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
from kernels.sparse_mla import sparse_mla_reference
from kernels.sparse_mla_decode_gluon import sparse_mla_decode_gluon

_OPERATION = "sparse_mla_decode"


def sparse_mla_decode(
    q: Tensor, latent_pages: Tensor, slots: Tensor, scale: float, kv_lora_rank: int, *, backend: Backend
) -> Tensor:
    """Attend to chosen slots.

    Args:
        q: [T, H, C + R] bf16, contiguous: absorbed q_nope, then q_pe.
        latent_pages: [P, 64, record_bytes] uint8, or [P, 64, C + R] bf16; contiguous.
        slots: [T, K] int32 or int64, rows contiguous; -1 skips, anywhere. A row of only -1 gives zeros.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] bf16; softmax in fp32.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, _OPERATION)
    require_latents(_OPERATION, q, latent_pages, kv_lora_rank)
    require(q.shape[0] == slots.shape[0], _OPERATION, f"{q.shape[0]} queries, {slots.shape[0]} slot rows")
    if backend == "reference":
        return sparse_mla_decode_reference(q, latent_pages, slots, scale, kv_lora_rank)
    require(q.dtype == torch.bfloat16, _OPERATION, f"queries must be bfloat16, not {q.dtype}")
    require(slots.stride(1) == 1 or slots.shape[1] <= 1, _OPERATION, "rows of slots must be contiguous")
    fp8 = latent_pages.dtype == torch.uint8
    if fp8 and is_full_size(kv_lora_rank, q.shape[2] - kv_lora_rank) and is_hopper(q.device):
        return sparse_mla_decode_gluon(q, latent_pages, slots, scale, kv_lora_rank)
    config = _config_for(q.shape[1], fp8=fp8)
    return _launch(q, latent_pages, slots, scale, kv_lora_rank, config)


def sparse_mla_decode_reference(
    q: Tensor, latent_pages: Tensor, slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    def read(chosen: Tensor) -> Tensor:
        rows = latent_pages.flatten(0, 1).index_select(0, chosen)
        return unpack_latents_reference(rows, kv_lora_rank) if rows.dtype == torch.uint8 else rows

    return sparse_mla_reference(q, read, slots.long(), scale, kv_lora_rank)


def _config_for(num_heads: int, *, fp8: bool) -> TileConfig:
    """64 heads fill the tensor cores' rows and, with 512 channels, the registers of 8 warps.

    Fewer heads wait for memory: small tiles, of which several fit an SM.
    """
    if num_heads <= 32:
        return TileConfig(16 if num_heads <= 16 else 32, 32, 4, 3, 2)
    return TileConfig(64, 64, 8, 2) if fp8 else TileConfig(64, 32, 8, 3)


def _launch(
    q: Tensor,
    latent_pages: Tensor,
    slots: Tensor,
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
    num_slots = slots.shape[1]
    num_tiles = triton.cdiv(num_slots, config.block_keys)
    head_blocks = triton.cdiv(num_heads, config.block_rows)
    if splits is None:
        room = num_sms(q.device) * config.programs_per_sm
        splits = choose_splits(num_rows * head_blocks, num_tiles, room)
    fp8 = latent_pages.dtype == torch.uint8
    partials = make_partials(num_rows, splits, num_heads, kv_lora_rank, q.device) if splits > 1 else None
    _decode[(head_blocks * splits * num_rows,)](
        q,
        latent_pages,
        slots,
        out if partials is None else partials.out,
        out if partials is None else partials.log_sum,
        scale * LOG2_E,
        num_heads,
        num_slots,
        slots.stride(0),
        splits,
        triton.cdiv(num_tiles, splits) * config.block_keys,
        C=kv_lora_rank,
        R=width - kv_lora_rank,
        RECORD=latent_pages.shape[-1] if fp8 else 0,
        BLOCK_H=config.block_rows,
        BLOCK_K=config.block_keys,
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
    slots,  # [T, K]
    out,  # [T, H, C], or with SPLIT [T, splits, H, C] float32
    log_sums,  # [T, splits, H]
    scale,
    H,
    K,
    slots_stride,
    splits,
    split_keys,  # keys a split, a multiple of BLOCK_K
    C: tl.constexpr,
    R: tl.constexpr,
    RECORD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    # Programs that read the same latents run side by side and share them through L2.
    program = tl.program_id(0)
    head_blocks = tl.cdiv(H, BLOCK_H)
    head_block, split = program % head_blocks, (program // head_blocks) % splits
    t = (program // (head_blocks * splits)).to(tl.int64)

    heads = head_block * BLOCK_H + tl.arange(0, BLOCK_H)
    q_left, q_right, q_pe = read_query(q, t * H + heads, heads < H, C, R)
    acc_left = tl.zeros((BLOCK_H, C // 2), tl.float32)
    acc_right = tl.zeros((BLOCK_H, C // 2), tl.float32)
    row_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_H,), tl.float32)

    begin = split * split_keys
    end = tl.minimum(begin + split_keys, K)
    keys = tl.arange(0, BLOCK_K)
    row = slots + t * slots_stride
    # The next tile's slots are carried along: latents whose slots were loaded in the same turn of the loop
    # could not be fetched ahead.
    ahead = tl.load(row + begin + keys, mask=begin + keys < end, other=-1)
    for start in range(begin, end, BLOCK_K):
        here = ahead
        following = start + BLOCK_K + keys
        ahead = tl.load(row + following, mask=following < end, other=-1)
        left, right, k_pe = read_tile(pages, here, C, R, RECORD, q.dtype.element_ty)
        seen = (here >= 0)[None, :]
        acc_left, acc_right, row_max, row_sum = attend_tile(
            acc_left, acc_right, row_max, row_sum, q_left, q_right, q_pe, left, right, k_pe, seen, scale
        )

    rows = (t * splits + split) * H + heads if SPLIT else t * H + heads
    write_result(out, log_sums, rows, heads < H, acc_left, acc_right, row_max, row_sum, C, SPLIT)

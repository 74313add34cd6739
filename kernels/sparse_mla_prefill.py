"""Absorbed multi-head latent attention over chosen positions of one sequence's widened latents: prefill.

The same sum as `sparse_mla_decode`; many queries fill the GPU, so nothing is split, and latents were widened
once for all queries by `gather_latents`, so tiles go from memory to the tensor cores as they are.
On Hopper, full size has a kernel of its own (`sparse_mla_prefill_gluon.py`).
Shapes: T queries, H heads, K positions a query, L keys, C kv_lora_rank, R rotated channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.device import is_hopper
from kernels.latent_tiles import (
    LOG2_E,
    TileConfig,
    attend_tile,
    is_full_size,
    read_query,
    read_tile,
    require_prefill,
    write_result,
)
from kernels.sparse_mla import sparse_mla_reference
from kernels.sparse_mla_prefill_gluon import sparse_mla_prefill_gluon

_OPERATION = "sparse_mla_prefill"


def sparse_mla_prefill(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int, *, backend: Backend
) -> Tensor:
    """Attend to chosen positions.

    Args:
        q: [T, H, C + R] bf16, contiguous: absorbed q_nope, then q_pe.
        latents: [L, C + R] bf16, contiguous, one sequence's in order of position.
        positions: [T, K] int32, rows contiguous; -1 skips, anywhere. A row of only -1 gives zeros.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] bf16; softmax in fp32.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, _OPERATION)
    require_prefill(_OPERATION, q, latents, positions, kv_lora_rank)
    if backend == "reference":
        return sparse_mla_prefill_reference(q, latents, positions, scale, kv_lora_rank)
    require(q.dtype == torch.bfloat16, _OPERATION, f"queries must be bfloat16, not {q.dtype}")
    if is_full_size(kv_lora_rank, q.shape[2] - kv_lora_rank) and is_hopper(q.device):
        return sparse_mla_prefill_gluon(q, latents, positions, scale, kv_lora_rank)
    return _launch(q, latents, positions, scale, kv_lora_rank, _config_for(q.shape[1]))


def sparse_mla_prefill_reference(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    return sparse_mla_reference(
        q, lambda chosen: latents.index_select(0, chosen), positions.long(), scale, kv_lora_rank
    )


def _config_for(num_heads: int) -> TileConfig:
    """64 heads fill the tensor cores' rows; with 32 keys a tile, registers suffice."""
    return TileConfig(16, 32, 4, 3) if num_heads <= 16 else TileConfig(64, 32, 8, 3)


def _launch(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int, config: TileConfig
) -> Tensor:
    num_rows, num_heads, width = q.shape
    out = q.new_empty(num_rows, num_heads, kv_lora_rank)
    if out.numel() == 0:
        return out
    _prefill[(triton.cdiv(num_heads, config.block_rows) * num_rows,)](
        q,
        latents,
        positions,
        out,
        scale * LOG2_E,
        num_heads,
        positions.shape[1],
        positions.stride(0),
        C=kv_lora_rank,
        R=width - kv_lora_rank,
        BLOCK_H=config.block_rows,
        BLOCK_K=config.block_keys,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit
def _prefill(
    q,  # [T, H, C + R]
    latents,  # [L, C + R]
    positions,  # [T, K]
    out,  # [T, H, C]
    scale,
    H,
    K,
    positions_stride,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # The head blocks of a query run side by side and share its latents through L2.
    program = tl.program_id(0)
    head_blocks = tl.cdiv(H, BLOCK_H)
    t = (program // head_blocks).to(tl.int64)
    heads = (program % head_blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    q_left, q_right, q_pe = read_query(q, t * H + heads, heads < H, C, R)
    acc_left = tl.zeros((BLOCK_H, C // 2), tl.float32)
    acc_right = tl.zeros((BLOCK_H, C // 2), tl.float32)
    row_max = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_H,), tl.float32)

    keys = tl.arange(0, BLOCK_K)
    row = positions + t * positions_stride
    ahead = tl.load(row + keys, mask=keys < K, other=-1)  # carried, so that latents can be fetched ahead
    for start in range(0, K, BLOCK_K):
        here = ahead
        following = start + BLOCK_K + keys
        ahead = tl.load(row + following, mask=following < K, other=-1)
        left, right, k_pe = read_tile(latents, here, C, R, 0, q.dtype.element_ty)
        seen = (here >= 0)[None, :]
        acc_left, acc_right, row_max, row_sum = attend_tile(
            acc_left, acc_right, row_max, row_sum, q_left, q_right, q_pe, left, right, k_pe, seen, scale
        )
    write_result(out, out, t * H + heads, heads < H, acc_left, acc_right, row_max, row_sum, C, False)

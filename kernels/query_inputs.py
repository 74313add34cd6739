"""From the projected queries to what scoring and absorbed attention read, in one launch.

    index queries   RoPE (halves) on the first R channels, Hadamard, quantised with one scale a head; the
                    scale and the indexer's constant are folded into the head weights
    MLA queries     RoPE (interleaved) of q_pe, written behind the place of the absorbed latent query
Every step rounds to bf16 where a tensor stands between two operations on the reference path.
Shapes: T rows, I index heads of D channels, H attention heads, C kv_lora_rank, R rotated channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.fp8_quant import FP8, quantize_reference
from kernels.hadamard import hadamard_reference
from kernels.jit import quantize_last, rotated_hadamard
from kernels.rope import apply_rope_reference


@dataclass(frozen=True)
class _Config:
    """Rows (token and head) that a program takes of either kind, how many such tiles of index queries one
    after the other, and the warps of every program; stages are of the loop over tiles."""

    index_rows: int
    index_tiles: int
    latent_rows: int
    num_warps: int
    num_stages: int


def query_inputs(
    index_q: Tensor,
    head_weights: Tensor,
    q_pe: Tensor,
    q_latent: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Rotate and quantise index queries; rotate q_pe into the last R channels of q_latent.

    Args:
        index_q: [T, I, D] bf16, a view of the projection: any strides but that of channels.
        head_weights: [T, I] float32, as projected.
        q_pe: [T, H, R] bf16, a view likewise.
        q_latent: [T, H, C + R] bf16; its last R channels are written, the others belong to somebody else.
        cos, sin: [T, R/2] float32.

    Returns:
        values [T, I, D] e4m3, and head weights [T, I] float32 times I^-0.5 D^-0.5 and the head's scale.
    """
    require_triton_or_reference(backend, "query_inputs")
    require(q_pe.shape[:2] == q_latent.shape[:2], "query_inputs", f"{q_pe.shape} and {q_latent.shape} differ")
    if backend == "reference":
        return query_inputs_reference(index_q, head_weights, q_pe, q_latent, cos, sin)
    rope_dim, rest = q_pe.shape[2], index_q.shape[2] - q_pe.shape[2]
    require(
        index_q.dtype == q_pe.dtype == q_latent.dtype == torch.bfloat16,
        "query_inputs",
        f"queries must be bf16, not {index_q.dtype}, {q_pe.dtype} and {q_latent.dtype}",
    )
    require(
        index_q.stride(2) == q_pe.stride(2) == q_latent.stride(2) == 1,
        "query_inputs",
        "the channels of a head must be contiguous",
    )
    require(
        rope_dim >= 32 and rest >= 16 and rest & (rest - 1) == 0 == rope_dim & (rope_dim - 1),
        "query_inputs",
        f"{index_q.shape[2]} channels, {rope_dim} of them rotated, make no tiles of 16",
    )
    require(
        cos.is_contiguous() and sin.is_contiguous() and cos.shape == (len(q_pe), rope_dim // 2),
        "query_inputs",
        f"angles {tuple(cos.shape)} of {len(q_pe)} rows of {rope_dim} channels",
    )
    require(head_weights.dtype == torch.float32, "query_inputs", f"head weights are {head_weights.dtype}")
    require(head_weights.stride(1) == 1, "query_inputs", "the head weights of a row must be contiguous")
    config = _config_for(index_q.shape[0])
    return _launch(index_q, head_weights, q_pe, q_latent, cos, sin, config)


def query_inputs_reference(
    index_q: Tensor, head_weights: Tensor, q_pe: Tensor, q_latent: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    rope_dim, (num_heads, dim) = q_pe.shape[2], index_q.shape[1:]
    q_latent[..., -rope_dim:] = apply_rope_reference(q_pe, cos, sin, interleaved=True)
    turned, rest = index_q.split([rope_dim, dim - rope_dim], dim=-1)
    rotated = torch.cat([apply_rope_reference(turned, cos, sin, interleaved=False), rest], dim=-1)
    values, scales = quantize_reference(hadamard_reference(rotated), dim)
    return values, head_weights * _constant(num_heads, dim) * scales.squeeze(-1)


def _constant(num_heads: int, dim: int) -> float:
    """What every score of the indexer is multiplied by."""
    return float(num_heads**-0.5 * dim**-0.5)


def _config_for(num_rows: int) -> _Config:
    """The signs of the Hadamard matrix are made once a program, so where there are programs enough each takes
    several tiles."""
    if num_rows <= 256:
        return _Config(index_rows=64, index_tiles=1, latent_rows=32, num_warps=4, num_stages=1)
    return _Config(index_rows=64, index_tiles=8, latent_rows=64, num_warps=4, num_stages=2)


def _launch(
    index_q: Tensor,
    head_weights: Tensor,
    q_pe: Tensor,
    q_latent: Tensor,
    cos: Tensor,
    sin: Tensor,
    config: _Config,
) -> tuple[Tensor, Tensor]:
    num_tokens, index_heads, dim = index_q.shape
    heads, rope_dim = q_pe.shape[1:]
    values = torch.empty(num_tokens, index_heads, dim, dtype=FP8, device=index_q.device)
    weights = torch.empty(num_tokens, index_heads, dtype=torch.float32, device=index_q.device)
    if num_tokens == 0:
        return values, weights
    index_programs = triton.cdiv(num_tokens * index_heads, config.index_rows * config.index_tiles)
    latent_programs = triton.cdiv(num_tokens * heads, config.latent_rows)
    _query_inputs[(index_programs + latent_programs,)](
        index_q,
        head_weights,
        q_pe,
        q_latent,
        cos,
        sin,
        values,
        weights,
        num_tokens,
        index_q.stride(0),
        index_q.stride(1),
        head_weights.stride(0),
        q_pe.stride(0),
        q_pe.stride(1),
        q_latent.stride(0),
        q_latent.stride(1),
        index_programs,
        _constant(index_heads, dim),
        dim**-0.5,
        INDEX_HEADS=index_heads,
        HEADS=heads,
        C=q_latent.shape[2] - rope_dim,
        R=rope_dim,
        D=dim,
        INDEX_ROWS=config.index_rows,
        INDEX_TILES=config.index_tiles,
        LATENT_ROWS=config.latent_rows,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return values, weights


@triton.jit
def _query_inputs(
    index_q_ptr,  # [T, I, D]
    head_weights_ptr,  # [T, I]
    q_pe_ptr,  # [T, H, R]
    q_latent_ptr,  # [T, H, C + R]
    cos_ptr,  # [T, R/2]
    sin_ptr,  # [T, R/2]
    values_ptr,  # [T, I, D]
    weights_ptr,  # [T, I]
    num_tokens,
    index_q_stride,
    index_head_stride,
    head_weights_stride,
    q_pe_stride,
    q_pe_head_stride,
    q_latent_stride,
    q_latent_head_stride,
    index_programs,
    constant,
    hadamard_scale,
    INDEX_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    INDEX_ROWS: tl.constexpr,
    INDEX_TILES: tl.constexpr,
    LATENT_ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < index_programs:
        for tile in range(INDEX_TILES):
            _quantize_index_queries(
                index_q_ptr, head_weights_ptr, cos_ptr, sin_ptr, values_ptr, weights_ptr,
                index_q_stride, index_head_stride, head_weights_stride,
                (program * INDEX_TILES + tile) * INDEX_ROWS, num_tokens * INDEX_HEADS, constant,
                hadamard_scale, INDEX_ROWS, INDEX_HEADS, R, D,
            )  # fmt: skip
    else:
        _rotate_q_pe(
            q_pe_ptr, q_latent_ptr + C, cos_ptr, sin_ptr, q_pe_stride, q_pe_head_stride, q_latent_stride,
            q_latent_head_stride, (program - index_programs) * LATENT_ROWS, num_tokens * HEADS,
            LATENT_ROWS, HEADS, R,
        )  # fmt: skip


@triton.jit
def _quantize_index_queries(
    q_ptr, head_weights_ptr, cos_ptr, sin_ptr, values_ptr, weights_ptr, q_stride, head_stride,
    head_weights_stride, first_row, num_rows, constant, hadamard_scale, ROWS: tl.constexpr,
    HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """A row is a head of a token."""
    half: tl.constexpr = R // 2
    pairs = tl.arange(0, half)
    others = R + tl.arange(0, D - R)
    flat = first_row + tl.arange(0, ROWS)
    valid = flat < num_rows
    mask = valid[:, None]
    tokens, heads = (flat // HEADS).to(tl.int64), flat % HEADS
    # Three parts, so that the halves of RoPE meet without moving between threads.
    q = (q_ptr + tokens * q_stride + heads * head_stride)[:, None]
    a = tl.load(q + pairs[None, :], mask=mask, other=0.0).to(tl.float32)
    b = tl.load(q + (half + pairs)[None, :], mask=mask, other=0.0).to(tl.float32)
    rest = tl.load(q + others[None, :], mask=mask, other=0.0).to(tl.float32)
    angles = tokens[:, None] * half + pairs[None, :]
    cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
    values, scales = quantize_last(rotated_hadamard(a, b, rest, cos, sin, hadamard_scale, R, D))
    tl.store(values_ptr + flat.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :], values, mask=mask)
    weights = tl.load(head_weights_ptr + tokens * head_weights_stride + heads, mask=valid, other=0.0)
    tl.store(weights_ptr + flat, weights * constant * scales, mask=valid)


@triton.jit
def _rotate_q_pe(
    q_pe_ptr, out_ptr, cos_ptr, sin_ptr, q_pe_stride, q_pe_head_stride, out_stride, out_head_stride,
    first_row, num_rows, ROWS: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """A row is a head of a token; out_ptr at the first rotated channel."""
    half: tl.constexpr = R // 2
    pairs = tl.arange(0, half)
    flat = first_row + tl.arange(0, ROWS)
    mask = (flat < num_rows)[:, None]
    tokens, heads = (flat // HEADS).to(tl.int64), flat % HEADS
    channels = pairs[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    q_pe = (q_pe_ptr + tokens * q_pe_stride + heads * q_pe_head_stride)[:, None, None]
    x = tl.load(q_pe + channels, mask=mask[:, :, None], other=0.0).to(tl.float32)
    angles = tokens[:, None] * half + pairs[None, :]
    cos = tl.load(cos_ptr + angles, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + angles, mask=mask, other=0.0)
    a, b = tl.split(x)
    turned = tl.join(a * cos - b * sin, a * sin + b * cos).to(tl.bfloat16)
    out = (out_ptr + tokens * out_stride + heads * out_head_stride)[:, None, None]
    tl.store(out + channels, turned, mask=mask[:, :, None])

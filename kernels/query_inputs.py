"""From the projected queries to what scoring and absorbed attention read, in one launch.

    index queries   RoPE (halves) on the first R channels, Hadamard, quantised with one scale a head; the
                    scale and the indexer's constant are folded into the head weights
    MLA queries     RoPE (interleaved) of q_pe, written behind the place of the absorbed latent query; with
                    the weight that absorbs q_nope, that query too, while the others run
Every step rounds to bf16 where a tensor stands between two operations on the reference path.
Shapes: T rows, I index heads of D channels, H attention heads, C kv_lora_rank, N qk_nope_head_dim, R rotated
channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.bf16_gemm import per_head_gemm_reference
from kernels.fp8_quant import FP8, quantize_reference
from kernels.hadamard import hadamard_reference
from kernels.jit import hadamard, quantize_last, rotate_halves, round_to_bf16, settle
from kernels.rope import apply_rope_reference


@dataclass(frozen=True)
class _Config:
    """Heads of one token that a program takes, of index queries or of the others; tokens and latent channels
    of one head where it absorbs; and its warps."""

    index_heads: int
    heads: int
    num_warps: int
    tokens: int = 16
    latents: int = 128


def query_inputs(
    index_q: Tensor,
    head_weights: Tensor,
    q: Tensor,
    q_latent: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_uk: Tensor | None = None,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Rotate and quantise index queries; rotate q_pe into the last R channels of q_latent.

    Args:
        index_q: [T, I, D] bf16, a view of the projection: any strides but that of channels.
        head_weights: [T, I] float32, as projected, those of a row contiguous.
        q: [T, H, N + R] bf16, a view likewise: q_nope, then q_pe.
        q_latent: [T, H, C + R] bf16; the last R channels are written, and the first C where w_uk is given.
        cos, sin: [T, R/2] float32, contiguous.
        w_uk: [H, C, N] bf16, contiguous, or None: somebody else absorbs, or nobody.

    Returns:
        values [T, I, D] e4m3, and head weights [T, I] float32 times I^-0.5 D^-0.5 and the head's scale.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, "query_inputs")
    require(q.shape[:2] == q_latent.shape[:2], "query_inputs", f"{q.shape} and {q_latent.shape} differ")
    rope_dim, dim = 2 * cos.shape[1], index_q.shape[2]
    absorbed = q.shape[1], q_latent.shape[2] - rope_dim, q.shape[2] - rope_dim
    require(
        w_uk is None or w_uk.shape == absorbed,
        "query_inputs",
        f"w_uk must be {absorbed}, not {() if w_uk is None else tuple(w_uk.shape)}",
    )
    if backend == "reference":
        return query_inputs_reference(index_q, head_weights, q, q_latent, cos, sin, w_uk)
    require(
        index_q.dtype == q.dtype == q_latent.dtype == torch.bfloat16,
        "query_inputs",
        f"queries must be bf16, not {index_q.dtype}, {q.dtype} and {q_latent.dtype}",
    )
    require(
        index_q.stride(2) == q.stride(2) == q_latent.stride(2) == 1,
        "query_inputs",
        "the channels of a head must be contiguous",
    )
    require(
        dim >= max(16, rope_dim) and rope_dim >= 2 and dim & (dim - 1) == 0 == rope_dim & (rope_dim - 1),
        "query_inputs",
        f"{dim} channels, {rope_dim} of them rotated, are no powers of two",
    )
    require(
        cos.is_contiguous() and sin.is_contiguous() and cos.shape == sin.shape == (len(q), rope_dim // 2),
        "query_inputs",
        f"angles {tuple(cos.shape)} of {len(q)} rows",
    )
    require(
        w_uk is None or (w_uk.is_contiguous() and absorbed[1] % 16 == absorbed[2] % 16 == 0),
        "query_inputs",
        f"w_uk {absorbed} must be contiguous and of multiples of 16",
    )
    require(
        len(index_q) == len(q) and head_weights.shape == index_q.shape[:2],
        "query_inputs",
        f"{len(index_q)} index queries and head weights {tuple(head_weights.shape)} of {len(q)} rows",
    )
    require(head_weights.dtype == torch.float32, "query_inputs", f"head weights are {head_weights.dtype}")
    require(head_weights.stride(1) == 1, "query_inputs", "the head weights of a row must be contiguous")
    config = _config_for(index_q.shape[0])
    return _launch(index_q, head_weights, q, q_latent, cos, sin, w_uk, config)


def query_inputs_reference(
    index_q: Tensor,
    head_weights: Tensor,
    q: Tensor,
    q_latent: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_uk: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    rope_dim, (num_heads, dim) = 2 * cos.shape[1], index_q.shape[1:]
    q_latent[..., -rope_dim:] = apply_rope_reference(q[..., -rope_dim:], cos, sin, interleaved=True)
    if w_uk is not None:
        q_latent[..., :-rope_dim] = per_head_gemm_reference(q[..., :-rope_dim], w_uk)
    turned, rest = index_q.split([rope_dim, dim - rope_dim], dim=-1)
    rotated = torch.cat([apply_rope_reference(turned, cos, sin, interleaved=False), rest], dim=-1)
    values, scales = quantize_reference(hadamard_reference(rotated), dim)
    return values, head_weights * _constant(num_heads, dim) * scales.squeeze(-1)


def _constant(num_heads: int, dim: int) -> float:
    """What every score of the indexer is multiplied by."""
    return float(num_heads**-0.5 * dim**-0.5)


def _config_for(num_rows: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100: few rows are spread over more programs, to be done soonest;
    with many a thread has four loads of 16 bytes on their way."""
    tokens = max(16, min(64, triton.next_power_of_2(num_rows)))
    if num_rows <= 256:
        return _Config(index_heads=8, heads=32, num_warps=4, tokens=tokens)
    return _Config(index_heads=32, heads=64, num_warps=4, tokens=tokens)


def _launch(
    index_q: Tensor,
    head_weights: Tensor,
    q: Tensor,
    q_latent: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_uk: Tensor | None,
    config: _Config,
) -> tuple[Tensor, Tensor]:
    num_tokens, index_heads, dim = index_q.shape
    heads, rope_dim = q.shape[1], 2 * cos.shape[1]
    nope_dim, latent_dim = q.shape[2] - rope_dim, q_latent.shape[2] - rope_dim
    values = torch.empty(num_tokens, index_heads, dim, dtype=FP8, device=index_q.device)
    weights = torch.empty(num_tokens, index_heads, dtype=torch.float32, device=index_q.device)
    if num_tokens == 0:
        return values, weights
    block_index = min(config.index_heads, triton.next_power_of_2(index_heads))
    block_heads = min(config.heads, triton.next_power_of_2(heads))
    parts = triton.cdiv(index_heads, block_index) + triton.cdiv(heads, block_heads)
    tiles = heads * triton.cdiv(latent_dim, config.latents) * triton.cdiv(num_tokens, config.tokens)
    absorbing = 0 if w_uk is None else tiles
    _query_inputs[(absorbing + num_tokens * parts,)](
        index_q,
        head_weights,
        q,
        q_latent,
        q if w_uk is None else w_uk,
        cos,
        sin,
        values,
        weights,
        index_q.stride(0),
        index_q.stride(1),
        head_weights.stride(0),
        q.stride(0),
        q.stride(1),
        q_latent.stride(0),
        q_latent.stride(1),
        num_tokens,
        absorbing,
        _constant(index_heads, dim),
        dim**-0.5,
        INDEX_HEADS=index_heads,
        HEADS=heads,
        C=latent_dim,
        N=nope_dim,
        R=rope_dim,
        D=dim,
        BLOCK_INDEX=block_index,
        BLOCK_HEADS=block_heads,
        TOKENS=config.tokens,
        LATENTS=min(config.latents, triton.next_power_of_2(latent_dim)),
        ABSORB=w_uk is not None,
        UPCAST=q.device.type == "cpu",  # the interpreter cannot multiply bf16
        num_warps=config.num_warps,
    )
    return values, weights


@triton.jit
def _query_inputs(
    index_q_ptr,  # [T, I, D]
    head_weights_ptr,  # [T, I]
    q_ptr,  # [T, H, N + R]
    q_latent_ptr,  # [T, H, C + R]
    w_uk_ptr,  # [H, C, N]
    cos_ptr,  # [T, R/2]
    sin_ptr,  # [T, R/2]
    values_ptr,  # [T, I, D]
    weights_ptr,  # [T, I]
    index_q_stride,
    index_head_stride,
    head_weights_stride,
    q_stride,
    q_head_stride,
    q_latent_stride,
    q_latent_head_stride,
    num_tokens,
    absorbing,  # programs that absorb: the first ones, as theirs is the longest work
    constant,
    hadamard_scale,
    INDEX_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    C: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_INDEX: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    LATENTS: tl.constexpr,
    ABSORB: tl.constexpr,
    UPCAST: tl.constexpr,
):
    program = tl.program_id(0)
    if ABSORB:
        if program < absorbing:
            _absorb(
                q_ptr, w_uk_ptr, q_latent_ptr, program, num_tokens, q_stride, q_head_stride, q_latent_stride,
                q_latent_head_stride, HEADS, C, N, TOKENS, LATENTS, UPCAST,
            )  # fmt: skip
            return
        program -= absorbing
    # The parts of a token side by side, so that they share the lines of its projection's row.
    index_parts: tl.constexpr = (INDEX_HEADS + BLOCK_INDEX - 1) // BLOCK_INDEX
    parts: tl.constexpr = index_parts + (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = (program // parts).to(tl.int64)
    part = program % parts
    cos_ptr += token * (R // 2)
    sin_ptr += token * (R // 2)
    if part < index_parts:
        _quantize_index_queries(
            index_q_ptr + token * index_q_stride, head_weights_ptr + token * head_weights_stride, cos_ptr,
            sin_ptr, values_ptr + token * (INDEX_HEADS * D), weights_ptr + token * INDEX_HEADS,
            index_head_stride, part * BLOCK_INDEX, constant, hadamard_scale, BLOCK_INDEX, INDEX_HEADS, R, D,
        )  # fmt: skip
    else:
        _rotate_q_pe(
            q_ptr + token * q_stride + N, q_latent_ptr + token * q_latent_stride + C, cos_ptr, sin_ptr,
            q_head_stride, q_latent_head_stride, (part - index_parts) * BLOCK_HEADS, BLOCK_HEADS, HEADS, R,
        )  # fmt: skip


@triton.jit
def _quantize_index_queries(
    q_ptr, head_weights_ptr, cos_ptr, sin_ptr, values_ptr, weights_ptr, head_stride, first_head, constant,
    hadamard_scale, BLOCK: tl.constexpr, HEADS: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Heads of one token, to which all pointers point."""
    heads = first_head + tl.arange(0, BLOCK)
    channels = tl.arange(0, D)
    valid = heads < HEADS
    mask = valid[:, None]
    q = tl.load(q_ptr + heads[:, None] * head_stride + channels[None, :], mask=mask, other=0.0)
    turns = channels < R
    cos = tl.load(cos_ptr + channels % (R // 2), mask=turns, other=1.0)[None, :]
    sin = tl.load(sin_ptr + channels % (R // 2), mask=turns, other=0.0)[None, :]
    weights = tl.load(head_weights_ptr + heads, mask=valid, other=0.0)
    rotated = round_to_bf16(rotate_halves(q.to(tl.float32), cos, sin, R))
    values, scales = quantize_last(round_to_bf16(hadamard(rotated) * hadamard_scale))
    tl.store(values_ptr + heads[:, None] * D + channels[None, :], values, mask=mask)
    tl.store(weights_ptr + heads, weights * constant * scales, mask=valid)


@triton.jit
def _rotate_q_pe(
    q_pe_ptr, out_ptr, cos_ptr, sin_ptr, head_stride, out_head_stride, first_head, BLOCK: tl.constexpr,
    HEADS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Heads of one token; out_ptr at the first rotated channel."""
    heads = first_head + tl.arange(0, BLOCK)
    mask = (heads < HEADS)[:, None]
    pairs = tl.arange(0, R // 2)
    channels = tl.arange(0, R)[None, :]
    x = tl.load(q_pe_ptr + heads[:, None] * head_stride + channels, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + pairs)[None, :]
    sin = tl.load(sin_ptr + pairs)[None, :]
    a, b = tl.split(tl.reshape(x.to(tl.float32), [BLOCK, R // 2, 2]))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [BLOCK, R])
    tl.store(out_ptr + heads[:, None] * out_head_stride + channels, turned.to(tl.bfloat16), mask=mask)


@triton.jit
def _absorb(
    q_ptr, w_uk_ptr, q_latent_ptr, tile, num_tokens, q_stride, q_head_stride, q_latent_stride,
    q_latent_head_stride, HEADS: tl.constexpr, C: tl.constexpr, N: tl.constexpr, TOKENS: tl.constexpr,
    LATENTS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some latent channels of one head of some tokens; all of q_nope is one tile, since heads are narrow."""
    NOPE: tl.constexpr = triton.next_power_of_2(N)
    blocks: tl.constexpr = (C + LATENTS - 1) // LATENTS
    head = (tile // blocks) % HEADS
    c = tile % blocks * LATENTS + tl.arange(0, LATENTS)
    tokens = (tile // (blocks * HEADS) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    channels = tl.arange(0, NOPE)
    inside = channels < N
    weight_rows = w_uk_ptr + (head * C + tl.minimum(c, C - 1))[:, None] * N
    weight = tl.load(weight_rows + channels[None, :], mask=inside[None, :], other=0.0)  # [LATENTS, NOPE]
    query_rows = q_ptr + tl.minimum(tokens, num_tokens - 1)[None, :] * q_stride + head * q_head_stride
    query = tl.load(query_rows + channels[:, None], mask=inside[:, None], other=0.0)  # [NOPE, TOKENS]
    if UPCAST:
        weight, query = weight.to(tl.float32), query.to(tl.float32)
    out = tl.dot(weight, query)
    places = tokens[None, :] * q_latent_stride + head * q_latent_head_stride + c[:, None]
    valid = (tokens < num_tokens)[None, :] & (c < C)[:, None]
    tl.store(q_latent_ptr + places, out.to(tl.bfloat16), mask=valid)


settle(_query_inputs)

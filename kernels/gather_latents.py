"""A sequence's FP8 latent records, widened to bf16 in order of position: what prefill attends over.

Scales are powers of two, so bf16 holds every product exactly.
Shapes: L tokens, C kv_lora_rank, R rotated channels, P pages.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.latent_pages import LATENT_GROUP, record_bytes, unpack_latents_reference

_OPERATION = "gather_latents"
_TOKENS = 16  # a program: 9 kB in flight for 4 warps


def gather_latents(
    latent_pages: Tensor, page_row: Tensor, length: int, kv_lora_rank: int, *, backend: Backend
) -> Tensor:
    """Widen the first `length` tokens of a sequence.

    Args:
        latent_pages: [P, page_size, record_bytes] uint8, contiguous.
        page_row: [max_pages], any integer dtype, contiguous: the sequence's pages.

    Returns:
        [L, C + R] bf16, contiguous.

    Raises:
        UnsupportedKernel: pages of another format, or too few for the length.
    """
    require_triton_or_reference(backend, _OPERATION)
    page_size = latent_pages.shape[1]
    groups = math.ceil(kv_lora_rank / LATENT_GROUP)
    rope_dim = (latent_pages.shape[2] - kv_lora_rank - 4 * groups) // 2
    require(
        latent_pages.dtype == torch.uint8 and latent_pages.is_contiguous(), _OPERATION, "needs uint8 records"
    )
    require(
        rope_dim > 0 and record_bytes(kv_lora_rank, rope_dim) == latent_pages.shape[2],
        _OPERATION,
        f"records of {latent_pages.shape[2]} bytes do not hold {kv_lora_rank} channels",
    )
    require(
        0 <= length <= page_row.shape[0] * page_size,
        _OPERATION,
        f"{length} tokens, {page_row.shape[0]} pages of {page_size}",
    )
    if backend == "reference":
        return gather_latents_reference(latent_pages, page_row, length, kv_lora_rank)
    require(
        kv_lora_rank % LATENT_GROUP == 0 and kv_lora_rank & (kv_lora_rank - 1) == 0,
        _OPERATION,
        f"serves powers of two from {LATENT_GROUP} channels, not {kv_lora_rank}",
    )
    require(rope_dim & (rope_dim - 1) == 0, _OPERATION, f"rotated channels: a power of two, not {rope_dim}")
    require(page_row.stride(0) == 1, _OPERATION, "the page row must be contiguous")
    return _launch(latent_pages, page_row, length, kv_lora_rank, rope_dim, _TOKENS, 4)


def gather_latents_reference(
    latent_pages: Tensor, page_row: Tensor, length: int, kv_lora_rank: int
) -> Tensor:
    used = page_row[: math.ceil(length / latent_pages.shape[1])].long()
    records = latent_pages[used].flatten(0, 1)[:length]
    return unpack_latents_reference(records, kv_lora_rank).to(torch.bfloat16)


def _launch(
    latent_pages: Tensor,
    page_row: Tensor,
    length: int,
    kv_lora_rank: int,
    rope_dim: int,
    tokens: int,
    num_warps: int,
) -> Tensor:
    out = torch.empty(length, kv_lora_rank + rope_dim, dtype=torch.bfloat16, device=latent_pages.device)
    if length == 0:
        return out
    _gather[(triton.cdiv(length, tokens),)](
        latent_pages,
        page_row,
        out,
        length,
        C=kv_lora_rank,
        R=rope_dim,
        RECORD=latent_pages.shape[2],
        PAGE=latent_pages.shape[1],
        TOKENS=tokens,
        num_warps=num_warps,
    )
    return out


@triton.jit
def _gather(
    pages,
    page_row,
    out,  # [L, C + R]
    length,
    C: tl.constexpr,
    R: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE: tl.constexpr,
    TOKENS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = tokens < length
    page = tl.load(page_row + tokens // PAGE, mask=here, other=0).to(tl.int64)
    # Without the hint Triton 3.6 takes the sum for a multiple of 16, and loads of records that are none trap.
    slots = tl.multiple_of(page * PAGE + tokens % PAGE, 1)[:, None]
    here = here[:, None]
    rows = out + tokens.to(tl.int64)[:, None] * (C + R)
    GROUPS: tl.constexpr = C // 128
    scales = pages.to(tl.pointer_type(tl.float32), bitcast=True) + slots * (RECORD // 4) + C // 4
    values = pages.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + slots * RECORD
    halves = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + slots * (RECORD // 2)
    rotated = tl.arange(0, R)[None, :]
    k_pe = tl.load(halves + (C // 2 + 2 * GROUPS) + rotated, mask=here, other=0.0)
    c8 = tl.load(values + tl.arange(0, C)[None, :], mask=here, other=0.0)
    scale = tl.load(scales + tl.arange(0, GROUPS)[None, :], mask=here, other=0.0)
    wide = tl.reshape(c8.to(tl.float32), (TOKENS, GROUPS, 128)) * scale[:, :, None]
    c = tl.reshape(wide, (TOKENS, C)).to(tl.bfloat16)
    tl.store(rows + tl.arange(0, C)[None, :], c, mask=here)
    tl.store(rows + C + rotated, k_pe, mask=here)

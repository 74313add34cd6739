"""From the first projection of attention to what follows it, in one launch.

    q latent    RMSNorm, quantised for the next product
    kv latent   RMSNorm, and RoPE (interleaved) of the shared key: one record in the latent page
    index key   LayerNorm, RoPE (halves), Hadamard, quantised: a row and its scale in the planar index page
Every step rounds to bf16 where a tensor stands between two operations on the reference path. Pages of format
`full` take bf16 rows [c | k_pe] and unrotated bf16 index keys. A row of slot -1 writes nothing to pages.
Shapes: T rows, W width of the projection, Q q_lora_rank, C kv_lora_rank, R rotated channels,
D index_head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.fp8_quant import FP8, quantize_reference
from kernels.hadamard import hadamard_reference
from kernels.index_pages import planes
from kernels.jit import hadamard, quantize_last, rotate_halves, round_to_bf16, settle
from kernels.latent_pages import pack_latents_reference, record_bytes
from kernels.norm import rms_norm_reference
from kernels.quantize_rows import GROUP, empty_scales, quantize_rows_reference
from kernels.rope import apply_rope_reference

_PAGE_SIZE = 64  # the planar index page fixes it


@dataclass(frozen=True)
class ProjectedColumns:
    """Where in a row of the projection each part begins, and how wide it is.

    q latent, index key, kv latent with k_pe behind it; each of the three begins at a multiple of 128 columns,
    since its weight begins with a block of scales.
    """

    q_lora_rank: int
    kv_lora_rank: int
    rope_dim: int
    index_dim: int

    @property
    def index_key(self) -> int:
        return -(-self.q_lora_rank // GROUP) * GROUP

    @property
    def latent(self) -> int:
        return self.index_key + -(-self.index_dim // GROUP) * GROUP

    @property
    def k_pe(self) -> int:
        return self.latent + self.kv_lora_rank

    @property
    def width(self) -> int:
        return self.k_pe + self.rope_dim


@dataclass(frozen=True)
class AttentionNorms:
    """Weights of the norms, float32 and contiguous: q [Q], kv [C], and the LayerNorm of index keys, [D] each.

    Raises:
        UnsupportedKernel: a weight is not as it must be.
    """

    q: Tensor
    kv: Tensor
    key_weight: Tensor
    key_bias: Tensor

    def __post_init__(self) -> None:
        for weight in (self.q, self.kv, self.key_weight, self.key_bias):
            require(
                weight.dtype == torch.float32 and weight.is_contiguous(),
                "attention_inputs",
                f"norms must be float32 and contiguous, not {weight.dtype}",
            )

    @property
    def widths(self) -> tuple[int, int, int, int]:
        return len(self.q), len(self.kv), len(self.key_weight), len(self.key_bias)


@dataclass(frozen=True)
class _Config:
    """Rows a program takes in each of the three parts, and the warps of every program."""

    q_rows: int
    latent_rows: int
    key_rows: int
    num_warps: int


# From the sweep of 2026-11-22 on an H100, best from 1 row to 4,096: programs of 128 threads, with a warp or
# two for a sum.
_CONFIG = _Config(q_rows=1, latent_rows=2, key_rows=8, num_warps=4)


def attention_inputs(
    projected: Tensor,
    columns: ProjectedColumns,
    norms: AttentionNorms,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latent_pages: Tensor,
    index_pages: Tensor,
    eps: float,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Normalise, rotate, quantise, and write the rows' latents and index keys.

    Args:
        projected: [T, W] bf16, W at least columns.width, the channels of a row contiguous.
        cos, sin: [T, R/2] float32.
        slots: [T] integer, contiguous, page * 64 + offset, distinct but for -1, which writes nothing.
        latent_pages: [P, 64, record_bytes] uint8, or [P, 64, C + R] bf16 of format `full`.
        index_pages: [P, 64 * (D + 4)] uint8, or [P, 64, D] bf16 of format `full`.

    Returns:
        The quantised q latent: values [T, Q] e4m3, and scales [T, Q / 128] float32, stored group by group.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, "attention_inputs")
    full = latent_pages.dtype != torch.uint8
    record = columns.kv_lora_rank + columns.rope_dim
    if not full:
        record = record_bytes(columns.kv_lora_rank, columns.rope_dim)
    key_page = _PAGE_SIZE * (columns.index_dim if full else columns.index_dim + 4)
    require(
        latent_pages.shape[1:] == (_PAGE_SIZE, record) and index_pages[:1].numel() == key_page,
        "attention_inputs",
        f"pages of {tuple(latent_pages.shape[1:])} and {tuple(index_pages.shape[1:])} do not fit {columns}",
    )
    require(
        full == (index_pages.dtype != torch.uint8),
        "attention_inputs",
        "the two kinds of pages differ in format",
    )
    require(
        columns.q_lora_rank % GROUP == 0 and columns.kv_lora_rank % GROUP == 0,
        "attention_inputs",
        f"ranks {columns.q_lora_rank} and {columns.kv_lora_rank} are no groups of {GROUP}",
    )
    if backend == "reference":
        return attention_inputs_reference(
            projected, columns, norms, cos, sin, slots, latent_pages, index_pages, eps
        )
    require(
        projected.dtype == torch.bfloat16, "attention_inputs", f"projected is {projected.dtype}, not bf16"
    )
    require(projected.stride(1) == 1, "attention_inputs", "the channels of a row must be contiguous")
    require(
        projected.shape[0] == len(slots) and projected.shape[1] >= columns.width,
        "attention_inputs",
        f"projected {tuple(projected.shape)} is not {len(slots)} rows of {columns.width} channels",
    )
    require(
        not full or latent_pages.dtype == index_pages.dtype == torch.bfloat16,
        "attention_inputs",
        f"pages of format full must be bf16, not {latent_pages.dtype}",
    )
    require(
        latent_pages.is_contiguous() and index_pages.is_contiguous() and slots.is_contiguous(),
        "attention_inputs",
        "pages and slots must be contiguous",
    )
    require(
        cos.is_contiguous()
        and sin.is_contiguous()
        and cos.shape == sin.shape == (len(slots), columns.rope_dim // 2),
        "attention_inputs",
        f"angles {tuple(cos.shape)} of {len(slots)} rows",
    )
    rope_dim, dim = columns.rope_dim, columns.index_dim
    require(
        dim >= max(16, rope_dim) and rope_dim >= 2 and dim & (dim - 1) == 0 == rope_dim & (rope_dim - 1),
        "attention_inputs",
        f"{dim} channels, {rope_dim} of them rotated, are no powers of two",
    )
    widths = columns.q_lora_rank, columns.kv_lora_rank, dim, dim
    require(norms.widths == widths, "attention_inputs", f"norms of {norms.widths}, not {widths} channels")
    return _launch(projected, columns, norms, cos, sin, slots, latent_pages, index_pages, eps, _CONFIG)


def attention_inputs_reference(
    projected: Tensor,
    columns: ProjectedColumns,
    norms: AttentionNorms,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latent_pages: Tensor,
    index_pages: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    q = projected[:, : columns.q_lora_rank]
    key = projected[:, columns.index_key :][:, : columns.index_dim]
    c = projected[:, columns.latent : columns.k_pe]
    k_pe = projected[:, columns.k_pe : columns.width]
    q = rms_norm_reference(q, norms.q, eps)
    c = rms_norm_reference(c, norms.kv, eps)
    k_pe = apply_rope_reference(k_pe, cos, sin, interleaved=True)
    key = F.layer_norm(key.float(), key.shape[-1:], norms.key_weight, norms.key_bias, eps).to(key.dtype)
    turned, rest = key.split([columns.rope_dim, columns.index_dim - columns.rope_dim], dim=-1)
    key = torch.cat([apply_rope_reference(turned, cos, sin, interleaved=False), rest], dim=-1)

    if not len(slots):
        return quantize_rows_reference(q)
    written = slots >= 0
    slots = slots[written].long()
    page, offset = slots // _PAGE_SIZE, slots % _PAGE_SIZE
    if latent_pages.dtype == torch.uint8:
        latent_pages[page, offset] = pack_latents_reference(c, k_pe)[written]
        values, scales = quantize_reference(hadamard_reference(key), columns.index_dim)
        value_plane, scale_plane = planes(index_pages, _PAGE_SIZE)
        value_plane[page, offset] = values[written].view(torch.uint8)
        scale_plane[page, offset] = scales[written].view(torch.uint8)
    else:
        latent_pages[page, offset] = torch.cat([c, k_pe], dim=-1)[written].to(latent_pages.dtype)
        index_pages[page, offset] = key[written].to(index_pages.dtype)
    return quantize_rows_reference(q)


def _launch(
    projected: Tensor,
    columns: ProjectedColumns,
    norms: AttentionNorms,
    cos: Tensor,
    sin: Tensor,
    slots: Tensor,
    latent_pages: Tensor,
    index_pages: Tensor,
    eps: float,
    config: _Config,
) -> tuple[Tensor, Tensor]:
    num_rows = projected.shape[0]
    values = torch.empty(num_rows, columns.q_lora_rank, dtype=FP8, device=projected.device)
    scales = empty_scales(num_rows, columns.q_lora_rank // GROUP, projected.device)
    if num_rows == 0:
        return values, scales
    q_programs = triton.cdiv(num_rows, config.q_rows)
    latent_programs = triton.cdiv(num_rows, config.latent_rows)
    key_programs = triton.cdiv(num_rows, config.key_rows)
    _attention_inputs[(key_programs + latent_programs + q_programs,)](
        projected,
        norms.q,
        norms.kv,
        norms.key_weight,
        norms.key_bias,
        cos,
        sin,
        slots,
        values,
        scales,
        latent_pages,
        index_pages,
        num_rows,
        projected.stride(0),
        scales.stride(1),
        key_programs,
        latent_programs,
        eps,
        columns.index_dim**-0.5,
        KEY_START=columns.index_key,
        LATENT_START=columns.latent,
        Q=columns.q_lora_rank,
        Q_GROUPS=triton.next_power_of_2(columns.q_lora_rank // GROUP),
        C=columns.kv_lora_rank,
        C_GROUPS=triton.next_power_of_2(columns.kv_lora_rank // GROUP),
        R=columns.rope_dim,
        D=columns.index_dim,
        FULL=latent_pages.dtype != torch.uint8,
        RECORD=latent_pages.shape[2],
        PAGE_SIZE=_PAGE_SIZE,
        Q_ROWS=config.q_rows,
        LATENT_ROWS=config.latent_rows,
        KEY_ROWS=config.key_rows,
        num_warps=config.num_warps,
    )
    return values, scales


@triton.jit
def _attention_inputs(
    projected_ptr,  # [T, W]
    q_norm_ptr,  # [Q]
    kv_norm_ptr,  # [C]
    key_weight_ptr,  # [D]
    key_bias_ptr,  # [D]
    cos_ptr,  # [T, R/2]
    sin_ptr,  # [T, R/2]
    slots_ptr,  # [T]
    values_ptr,  # [T, Q]
    scales_ptr,  # [T, Q/128], stored [Q/128, ...]
    latent_pages_ptr,  # [P, PAGE_SIZE, RECORD]
    index_pages_ptr,  # [P, PAGE_SIZE * (D + 4)], or [P, PAGE_SIZE, D]
    num_rows,
    projected_stride,
    scale_stride,  # from group to group
    key_programs,
    latent_programs,
    eps,
    hadamard_scale,
    KEY_START: tl.constexpr,
    LATENT_START: tl.constexpr,
    Q: tl.constexpr,
    Q_GROUPS: tl.constexpr,
    C: tl.constexpr,
    C_GROUPS: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    FULL: tl.constexpr,
    RECORD: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    Q_ROWS: tl.constexpr,
    LATENT_ROWS: tl.constexpr,
    KEY_ROWS: tl.constexpr,
):
    # The longest work first: keys, then latents, then the q latent.
    program = tl.program_id(0)
    if program < key_programs:
        _write_keys(
            projected_ptr + KEY_START, projected_stride, key_weight_ptr, key_bias_ptr, cos_ptr, sin_ptr,
            slots_ptr, index_pages_ptr, program * KEY_ROWS, num_rows, eps, hadamard_scale,
            KEY_ROWS, R, D, FULL, PAGE_SIZE,
        )  # fmt: skip
    elif program < key_programs + latent_programs:
        _write_latents(
            projected_ptr + LATENT_START, projected_stride, kv_norm_ptr, cos_ptr, sin_ptr, slots_ptr,
            latent_pages_ptr, (program - key_programs) * LATENT_ROWS, num_rows, eps, LATENT_ROWS, C, C_GROUPS,
            R, FULL, RECORD,
        )  # fmt: skip
    else:
        _write_q(
            projected_ptr, projected_stride, q_norm_ptr, values_ptr, scales_ptr, scale_stride,
            (program - key_programs - latent_programs) * Q_ROWS, num_rows, eps, Q_ROWS, Q, Q_GROUPS,
        )  # fmt: skip


@triton.jit
def _write_q(
    x_ptr, x_stride, weight_ptr, values_ptr, scales_ptr, scale_stride, first_row, num_rows, eps,
    ROWS: tl.constexpr, Q: tl.constexpr, Q_GROUPS: tl.constexpr,
):  # fmt: skip
    rows = first_row + tl.arange(0, ROWS)
    valid = rows < num_rows
    groups = tl.arange(0, Q_GROUPS)
    x_ptrs = x_ptr + rows.to(tl.int64) * x_stride
    normed, columns, in_row = _normed_groups(x_ptrs, weight_ptr, valid, eps, Q, Q_GROUPS)
    values, scales = quantize_last(normed)
    tl.store(values_ptr + rows.to(tl.int64)[:, None, None] * Q + columns, values, mask=in_row)
    scale_ptrs = scales_ptr + groups[None, :].to(tl.int64) * scale_stride + rows[:, None]
    tl.store(scale_ptrs, scales, mask=valid[:, None] & (groups < Q // 128)[None, :])


@triton.jit
def _normed_groups(x_ptrs, weight_ptr, valid, eps, width: tl.constexpr, num_groups: tl.constexpr):
    """RMSNorm of rows that begin at x_ptrs [rows], on bf16's grid: [rows, num_groups, 128]."""
    columns = tl.arange(0, num_groups)[None, :, None] * 128 + tl.arange(0, 128)[None, None, :]
    in_row = valid[:, None, None] & (columns < width)
    x = tl.load(x_ptrs[:, None, None] + columns, mask=in_row, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=columns < width, other=0.0)
    inverse = tl.rsqrt(tl.sum(tl.sum(x * x, axis=2), axis=1) / width + eps)
    return round_to_bf16(x * inverse[:, None, None] * weight), columns, in_row


@triton.jit
def _write_latents(
    x_ptr, x_stride, weight_ptr, cos_ptr, sin_ptr, slots_ptr, pages_ptr, first_row, num_rows, eps,
    ROWS: tl.constexpr, C: tl.constexpr, C_GROUPS: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr,
    RECORD: tl.constexpr,
):  # fmt: skip
    """x_ptr at the latent of row 0. Nothing that is loaded waits for a slot."""
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    x_ptrs = x_ptr + rows * x_stride
    in_rows = rows < num_rows
    slots = tl.load(slots_ptr + rows, mask=in_rows, other=-1).to(tl.int64)
    pairs = tl.arange(0, R // 2)
    turning = tl.arange(0, R)[None, :]
    k_pe = tl.load(x_ptrs[:, None] + (C + turning), mask=in_rows[:, None], other=0.0).to(tl.float32)
    angles = rows[:, None] * (R // 2) + pairs[None, :]
    cos = tl.load(cos_ptr + angles, mask=in_rows[:, None], other=0.0)
    sin = tl.load(sin_ptr + angles, mask=in_rows[:, None], other=0.0)
    normed, columns, _ = _normed_groups(x_ptrs, weight_ptr, in_rows, eps, C, C_GROUPS)

    written = slots >= 0
    in_row = written[:, None, None] & (columns < C)
    records = pages_ptr + slots * RECORD
    if FULL:
        tl.store(records[:, None, None] + columns, normed.to(tl.bfloat16), mask=in_row)
        rope_ptrs = records + C
    else:
        values, scales = quantize_last(normed)
        groups = tl.arange(0, C_GROUPS)
        value_ptrs = records.to(tl.pointer_type(tl.float8e4nv))
        scale_ptrs = (records + C).to(tl.pointer_type(tl.float32))
        tl.store(value_ptrs[:, None, None] + columns, values, mask=in_row)
        has_scale = written[:, None] & (groups < C // 128)[None, :]
        tl.store(scale_ptrs[:, None] + groups[None, :], scales, mask=has_scale)
        rope_ptrs = (records + (C + C // 32)).to(tl.pointer_type(tl.bfloat16))
    a, b = tl.split(tl.reshape(k_pe, [ROWS, R // 2, 2]))
    turned = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [ROWS, R])
    tl.store(rope_ptrs[:, None] + turning, turned.to(tl.bfloat16), mask=written[:, None])


@triton.jit
def _write_keys(
    x_ptr, x_stride, weight_ptr, bias_ptr, cos_ptr, sin_ptr, slots_ptr, pages_ptr, first_row, num_rows, eps,
    hadamard_scale, ROWS: tl.constexpr, R: tl.constexpr, D: tl.constexpr, FULL: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
):  # fmt: skip
    """x_ptr at the index key of row 0."""
    rows = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    channels = tl.arange(0, D)
    in_rows = rows < num_rows
    mask = in_rows[:, None]
    x = tl.load(x_ptr + rows[:, None] * x_stride + channels[None, :], mask=mask, other=0.0).to(tl.float32)
    slots = tl.load(slots_ptr + rows, mask=in_rows, other=-1).to(tl.int64)
    weight = tl.load(weight_ptr + channels)[None, :]
    bias = tl.load(bias_ptr + channels)[None, :]
    angles = rows[:, None] * (R // 2) + (channels % (R // 2))[None, :]
    turns = mask & (channels < R)[None, :]
    cos = tl.load(cos_ptr + angles, mask=turns, other=1.0)
    sin = tl.load(sin_ptr + angles, mask=turns, other=0.0)
    x -= (tl.sum(x, axis=1) / D)[:, None]
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    normed = round_to_bf16(x * inverse[:, None] * weight + bias)
    rotated = rotate_halves(normed, cos, sin, R)

    written = (slots >= 0)[:, None]
    if FULL:
        keys = pages_ptr + slots[:, None] * D
        tl.store(keys + channels[None, :], rotated.to(tl.bfloat16), mask=written)
    else:
        values, scales = quantize_last(round_to_bf16(hadamard(round_to_bf16(rotated)) * hadamard_scale))
        pages = pages_ptr + slots // PAGE_SIZE * (PAGE_SIZE * (D + 4))
        offsets = slots % PAGE_SIZE
        value_ptrs = (pages + offsets * D).to(tl.pointer_type(tl.float8e4nv))
        scale_ptrs = (pages + PAGE_SIZE * D + offsets * 4).to(tl.pointer_type(tl.float32))
        tl.store(value_ptrs[:, None] + channels[None, :], values, mask=written)
        tl.store(scale_ptrs, scales, mask=slots >= 0)


settle(_attention_inputs)

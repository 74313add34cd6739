"""What the kernels of absorbed attention share: reading a tile of latents, a softmax step, splits of keys.

FP8 records are widened to bf16; their scales are powers of two, so that is exact.
Shapes: M rows of a tile (queries x heads), K keys of a tile, C kv_lora_rank, R rotated channels, S splits.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import require
from kernels.latent_pages import record_bytes

LOG2_E = math.log2(math.e)
_COMBINED_CHANNELS = 128  # channels a program of the combination


class TileConfig(NamedTuple):
    """How a kernel is cut: rows and keys of a tile, warps, stages of loads, programs that fit one SM."""

    block_rows: int
    block_keys: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 1


class Partials(NamedTuple):
    """Where splits leave their results: out [T, S, H, C] and log-sum-exp [T, S, H] (base 2), float32."""

    out: Tensor
    log_sum: Tensor


def require_latents(operation: str, q: Tensor, pages: Tensor, kv_lora_rank: int) -> None:
    """What the kernels over pages need of queries and pages."""
    rope_dim = q.shape[2] - kv_lora_rank
    fp8 = pages.dtype == torch.uint8
    expected = record_bytes(kv_lora_rank, rope_dim) if fp8 else q.shape[2]
    require(pages.shape[-1] == expected, operation, f"records of {pages.shape[-1]}, not {expected}")
    require(fp8 or pages.dtype == q.dtype, operation, f"pages of {pages.dtype}, queries of {q.dtype}")
    require(q.is_contiguous() and pages.is_contiguous(), operation, "queries and pages must be contiguous")
    require_channels(operation, kv_lora_rank, rope_dim)


def require_channels(operation: str, kv_lora_rank: int, rope_dim: int) -> None:
    powers = kv_lora_rank & (kv_lora_rank - 1) == 0 and rope_dim & (rope_dim - 1) == 0
    require(
        powers and kv_lora_rank >= 128 and rope_dim >= 16,
        operation,
        f"serves powers of two, from 128 and 16 channels, not {kv_lora_rank} and {rope_dim}",
    )


def is_full_size(kv_lora_rank: int, rope_dim: int) -> bool:
    """The widths that the kernels in Gluon are made for."""
    return kv_lora_rank == 512 and rope_dim == 64


def require_prefill(operation: str, q: Tensor, latents: Tensor, positions: Tensor, kv_lora_rank: int) -> None:
    """What both kernels of prefill need of their inputs."""
    rope_dim = q.shape[2] - kv_lora_rank
    require(q.shape[0] == positions.shape[0], operation, f"{q.shape[0]} queries, {positions.shape[0]} rows")
    require(q.shape[2] == latents.shape[1], operation, f"query width {q.shape[2]}, key {latents.shape[1]}")
    require(latents.dtype == q.dtype, operation, f"latents of {latents.dtype}, queries of {q.dtype}")
    require(
        q.is_contiguous() and latents.is_contiguous() and positions.stride(-1) == 1,
        operation,
        "queries, latents and rows of positions must be contiguous",
    )
    require_channels(operation, kv_lora_rank, rope_dim)


@lru_cache(maxsize=1024)  # every layer of a step asks the same, and trying all counts takes up to 30 us
def choose_splits(programs: int, num_tiles: int, slots: int) -> int:
    """How many parts the keys are cut into.

    Args:
        programs: that there are without splits.
        num_tiles: key tiles of the longest row.
        slots: programs that run at once.

    Returns:
        The count with the smallest (waves * (tiles + start)); a start costs about two tiles, and combining a
        little with every part.
    """
    best, best_cost = 1, math.inf
    for splits in range(1, max(1, min(num_tiles, slots)) + 1):
        tiles = -(-num_tiles // splits)
        if splits > 1 and -(-num_tiles // tiles) != splits:
            continue  # some part would be empty
        waves = -(-programs * splits // slots)
        cost = waves * (tiles + 2) + (0 if splits == 1 else 1 + splits * programs / 512)
        if cost < best_cost:
            best, best_cost = splits, cost
    return best


def make_partials(
    num_rows: int, splits: int, num_heads: int, kv_lora_rank: int, device: torch.device
) -> Partials:
    shape = num_rows, splits, num_heads
    return Partials(
        torch.empty(*shape, kv_lora_rank, dtype=torch.float32, device=device),
        torch.empty(shape, dtype=torch.float32, device=device),
    )


def combine(partials: Partials, out: Tensor) -> None:
    """Weigh the splits by their sums, in the order of splits, into out [T, H, C].

    A program loads 16 (row, split) pairs at a time: many rows of few splits, or a row of many.
    """
    num_rows, splits, num_heads = partials.log_sum.shape
    total, kv_lora_rank = num_rows * num_heads, out.shape[2]
    step = min(16, triton.next_power_of_2(splits))
    rows = min(16 // step, 8)
    channels = min(kv_lora_rank, 256 if total >= 2048 else _COMBINED_CHANNELS)
    _combine[(triton.cdiv(total, rows), kv_lora_rank // channels)](
        partials.out,
        partials.log_sum,
        out,
        total,
        num_heads,
        splits,
        ROWS=rows,
        STEP=step,
        CHANNELS=channels,
        C=kv_lora_rank,
        num_warps=4,
    )


@triton.jit
def _combine(
    parts,  # [T, splits, H, C]
    log_sums,  # [T, splits, H]
    out,  # [T, H, C]
    total,  # T * H
    H,
    splits,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    CHANNELS: tl.constexpr,
    C: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    first = ((rows // H).to(tl.int64) * splits * H + rows % H)[:, None]
    there = (rows < total)[:, None]
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for start in range(0, splits, STEP):
        part = (start + tl.arange(0, STEP))[None, :]
        log_sum = tl.load(log_sums + first + part * H, there & (part < splits), float("-inf"))
        top = tl.maximum(top, tl.max(log_sum, 1))
    top = tl.where(top == float("-inf"), 0.0, top)  # a row without keys: every weight becomes zero
    weight_sum = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, splits, STEP):
        part = (start + tl.arange(0, STEP))[None, :]
        here = there & (part < splits)
        weight = tl.exp2(tl.load(log_sums + first + part * H, here, float("-inf")) - top[:, None])
        at = parts + ((first + part * H) * C)[:, :, None] + channels[None, None, :]
        values = tl.load(at, here[:, :, None], 0.0)  # [ROWS, STEP, CHANNELS]
        weight_sum += tl.sum(weight, 1)
        acc += tl.sum(values * weight[:, :, None], 1)
    acc = acc / tl.where(weight_sum == 0.0, 1.0, weight_sum)[:, None]
    at = out + rows.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=there)


@triton.jit
def read_tile(pages, slots, C: tl.constexpr, R: tl.constexpr, RECORD: tl.constexpr, MATH: tl.constexpr):
    """Both halves [K, C/2] of the latents and rotated keys [K, R] of slots [K]; -1 reads as zeros.

    In halves, because threads that load half a row each hold fewer rows' addresses, and registers are short.
    RECORD: bytes of an FP8 record, 0 for full pages.
    """
    here = (slots >= 0)[:, None]
    slots = slots.to(tl.int64)[:, None]
    channels = tl.arange(0, C // 2)[None, :]
    rotated = tl.arange(0, R)[None, :]
    if RECORD > 0:
        GROUPS: tl.constexpr = C // 128
        values = pages.to(tl.pointer_type(tl.float8e4nv), bitcast=True) + slots * RECORD
        halves = pages.to(tl.pointer_type(tl.bfloat16), bitcast=True) + slots * (RECORD // 2)
        left = tl.load(values + channels, mask=here, other=0.0)
        right = tl.load(values + (C // 2 + channels), mask=here, other=0.0)
        scales = pages.to(tl.pointer_type(tl.float32), bitcast=True) + slots * (RECORD // 4) + C // 4
        left = _widen(left, scales, here, 0, C, MATH)
        right = _widen(right, scales, here, GROUPS // 2, C, MATH)
        k_pe = tl.load(halves + (C // 2 + 2 * GROUPS) + rotated, mask=here, other=0.0).to(MATH)
    else:
        latents = pages + slots * (C + R)
        left = tl.load(latents + channels, mask=here, other=0.0)
        right = tl.load(latents + (C // 2 + channels), mask=here, other=0.0)
        k_pe = tl.load(latents + C + rotated, mask=here, other=0.0)
    return left, right, k_pe


@triton.jit
def _widen(values, scales, here, FIRST: tl.constexpr, C: tl.constexpr, MATH: tl.constexpr):
    """Half a latent, [K, C/2] e4m3, in MATH: its groups begin with FIRST (of 128 channels all share one)."""
    GROUPS: tl.constexpr = C // 256 if C >= 256 else 1
    scale = tl.load(scales + FIRST + tl.arange(0, GROUPS)[None, :], mask=here, other=0.0).to(MATH)
    grouped = tl.reshape(values.to(MATH), (values.shape[0], GROUPS, C // 2 // GROUPS))
    return tl.reshape(grouped * scale[:, :, None], (values.shape[0], C // 2))


@triton.jit
def read_query(q, rows, here, C: tl.constexpr, R: tl.constexpr):
    """Halves [M, C/2] and rotated part [M, R] of rows [M]."""
    at = q + rows.to(tl.int64)[:, None] * (C + R)
    channels = tl.arange(0, C // 2)[None, :]
    left = tl.load(at + channels, mask=here[:, None], other=0.0)
    right = tl.load(at + C // 2 + channels, mask=here[:, None], other=0.0)
    q_pe = tl.load(at + C + tl.arange(0, R)[None, :], mask=here[:, None], other=0.0)
    return left, right, q_pe


@triton.jit
def attend_tile(acc_left, acc_right, row_max, row_sum, q_left, q_right, q_pe, left, right, k_pe, seen, scale):
    """One step of the softmax over a tile of keys.

    acc_left, acc_right [M, C/2], row_max and row_sum [M] (base 2); seen [M, K] or [1, K]; scale: with
    log2(e) in it.
    """
    scores = tl.dot(q_left, tl.trans(left))
    scores = tl.dot(q_right, tl.trans(right), scores)
    scores = tl.dot(q_pe, tl.trans(k_pe), scores)
    scores = tl.where(seen, scores * scale, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing seen yet: -inf - -inf is no number
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    weights = weights.to(left.dtype)
    acc_left = tl.dot(weights, left, acc_left * shrink[:, None])
    acc_right = tl.dot(weights, right, acc_right * shrink[:, None])
    return acc_left, acc_right, new_max, row_sum


@triton.jit
def write_result(
    out, log_sums, rows, here, acc_left, acc_right, row_max, row_sum, C: tl.constexpr, SPLIT: tl.constexpr
):
    """Normalised rows [M, C] and, of a split, log-sum-exp [M]; zeros and -inf where no key was seen."""
    nothing = row_sum == 0.0
    row_sum = tl.where(nothing, 1.0, row_sum)
    share = (1.0 / row_sum)[:, None]
    at = out + rows.to(tl.int64)[:, None] * C + tl.arange(0, C // 2)[None, :]
    tl.store(at, (acc_left * share).to(out.dtype.element_ty), mask=here[:, None])
    tl.store(at + C // 2, (acc_right * share).to(out.dtype.element_ty), mask=here[:, None])
    if SPLIT:
        tl.store(log_sums + rows, tl.where(nothing, float("-inf"), row_max + tl.log2(row_sum)), mask=here)

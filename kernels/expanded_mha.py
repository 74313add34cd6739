"""Expanded attention for prompts with a short context: flash, causal, perhaps under a choice of keys.

Keys and values are expanded from the latents once for all queries and read where the projections left them:
the rotated part of a query lies by itself, and all heads share that part of a key. A choice of keys is a mask
of bits, so the arithmetic is dense and pays while the context is short. Hopper has a kernel of its own
(`expanded_mha_gluon.py`).
Shapes: T queries of one sequence, S of them with a choice of K keys, H heads, L keys, N qk_nope_head_dim,
R rotated channels, V v_head_dim, W words of bits.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.device import is_hopper
from kernels.expanded_mha_gluon import by_head, launch_gluon
from kernels.latent_tiles import LOG2_E, TileConfig
from kernels.masked_mha import masked_mha_reference

_OPERATION = "expanded_mha"
_MASK_KEYS = 128  # a row's mask fills whole tiles of keys


def expanded_mha(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    scale: float,
    *,
    out: Tensor | None = None,
    backend: Backend,
) -> Tensor:
    """Attend to the visible keys, or to the selected ones among them.

    Args:
        q_nope: [T, H, N], q_pe: [T, H, R], k_nope: [L, H, N], k_pe: [L, R], v: [L, H, V] bf16: views of any
            strides in multiples of 8, but the channels of a head are contiguous.
        visible: [T], any integer dtype, ascending: how many of the first keys a query may see.
        selected: [S, K] int32 indices of visible keys for the last S queries, -1 skips, rows contiguous; a
            query that sees no more than K has chosen all, and those before the last S do. None for all.
        scale: multiplies the scores before the softmax.
        out: [T, H, V] bf16 to write to, contiguous; None for one of its own.

    Returns:
        [T, H, V] bf16; softmax in fp32. A query without any key gives zeros. It is out, where one was given.

    Raises:
        UnsupportedKernel: shapes, dtypes, layouts or widths of heads are others.
    """
    require_triton_or_reference(backend, _OPERATION)
    _require_shapes(q_nope, q_pe, k_nope, k_pe, v, visible, selected)
    if out is None:
        out = q_nope.new_empty(*q_nope.shape[:2], v.shape[2])
    require(
        out.shape == (*q_nope.shape[:2], v.shape[2]) and out.dtype == q_nope.dtype and out.is_contiguous(),
        _OPERATION,
        f"out {tuple(out.shape)} of {out.dtype} does not fit",
    )
    if backend == "reference":
        return out.copy_(expanded_mha_reference(q_nope, q_pe, k_nope, k_pe, v, visible, selected, scale))
    _require_layouts(q_nope=q_nope, q_pe=q_pe, k_nope=k_nope, k_pe=k_pe, v=v)
    require(
        selected is None or selected.stride(1) == 1 or selected.shape[1] <= 1,
        _OPERATION,
        "rows of choices must be contiguous",
    )
    _launch(q_nope, q_pe, k_nope, k_pe, v, visible, selected, out, scale, _config_for(out.device))
    return out


def expanded_mha_reference(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    scale: float,
) -> Tensor:
    q = torch.cat([q_nope, q_pe], dim=-1)
    k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, q.shape[1], -1)], dim=-1)
    if selected is not None:
        everything = torch.arange(selected.shape[1], dtype=torch.int32, device=q.device)
        before = visible[: len(q) - len(selected)]
        everything = everything.masked_fill(everything >= before.unsqueeze(1), -1)
        selected = torch.cat([everything, selected])
    return masked_mha_reference(q, k, v, visible, selected, scale)


def _require_shapes(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
) -> None:
    num_rows, num_heads, nope_dim = q_nope.shape
    num_keys, rope_dim = k_pe.shape
    require(
        q_pe.shape == (num_rows, num_heads, rope_dim)
        and k_nope.shape == (num_keys, num_heads, nope_dim)
        and v.shape[:2] == (num_keys, num_heads),
        _OPERATION,
        f"queries {tuple(q_nope.shape)} and {tuple(q_pe.shape)}, keys {tuple(k_nope.shape)} and "
        f"{tuple(k_pe.shape)}, values {tuple(v.shape)}",
    )
    require(
        visible.shape == (num_rows,) and (selected is None or selected.shape[0] <= num_rows),
        _OPERATION,
        f"{num_rows} queries, {visible.shape[0]} lengths, "
        f"choices of {0 if selected is None else selected.shape[0]}",
    )


def _require_layouts(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        require(tensor.dtype == torch.bfloat16, _OPERATION, f"{name} must be bfloat16, not {tensor.dtype}")
        width, least = tensor.shape[-1], 32 if name == "v" else 16
        require(
            least <= width <= 128 and width & (width - 1) == 0,
            _OPERATION,
            f"{name}: serves powers of two from {least} to 128 channels, not {width}",
        )
        require(
            tensor.stride(-1) == 1 and all(stride % 8 == 0 for stride in tensor.stride()[:-1]),
            _OPERATION,
            f"{name} of strides {tensor.stride()}: channels must be contiguous, others multiples of 8",
        )
    require_aligned(_OPERATION, **tensors)


def _config_for(device: torch.device) -> TileConfig | None:
    """None for Hopper's own; the other: 128 queries give each of two warp groups 64 rows, the best of a sweep
    on an H100 (2026-11-22)."""
    return None if is_hopper(device) else TileConfig(128, 64, 8, 3)


def _launch(
    q_nope: Tensor,
    q_pe: Tensor,
    k_nope: Tensor,
    k_pe: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    out: Tensor,
    scale: float,
    config: TileConfig | None,
) -> None:
    num_rows, num_heads, nope_dim = q_nope.shape
    num_keys, rope_dim = k_pe.shape
    if out.numel() == 0:
        return
    if num_keys == 0:
        out.zero_()
        return
    num_chosen = num_keys if selected is None else selected.shape[1]
    mask = _mask_of(selected, visible, num_keys) if num_keys > num_chosen and selected is not None else None
    if config is None:
        launch_gluon(q_nope, q_pe, k_nope, k_pe, v, visible, mask, num_chosen, out, scale)
        return
    _attend[(triton.cdiv(num_rows, config.block_rows), num_heads)](
        q_nope,
        q_pe,
        _described(by_head(k_nope), config.block_keys, nope_dim),
        _described(k_pe, config.block_keys, rope_dim),
        _described(by_head(v), config.block_keys, v.shape[2]),
        visible,
        out if mask is None else mask,
        out,
        scale * LOG2_E,
        num_rows,
        num_heads,
        num_keys,
        num_chosen,
        *q_nope.stride()[:2],
        *q_pe.stride()[:2],
        k_nope.stride(1),
        v.stride(1),
        visible.stride(0),
        0 if mask is None else mask.stride(0),
        N=nope_dim,
        R=rope_dim,
        V=v.shape[2],
        BLOCK_M=config.block_rows,
        BLOCK_N=config.block_keys,
        MASKED=mask is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _described(matrix: Tensor, rows: int, columns: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def _mask_of(selected: Tensor, visible: Tensor, num_keys: int) -> Tensor:
    """[T, W] int32 bits of chosen keys; zero for rows that have chosen all they see."""
    num_rows, (num_choices, num_chosen) = visible.shape[0], selected.shape
    words = triton.cdiv(num_keys, _MASK_KEYS) * (_MASK_KEYS // 32)
    require(num_rows * words < 1 << 31, _OPERATION, f"{num_rows} rows by {num_keys} keys: too large a mask")
    mask = torch.zeros(num_rows, words, dtype=torch.int32, device=selected.device)
    if selected.numel() > 0:
        _mark[(num_choices, triton.cdiv(num_chosen, 2048))](
            selected,
            visible[num_rows - num_choices :],
            mask[num_rows - num_choices :],
            num_chosen,
            selected.stride(0),
            visible.stride(0),
            num_keys,
            words,
            BLOCK=2048,
        )
    return mask


@triton.jit
def _or(a, b):
    return a | b


@triton.jit
def _mark(
    selected,  # [S, K]
    visible,  # of these queries, as the mask
    mask,
    K,
    selected_stride, visible_stride, L, W, BLOCK: tl.constexpr
):  # fmt: skip
    """Set the bits of chosen keys; or-ing makes their order and repetition indifferent.

    Eight keys that follow one another are mostly in order and of two words: these are or-ed before.
    """
    t = tl.program_id(0).to(tl.int64)
    if tl.load(visible + t * visible_stride) <= K:
        return
    offsets = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :] + tl.program_id(1) * BLOCK
    key = tl.load(selected + t * selected_stride + offsets, mask=offsets < K, other=-1).to(tl.int32)
    here = (key >= 0) & (key < L)
    key = tl.where(here, key, 0)
    word = key >> 5
    bit = tl.where(here, 1 << (key & 31), 0)
    low = tl.min(tl.where(here, word, W), 1)
    high = tl.max(tl.where(here, word, -1), 1)
    row = mask + t * W
    bits = tl.reduce(tl.where(word == low[:, None], bit, 0), 1, _or)
    tl.atomic_or(row + low, bits, mask=bits != 0, sem="relaxed")
    bits = tl.reduce(tl.where(word == high[:, None], bit, 0), 1, _or)
    tl.atomic_or(row + high, bits, mask=(bits != 0) & (high > low), sem="relaxed")
    between = (word > low[:, None]) & (word < high[:, None])
    tl.atomic_or(row + word, bit, mask=here & between, sem="relaxed")


@triton.jit
def _attend(
    q_nope,  # [T, H, N]
    q_pe,  # [T, H, R]
    k_nope,  # [L, H * N] in tiles of N channels
    k_pe,  # [L, R]
    v,  # [L, H * V] in tiles of V
    visible,  # [T]
    mask,  # [T, W] int32, if MASKED
    out,  # [T, H, V]
    scale,
    T,
    H,
    L,
    K,
    q_nope_stride,
    q_nope_head,
    q_pe_stride,
    q_pe_head,
    k_nope_head,
    v_head,
    visible_stride,
    W,
    N: tl.constexpr,
    R: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    # The last queries see most: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < T
    rows = rows.to(tl.int64)
    limits = tl.minimum(tl.load(visible + rows * visible_stride, mask=here, other=0), L).to(tl.int32)
    end = tl.max(limits, 0)
    # Tiles that every row of the block sees whole, and has chosen whole, need no mask.
    whole = tl.min(tl.where(here, limits, end), 0) // BLOCK_N * BLOCK_N
    if MASKED:
        whole = tl.where(end > K, 0, whole)
        limits = tl.where(limits > K, 0, limits)  # such a row counts by its mask, which is zero for others

    at = q_nope + (rows * q_nope_stride + head * q_nope_head)[:, None] + tl.arange(0, N)[None, :]
    query = tl.load(at, mask=here[:, None], other=0.0)
    at = q_pe + (rows * q_pe_stride + head * q_pe_head)[:, None] + tl.arange(0, R)[None, :]
    query_pe = tl.load(at, mask=here[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, V), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, whole, BLOCK_N):
        acc, row_max, row_sum = _step(
            acc, row_max, row_sum, query, query_pe, k_nope, k_pe, v, mask, rows, here, limits, start, scale,
            head * k_nope_head, head * v_head, W, BLOCK_N, False, False,
        )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, row_max, row_sum = _step(
            acc, row_max, row_sum, query, query_pe, k_nope, k_pe, v, mask, rows, here, limits, start, scale,
            head * k_nope_head, head * v_head, W, BLOCK_N, True, MASKED,
        )  # fmt: skip
    acc = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    at = out + (rows * H + head)[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None])


@triton.jit
def _step(
    acc, row_max, row_sum, query, query_pe, k_nope, k_pe, v, mask, rows, here, limits, start, scale, key_at,
    value_at, W, BLOCK_N: tl.constexpr, BOUNDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over a tile of keys; BOUNDED where some rows do not see all of them."""
    keys = tl.arange(0, BLOCK_N)
    scores = tl.dot(query, tl.trans(k_nope.load([start, key_at])))
    scores = tl.dot(query_pe, tl.trans(k_pe.load([start, 0])), scores) * scale
    if BOUNDED:
        seen = (start + keys)[None, :] < limits[:, None]
        if MASKED:
            words = tl.arange(0, BLOCK_N // 32)
            at = mask + rows[:, None] * W + (start // 32 + words)[None, :]
            bits = tl.load(at, mask=here[:, None], other=0)
            bits = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            seen = seen | (tl.reshape(bits, (rows.shape[0], BLOCK_N)) != 0)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if BOUNDED else new_max
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    values = v.load([start, value_at])
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return acc, new_max, row_sum

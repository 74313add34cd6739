"""Expanded attention for prompts with a short context: flash, causal, perhaps under a choice of keys.

Keys and values are expanded from the latents once for all queries; a choice of keys is a mask of bits, so the
arithmetic is dense and pays while the context is short.
Shapes: T queries of one sequence, H heads, L keys, Q qk_head_dim, V v_head_dim, K chosen, W words of bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.latent_tiles import LOG2_E, TileConfig
from kernels.masked_mha import masked_mha_reference

_OPERATION = "expanded_mha"


def expanded_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    scale: float,
    *,
    backend: Backend,
) -> Tensor:
    """Attend to the visible keys, or to the selected ones among them.

    Args:
        q: [T, H, Q] bf16; k: [L, H, Q] bf16; v: [L, H, V] bf16; contiguous.
        visible: [T], any integer dtype, ascending: how many of the first keys a query may see.
        selected: [T, K] int32 indices of visible keys, -1 skips, rows contiguous; None for all visible.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, V] bf16; softmax in fp32. A query without any key gives zeros.

    Raises:
        UnsupportedKernel: shapes, dtypes, layouts or widths of heads are others.
    """
    require_triton_or_reference(backend, _OPERATION)
    require(q.shape[2] == k.shape[2], _OPERATION, f"query width {q.shape[2]}, key width {k.shape[2]}")
    require(
        k.shape[:2] == v.shape[:2] and q.shape[1] == k.shape[1],
        _OPERATION,
        f"queries {tuple(q.shape)}, keys {tuple(k.shape)}, values {tuple(v.shape)}",
    )
    require(
        visible.shape == q.shape[:1] and (selected is None or selected.shape[0] == q.shape[0]),
        _OPERATION,
        f"{q.shape[0]} queries, {visible.shape[0]} lengths, "
        f"choices of {q.shape[0] if selected is None else selected.shape[0]}",
    )
    if backend == "reference":
        return expanded_mha_reference(q, k, v, visible, selected, scale)
    require(
        q.dtype == k.dtype == v.dtype == torch.bfloat16,
        _OPERATION,
        f"needs bfloat16, not {q.dtype}, {k.dtype}",
    )
    contiguous = q.is_contiguous() and k.is_contiguous() and v.is_contiguous()
    require(contiguous, _OPERATION, "queries, keys and values must be contiguous")
    require(
        selected is None or selected.stride(1) == 1 or selected.shape[1] <= 1,
        _OPERATION,
        "rows of choices must be contiguous",
    )
    require_aligned(_OPERATION, keys=k, values=v)
    low, high = _parts(q.shape[2])
    require(
        high in (0, 16, 32, 64) and low >= 16 and v.shape[2] in (16, 32, 64, 128),
        _OPERATION,
        f"serves no heads of {q.shape[2]} and {v.shape[2]} channels",
    )
    return _launch(q, k, v, visible, selected, scale, _config_for())


def expanded_mha_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, selected: Tensor | None, scale: float
) -> Tensor:
    return masked_mha_reference(q, k, v, visible, selected, scale)


def _parts(width: int) -> tuple[int, int]:
    """192 channels are no power of two: 128 and 64."""
    low = 1 << (width.bit_length() - 1)
    return low, width - low


def _config_for() -> TileConfig:
    """128 queries give each of two warp groups 64 rows; the best of a sweep on an H100 (2026-11-22)."""
    return TileConfig(128, 64, 8, 3)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    scale: float,
    config: TileConfig,
) -> Tensor:
    num_rows, num_heads, width = q.shape
    num_keys, value_width = k.shape[0], v.shape[2]
    out = q.new_empty(num_rows, num_heads, value_width)
    if out.numel() == 0:
        return out
    if num_keys == 0:
        return out.zero_()
    words = triton.cdiv(num_keys, config.block_keys) * (config.block_keys // 32)
    mask = None
    if selected is not None:
        mask = torch.zeros(num_rows, words, dtype=torch.int32, device=q.device)
        if selected.shape[1] > 0:
            _mark[(num_rows, triton.cdiv(selected.shape[1], 1024))](
                selected,
                mask,
                selected.shape[1],
                selected.stride(0),
                num_keys,
                words,
                BLOCK=1024,
                num_warps=4,
            )
    low, high = _parts(width)
    keys, values = k.view(num_keys, -1), v.view(num_keys, -1)
    _attend[(triton.cdiv(num_rows, config.block_rows), num_heads)](
        q,
        TensorDescriptor.from_tensor(keys, [config.block_keys, low]),
        TensorDescriptor.from_tensor(keys, [config.block_keys, high or low]),
        TensorDescriptor.from_tensor(values, [config.block_keys, value_width]),
        visible,
        out if mask is None else mask,
        out,
        scale * LOG2_E,
        num_rows,
        num_heads,
        num_keys,
        words,
        visible.stride(0),
        LOW=low,
        HIGH=high,
        V=value_width,
        BLOCK_M=config.block_rows,
        BLOCK_N=config.block_keys,
        MASKED=mask is not None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return out


@triton.jit
def _mark(selected, mask, K, selected_stride, L, W, BLOCK: tl.constexpr):
    """Set the bits of chosen keys; or-ing makes their order and repetition indifferent."""
    t = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(selected + t * selected_stride + offsets, mask=offsets < K, other=-1).to(tl.int32)
    here = (key >= 0) & (key < L)
    key = tl.where(here, key, 0)
    bit = tl.full((BLOCK,), 1, tl.int32) << (key & 31)
    tl.atomic_or(mask + t * W + (key >> 5), bit, mask=here, sem="relaxed")


@triton.jit
def _attend(
    q,  # [T, H, Q]
    k_low,  # [L, H * Q] in tiles of LOW channels
    k_high,  # the same in tiles of HIGH
    v,  # [L, H * V] in tiles of V
    visible,  # [T]
    mask,  # [T, W] int32
    out,  # [T, H, V]
    scale,
    T,
    H,
    L,
    W,
    visible_stride,
    LOW: tl.constexpr,  # Q = LOW + HIGH
    HIGH: tl.constexpr,
    V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    # The last queries see most: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    Q: tl.constexpr = LOW + HIGH
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    here = rows < T
    limits = tl.minimum(tl.load(visible + rows.to(tl.int64) * visible_stride, mask=here, other=0), L).to(
        tl.int32
    )
    end = tl.max(limits, 0)
    # Tiles that every row of the block sees whole need no mask.
    whole = tl.min(tl.where(here, limits, end), 0) // BLOCK_N * BLOCK_N
    whole = 0 if MASKED else whole

    at = q + (rows.to(tl.int64) * H + head)[:, None] * Q
    q_low = tl.load(at + tl.arange(0, LOW)[None, :], mask=here[:, None], other=0.0)
    q_high = q_low
    if HIGH > 0:
        q_high = tl.load(at + LOW + tl.arange(0, HIGH)[None, :], mask=here[:, None], other=0.0)
    acc = tl.zeros((BLOCK_M, V), tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    if not MASKED:
        for start in range(0, whole, BLOCK_N):
            acc, row_max, row_sum = _step(
                acc, row_max, row_sum, q_low, q_high, k_low, k_high, v, mask, rows, here, limits, start,
                scale, head, W, LOW, HIGH, V, BLOCK_N, False, False,
            )  # fmt: skip
    for start in range(whole, end, BLOCK_N):
        acc, row_max, row_sum = _step(
            acc, row_max, row_sum, q_low, q_high, k_low, k_high, v, mask, rows, here, limits, start, scale,
            head, W, LOW, HIGH, V, BLOCK_N, True, MASKED,
        )  # fmt: skip
    acc = acc * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
    at = out + (rows.to(tl.int64) * H + head)[:, None] * V + tl.arange(0, V)[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=here[:, None])


@triton.jit
def _step(
    acc, row_max, row_sum, q_low, q_high, k_low, k_high, v, mask, rows, here, limits, start, scale, head, W,
    LOW: tl.constexpr, HIGH: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
    BOUNDED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the softmax over a tile of keys; BOUNDED where some rows do not see all of them."""
    keys = tl.arange(0, BLOCK_N)
    scores = tl.dot(q_low, tl.trans(k_low.load([start, head * (LOW + HIGH)])))
    if HIGH > 0:
        scores = tl.dot(q_high, tl.trans(k_high.load([start, head * (LOW + HIGH) + LOW])), scores)
    scores = scores * scale
    if BOUNDED:
        seen = (start + keys)[None, :] < limits[:, None]
        if MASKED:
            words = tl.arange(0, BLOCK_N // 32)
            at = mask + rows.to(tl.int64)[:, None] * W + (start // 32 + words)[None, :]
            bits = tl.load(at, mask=here[:, None], other=0)
            bits = (bits[:, :, None] >> tl.arange(0, 32)[None, None, :]) & 1
            seen = seen & (tl.reshape(bits, (rows.shape[0], BLOCK_N)) != 0)
        scores = tl.where(seen, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    base = tl.where(new_max == float("-inf"), 0.0, new_max) if BOUNDED else new_max
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(row_max - base)
    row_sum = row_sum * shrink + tl.sum(weights, 1)
    values = v.load([start, head * V])
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None])
    return acc, new_max, row_sum

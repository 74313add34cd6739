"""Products in bf16 that stay unquantised: the gate, the indexer's head weights, and the absorbed products.

`bf16_gemm`: y = x W^T with few outputs (256 and 64) and a long K, which is split over programs. It reads the
weight once for every tile of rows: where outputs are many, `linear_fp32` is the one to use.
`per_head_gemm`: y[:, h] = x[:, h] W[h]^T, queries into the latent space (128 -> 512) and its sums out of it.
Both are one kernel: operands swapped, as in `fp8_gemm`'s decode form, since rows are few or outputs are.
Shapes: T rows, K inputs, N outputs, H heads (1 in `bf16_gemm`), S splits of K.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.device import num_sms
from kernels.split_sum import is_last_part, parts_of, split_counters, sum_of_parts


def bf16_gemm(x: Tensor, weight: Tensor, *, backend: Backend) -> Tensor:
    """Multiply rows with a weight.

    Launches on one GPU must follow one another, on one stream: they share counters (`split_sum.py`).

    Args:
        x: [T, K] bf16, any strides.
        weight: [N, K] bf16, contiguous.

    Returns:
        [T, N] float32.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    _require_shapes(x.unsqueeze(1), weight.unsqueeze(0), "bf16_gemm")
    require_triton_or_reference(backend, "bf16_gemm")
    if backend == "reference":
        return bf16_gemm_reference(x, weight)
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float32, device=x.device)
    config = _config_for(x.shape[0], 1, weight.shape[0], weight.shape[1], num_sms(x.device))
    _launch(x.unsqueeze(1), weight.unsqueeze(0), out.unsqueeze(1), config)
    return out


def bf16_gemm_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x.float() @ weight.float().t()


def per_head_gemm(x: Tensor, weight: Tensor, *, out: Tensor | None = None, backend: Backend) -> Tensor:
    """Multiply the rows of each head with its own weight.

    Args:
        x: [T, H, K] bf16, any strides.
        weight: [H, N, K] bf16, contiguous.
        out: [T, H, N] bf16 to write to, the channels of a head contiguous; None for one of its own.

    Returns:
        [T, H, N] bf16, summed in fp32: out, where one was given.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    _require_shapes(x, weight, "per_head_gemm")
    require_triton_or_reference(backend, "per_head_gemm")
    if out is None:
        out = torch.empty(*x.shape[:2], weight.shape[1], dtype=torch.bfloat16, device=x.device)
    require(
        out.shape == (*x.shape[:2], weight.shape[1]) and out.dtype == torch.bfloat16 and out.stride(2) == 1,
        "per_head_gemm",
        f"out {tuple(out.shape)} of {out.dtype} does not fit",
    )
    if backend == "reference":
        return out.copy_(per_head_gemm_reference(x, weight))
    # Heads are enough programs: nothing is split.
    num_heads, num_outputs, num_inputs = weight.shape
    config = _config_for(x.shape[0], num_heads, num_outputs, num_inputs, num_sms(x.device))
    config = config._replace(splits=1)
    _launch(x, weight, out, config)
    return out


def per_head_gemm_reference(x: Tensor, weight: Tensor) -> Tensor:
    return torch.einsum("thk,hnk->thn", x.float(), weight.float()).bfloat16()


def _require_shapes(x: Tensor, weight: Tensor, operation: str) -> None:
    require(
        x.dtype == weight.dtype == torch.bfloat16,
        operation,
        f"{x.dtype} by {weight.dtype} is not bf16 by bf16",
    )
    require(
        x.shape[1:] == (weight.shape[0], weight.shape[2]) and x.shape[2] > 0,
        operation,
        f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}",
    )
    require(weight.is_contiguous(), operation, "weight must be contiguous")


class _Config(NamedTuple):
    """A program makes `outputs` x `tokens` of a head over a share of K, `inputs` at a time."""

    outputs: int  # 64 or 128
    tokens: int  # 16 to 128
    inputs: int
    splits: int
    warps: int
    stages: int


def _config_for(num_rows: int, num_heads: int, num_outputs: int, num_inputs: int, sms: int) -> _Config:
    """What to run, from the sweep of 2026-11-22 on an H100; benchmarks/LOG.md has it."""
    inputs = min(128, max(16, triton.next_power_of_2(num_inputs)))
    if num_heads > 1:
        tokens = max(16, min(128, triton.next_power_of_2(num_rows)))
        if tokens >= 64:
            return _Config(64 if num_rows <= 128 else 128, tokens, min(inputs, 64), 1, warps=8, stages=3)
        if tokens == 32:
            return _Config(128, 32, inputs if num_inputs > 128 else min(inputs, 64), 1, warps=4, stages=3)
        return _Config(128, 16, min(inputs, 64), 1, warps=4, stages=4)
    columns = triton.cdiv(num_outputs, 64)
    if num_rows > 256:
        tokens, inputs = (128, min(inputs, 64)) if columns > 1 else (64, inputs)
    else:
        tokens = 16 if num_rows <= 64 or columns == 1 else 32
    tiles = columns * triton.cdiv(num_rows, tokens)
    # Each part is written and read once more, which takes as long as several steps.
    splits = max(1, min(sms // max(1, tiles), num_inputs // 896, 8))
    return _Config(64, tokens, inputs, splits, warps=4, stages=5)


def _launch(x: Tensor, weight: Tensor, out: Tensor, config: _Config) -> None:
    """x [T, H, K] and weight [H, N, K] into out [T, H, N]."""
    if out.numel() == 0:
        return
    num_heads, num_outputs, num_inputs = weight.shape
    tiles = triton.cdiv(num_outputs, config.outputs), triton.cdiv(x.shape[0], config.tokens)
    num_tiles, tile_size = num_heads * tiles[0] * tiles[1], config.outputs * config.tokens
    operation = "bf16_gemm" if num_heads == 1 else "per_head_gemm"
    _gemm_kernel[(num_heads * tiles[0] * config.splits, tiles[1])](
        x,
        weight,
        out,
        parts_of(num_tiles, config.splits, tile_size, x.device, operation),
        split_counters(x.device),
        x.shape[0],
        num_outputs,
        num_inputs,
        *x.stride(),
        out.stride(0),
        out.stride(1),
        BN=config.outputs,
        BT=config.tokens,
        BK=config.inputs,
        SPLITS=config.splits,
        RAGGED=num_inputs % config.inputs != 0,
        UPCAST=x.device.type == "cpu",  # the interpreter cannot multiply bf16
        num_warps=config.warps,
        num_stages=config.stages,
    )


@triton.jit(do_not_specialize=["T"])
def _gemm_kernel(
    x,  # [T, H, K] bf16
    weight,  # [H, N, K] bf16
    out,  # [T, H, N]
    parts,  # [tiles, S, BN, BT] f32
    counters,  # [tiles] i32
    T,
    N,
    K,
    x_stride_t,
    x_stride_h,
    x_stride_k,
    out_stride_t,
    out_stride_h,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLITS: tl.constexpr,
    RAGGED: tl.constexpr,  # K is no multiple of BK
    UPCAST: tl.constexpr,
):
    num_tiles_n = tl.cdiv(N, BN)
    split = tl.program_id(0) % SPLITS
    tile = tl.program_id(0) // SPLITS  # of heads and outputs
    head = (tile // num_tiles_n).to(tl.int64)
    n = tile % num_tiles_n * BN + tl.arange(0, BN)
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    inputs = tl.arange(0, BK)
    steps = tl.cdiv(K, BK)
    first, last = steps * split // SPLITS, steps * (split + 1) // SPLITS
    left_rows = weight + (head * N + tl.minimum(n, N - 1))[:, None] * K
    right_rows = x + head * x_stride_h + tl.minimum(t, T - 1)[None, :] * x_stride_t
    acc = tl.zeros((BN, BT), tl.float32)
    for step in range(first, last):
        k = step * BK + inputs
        if RAGGED:
            left = tl.load(left_rows + k[None, :], mask=(k < K)[None, :], other=0.0)  # [BN, BK]
            right = tl.load(right_rows + k[:, None] * x_stride_k, mask=(k < K)[:, None], other=0.0)
        else:
            left = tl.load(left_rows + k[None, :])
            right = tl.load(right_rows + k[:, None] * x_stride_k)  # [BK, BT]
        if UPCAST:
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc = tl.dot(left, right, acc)
    if SPLITS > 1:
        tile = tl.program_id(1) * (tl.num_programs(0) // SPLITS) + tile
        part = parts + tile.to(tl.int64) * (SPLITS * BN * BT)
        if not is_last_part(acc, part, counters + tile, split, SPLITS, BN, BT):
            return
        acc = sum_of_parts(part, counters + tile, SPLITS, BN, BT)
    tl.store(
        out + t[None, :] * out_stride_t + head * out_stride_h + n[:, None],
        acc.to(out.dtype.element_ty),
        mask=(t < T)[None, :] & (n < N)[:, None],
    )

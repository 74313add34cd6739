"""Products of quantised activations with quantised weights, y = x W^T, in two forms by the number of rows.

    y[t, n] = sum_b  x_scale[t, b] * weight_scale[n // 128, b] * (sum_k in b  x[t, k] * weight[n, k])
*Prefill* (many rows) is bound by the tensor cores: tiles of tokens by outputs in an order that keeps weights
and tokens in L2. *Decode* streams each weight once: operands swapped, K split over programs so that all of
the GPU loads, the parts added by whichever program of a tile ends last (`split_sum.py`). Hopper has
kernels of its own for both (`fp8_gemm_gluon.py`; `fp8_gemm_decode_gluon.py` beyond 32 rows).
Shapes: T rows, K inputs (a multiple of 128), N outputs, S splits of K.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.device import is_hopper, num_sms, shared_bytes
from kernels.fp8_gemm_decode_gluon import GluonDecode, decode_config, launch_dense
from kernels.fp8_gemm_gluon import GluonPrefill
from kernels.fp8_gemm_prefill import Prefill, config_on, launch_prefill, prefill_config
from kernels.fp8_quant import FP8, dequantize_blocks, dequantize_reference
from kernels.fp8_tiles import BLOCK, weights_by_tokens
from kernels.split_sum import is_last_part, parts_of, split_counters, sum_of_parts


def fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend,
) -> Tensor:
    """Multiply rows with a weight.

    Launches on one GPU must follow one another, on one stream: they share counters (`split_sum.py`).

    Args:
        x: [T, K] e4m3, contiguous, from a multiple of 16 bytes on.
        x_scales: [T, K / 128] float32, any strides; transposed in memory they are read fastest.
        weight: [N, K] e4m3, likewise.
        weight_scales: [ceil(N / 128), K / 128] float32, contiguous.

    Returns:
        [T, N] of out_dtype, summed in fp32.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    _require_shapes(x, x_scales, weight, weight_scales)
    require_triton_or_reference(backend, "fp8_gemm")
    if backend == "reference":
        return fp8_gemm_reference(x, x_scales, weight, weight_scales, out_dtype=out_dtype)
    require_aligned("fp8_gemm", x=x, weight=weight)
    if x.shape[0] == 0 or weight.shape[0] == 0:
        return torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    config: _Decode | GluonDecode | Prefill | GluonPrefill
    sms = num_sms(x.device)
    config = _config_for(x.shape[0], weight.shape[0], weight.shape[1], sms)
    if isinstance(config, Prefill):
        config = config_on(x, x_scales, out_dtype, weight.shape[0])
    elif x.shape[0] > 32 and is_hopper(x.device):
        config = decode_config(x.shape[0], weight.shape[0], weight.shape[1], sms)
    return _launch(x, x_scales, weight, weight_scales, out_dtype, config)


def fp8_gemm_reference(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    wide = dequantize_reference(x, x_scales, BLOCK)
    return (wide @ dequantize_blocks(weight, weight_scales, BLOCK).t()).to(out_dtype)


def _require_shapes(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> None:
    blocks = x.shape[1] // BLOCK
    require(x.dtype == weight.dtype == FP8, "fp8_gemm", f"{x.dtype} by {weight.dtype} is not e4m3 by e4m3")
    require(
        x.shape[1] == weight.shape[1] and x.shape[1] % BLOCK == 0 and blocks > 0,
        "fp8_gemm",
        f"x {tuple(x.shape)} by weight {tuple(weight.shape)}: K must be the same, a multiple of {BLOCK}",
    )
    require(
        x_scales.shape == (x.shape[0], blocks)
        and weight_scales.shape == (triton.cdiv(weight.shape[0], BLOCK), blocks),
        "fp8_gemm",
        f"scales {tuple(x_scales.shape)} and {tuple(weight_scales.shape)} are not one a {BLOCK} of K",
    )
    require(
        x_scales.dtype == weight_scales.dtype == torch.float32,
        "fp8_gemm",
        f"scales are {x_scales.dtype} and {weight_scales.dtype}, not float32",
    )
    require(
        x.is_contiguous() and weight.is_contiguous() and weight_scales.is_contiguous(),
        "fp8_gemm",
        "x, weight and weight_scales must be contiguous",
    )


class _Decode(NamedTuple):
    """A program makes `outputs` x `tokens` of the result over a share of K's blocks."""

    outputs: int  # 64 or 128
    tokens: int  # 16 to 128
    splits: int
    warps: int
    stages: int
    tma: bool


def _config_for(num_rows: int, num_outputs: int, num_inputs: int, sms: int) -> _Decode | Prefill:
    """What to run; benchmarks/LOG.md has the sweep this comes from."""
    if num_rows > 256:
        return prefill_config(num_inputs)
    tokens = max(16, min(128, triton.next_power_of_2(num_rows)))
    outputs = 128 if tokens <= 32 and min(num_outputs, num_inputs) >= 4096 else 64
    tiles = triton.cdiv(num_outputs, outputs) * triton.cdiv(num_rows, tokens)
    # A sum over splits costs 1.4 us and more, so they are few: a program a processor, 14 blocks a program.
    splits = max(1, min(sms // tiles, num_inputs // BLOCK // 14))
    residents = 2 if tiles * splits <= 2 * sms else 3
    stages = min(10, shared_bytes(residents) // ((outputs + tokens) * BLOCK + 4 * tokens))
    # Descriptors are fetched first, which few rows feel.
    return _Decode(outputs, tokens, splits, warps=4, stages=stages, tma=tokens > 32)


def _launch(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    out_dtype: torch.dtype,
    config: _Decode | GluonDecode | Prefill | GluonPrefill,
) -> Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=out_dtype, device=x.device)
    if out.numel() == 0:
        return out
    if isinstance(config, _Decode):
        _launch_decode(x, x_scales, weight, weight_scales, out, config)
    elif isinstance(config, GluonDecode):
        launch_dense(x, x_scales, weight, weight_scales, out, config, num_sms(x.device))
    else:
        launch_prefill(x, x_scales, weight, weight_scales, out, config)
    return out


def _launch_decode(
    x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor, out: Tensor, config: _Decode
) -> None:
    tiles = triton.cdiv(out.shape[1], config.outputs), triton.cdiv(out.shape[0], config.tokens)
    num_tiles, tile_size = tiles[0] * tiles[1], config.outputs * config.tokens
    parts = parts_of(num_tiles, config.splits, tile_size, x.device, "fp8_gemm")
    _decode_kernel[(tiles[0] * config.splits, tiles[1])](
        _described(x, config.tokens) if config.tma else x,
        x_scales,
        _described(weight, config.outputs) if config.tma else weight,
        weight_scales,
        out,
        parts,
        split_counters(x.device),
        *out.shape,
        x.shape[1],
        *x_scales.stride(),
        BN=config.outputs,
        BT=config.tokens,
        SPLITS=config.splits,
        TMA=config.tma,
        STAGES=config.stages,
        num_warps=config.warps,
    )


def _described(matrix: Tensor, rows: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK])


@triton.jit(do_not_specialize=["T", "x_scale_stride_k"])
def _decode_kernel(
    x,  # [T, K] e4m3
    x_scales,  # [T, K / 128] f32
    weight,  # [N, K] e4m3
    weight_scales,  # [ceil(N / 128), K / 128] f32
    out,  # [T, N]
    parts,  # [tiles, S, BN, BT] f32
    counters,  # [tiles] i32
    T,
    N,
    K,
    x_scale_stride_t,
    x_scale_stride_k,
    BN: tl.constexpr,
    BT: tl.constexpr,
    SPLITS: tl.constexpr,
    TMA: tl.constexpr,
    STAGES: tl.constexpr,
):
    split = tl.program_id(0) % SPLITS
    tile_n = tl.program_id(0) // SPLITS
    n = tile_n * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BT + tl.arange(0, BT)
    rows = tl.minimum(t, T - 1).to(tl.int64)
    num_blocks = K // 128
    acc = weights_by_tokens(
        weight,
        tl.minimum(n, N - 1).to(tl.int64),
        tile_n * BN,
        weight_scales + (tile_n * BN // 128) * num_blocks,
        x,
        rows,
        tl.program_id(1) * BT,
        x_scales + rows * x_scale_stride_t,
        x_scale_stride_k,
        num_blocks * split // SPLITS,
        num_blocks * (split + 1) // SPLITS,
        K,
        BN,
        BT,
        TMA,
        TMA,
        STAGES,
    )  # [BN, BT]
    if SPLITS > 1:
        tile = tl.program_id(1) * (tl.num_programs(0) // SPLITS) + tile_n
        part = parts + tile.to(tl.int64) * (SPLITS * BN * BT)
        if not is_last_part(acc, part, counters + tile, split, SPLITS, BN, BT):
            return
        acc = sum_of_parts(part, counters + tile, SPLITS, BN, BT)
    tl.store(
        out + t.to(tl.int64)[None, :] * N + n[:, None],
        acc.to(out.dtype.element_ty),
        mask=(t < T)[None, :] & (n < N)[:, None],
    )

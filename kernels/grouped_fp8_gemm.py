"""Products of quantised rows with the weights of the experts they go to, the counts known only on the device.

    out[r] = weights[e] x[rows[r]]   for offsets[e] <= r < offsets[e + 1]
Rows are gathered here, so nobody permutes them before. *Prefill* makes tiles of rows by outputs and finds
each tile's expert from the offsets. *Decode* streams the weights of each expert that has rows once past
all of them, operands swapped (`fp8_tiles.py`). Host code sees no count, so that graphs can be captured.
Hopper has kernels of its own for both (`grouped_fp8_gluon.py`; `fp8_gemm_decode_gluon.py` beyond 16 rows).
Shapes: T tokens, R rows (upper bound), e experts, K inputs (a multiple of 128), N outputs.
"""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.device import is_hopper, num_sms
from kernels.fp8_gemm import fp8_gemm_reference
from kernels.fp8_gemm_decode_gluon import GluonDecode, grouped_decode_config, launch_grouped
from kernels.fp8_gemm_gluon import GluonPrefill
from kernels.fp8_quant import FP8
from kernels.fp8_tiles import BLOCK, weights_by_tokens
from kernels.grouped_fp8_prefill import Prefill, config_on, launch_prefill, prefill_config


def grouped_fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    *,
    num_rows: int | None = None,
    expected_rows: int | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    backend: Backend,
) -> Tensor:
    """Multiply each group of rows with its expert's weight.

    Args:
        x: [T, K] e4m3, contiguous, from a multiple of 16 bytes on.
        x_scales: [T, K / 128] float32, any strides.
        weights: [e, N, K] e4m3, likewise.
        weight_scales: [e, ceil(N / 128), K / 128] float32, contiguous.
        offsets: [e + 1] int32, ascending; offsets[e] is the number of rows. Experts may have none.
        rows: [R] int32 or int64, the row of x behind each row of the result; None where it is x's own.
        num_rows: R, an upper bound of offsets[e]; by default all of `rows`, or of x.
        expected_rows: of an expert that has any; picks the form and the tile. By default R / e.

    Returns:
        [R, N] of out_dtype; rows from offsets[e] on are not written.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    if num_rows is None:
        num_rows = (x if rows is None else rows).shape[0]
    _require_shapes(x, x_scales, weights, weight_scales, offsets, rows, num_rows)
    require_triton_or_reference(backend, "grouped_fp8_gemm")
    if backend == "reference":
        return grouped_fp8_gemm_reference(
            x, x_scales, weights, weight_scales, offsets, rows, num_rows=num_rows, out_dtype=out_dtype
        )
    require_aligned("grouped_fp8_gemm", x=x, weights=weights)
    if expected_rows is None:
        expected_rows = triton.cdiv(num_rows, max(1, weights.shape[0]))
    config: _Decode | GluonDecode | Prefill | GluonPrefill
    config = _config_for(expected_rows)
    if isinstance(config, Prefill):
        config = config_on(x.device, out_dtype, expected_rows, weights.shape[1])
    elif expected_rows > 16 and is_hopper(x.device):
        config = grouped_decode_config(expected_rows)
    return _launch(x, x_scales, weights, weight_scales, offsets, rows, num_rows, out_dtype, config)


def grouped_fp8_gemm_reference(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    *,
    num_rows: int,
    out_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    out = torch.empty(num_rows, weights.shape[1], dtype=out_dtype, device=x.device)
    bounds = offsets.tolist()
    for expert, (start, end) in enumerate(pairwise(bounds)):
        picked = slice(start, end) if rows is None else rows[start:end].long()
        out[start:end] = fp8_gemm_reference(
            x[picked], x_scales[picked], weights[expert], weight_scales[expert], out_dtype=out_dtype
        )
    return out


def _require_shapes(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    num_rows: int,
) -> None:
    operation = "grouped_fp8_gemm"
    num_experts, num_outputs, num_inputs = weights.shape
    blocks = num_inputs // BLOCK
    require(x.dtype == weights.dtype == FP8, operation, f"{x.dtype} by {weights.dtype} is not e4m3 by e4m3")
    require(
        x.shape[1] == num_inputs and num_inputs % BLOCK == 0 and blocks > 0,
        operation,
        f"x {tuple(x.shape)} by weights {tuple(weights.shape)}: K must be the same, a multiple of {BLOCK}",
    )
    require(
        x_scales.shape == (x.shape[0], blocks)
        and weight_scales.shape == (num_experts, triton.cdiv(num_outputs, BLOCK), blocks),
        operation,
        f"scales {tuple(x_scales.shape)} and {tuple(weight_scales.shape)} are not one a {BLOCK} of K",
    )
    require(
        x_scales.dtype == weight_scales.dtype == torch.float32,
        operation,
        f"scales are {x_scales.dtype} and {weight_scales.dtype}, not float32",
    )
    require(
        offsets.shape == (num_experts + 1,),
        operation,
        f"offsets {tuple(offsets.shape)} are not one more than {num_experts} experts",
    )
    require(
        offsets.dtype == torch.int32 and (rows is None or rows.dtype in (torch.int32, torch.int64)),
        operation,
        f"offsets must be int32 and rows int32 or int64, not {offsets.dtype} and "
        f"{None if rows is None else rows.dtype}",
    )
    require(
        offsets.is_contiguous() and (rows is None or rows.is_contiguous()),
        operation,
        "offsets and rows must be contiguous",
    )
    require(
        num_rows <= (x if rows is None else rows).shape[0],
        operation,
        f"{num_rows} rows are more than are given",
    )
    require(
        x.is_contiguous() and weights.is_contiguous() and weight_scales.is_contiguous(),
        operation,
        "x, weights and weight_scales must be contiguous",
    )


class _Decode(NamedTuple):
    """A program makes `outputs` x `tokens` of an expert, again and again until it has no more rows."""

    outputs: int  # 64 or 128
    tokens: int  # 16 to 128
    warps: int
    stages: int
    tma: bool  # of weights; rows are gathered by pointers


def _config_for(expected_rows: int) -> _Decode | Prefill:
    """What to run; benchmarks/LOG.md has the sweep this comes from."""
    if expected_rows > 128:
        return prefill_config()
    # An expert with more rows than a tile reads its weights again, most likely from L2.
    tokens = max(16, min(128, triton.next_power_of_2(expected_rows)))
    stages = {16: 5, 32: 5, 64: 6, 128: 4}[tokens]
    return _Decode(128 if tokens <= 32 else 64, tokens, warps=4, stages=stages, tma=True)


def _launch(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    num_rows: int,
    out_dtype: torch.dtype,
    config: _Decode | GluonDecode | Prefill | GluonPrefill,
) -> Tensor:
    num_experts, num_outputs, num_inputs = weights.shape
    out = torch.empty(num_rows, num_outputs, dtype=out_dtype, device=x.device)
    if out.numel() == 0 or num_experts == 0:
        return out
    flat = weights.view(num_experts * num_outputs, num_inputs)
    shape = num_outputs, num_inputs
    if isinstance(config, _Decode):
        _decode_kernel[(triton.cdiv(num_outputs, config.outputs), num_experts)](
            x,
            x_scales,
            _described(flat, config.outputs) if config.tma else flat,
            weight_scales,
            offsets,
            rows if rows is not None else offsets,
            out,
            *shape,
            *x_scales.stride(),
            BN=config.outputs,
            BT=config.tokens,
            GATHER=rows is not None,
            TMA_W=config.tma,
            STAGES=config.stages,
            num_warps=config.warps,
        )
        return out
    if isinstance(config, GluonDecode):
        sms = num_sms(x.device)
        launch_grouped(x, x_scales, weights, weight_scales, offsets, rows, out, config, sms)
        return out
    launch_prefill(x, x_scales, weights, weight_scales, offsets, rows, out, config)
    return out


def _described(matrix: Tensor, rows: int) -> Any:
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK])


@triton.jit(do_not_specialize=["x_scale_stride_k"])
def _decode_kernel(
    x,  # [T, K] e4m3
    x_scales,  # [T, K / 128] f32
    weights,  # [e * N, K] e4m3
    weight_scales,  # [e, ceil(N / 128), K / 128] f32
    offsets,  # [e + 1]
    source_rows,  # [R], if GATHER
    out,  # [R, N]
    N,
    K,
    x_scale_stride_t,
    x_scale_stride_k,
    BN: tl.constexpr,
    BT: tl.constexpr,
    GATHER: tl.constexpr,
    TMA_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    expert = tl.program_id(1)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    if begin >= end:
        return
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    num_blocks = K // 128
    scale_row = expert * tl.cdiv(N, 128) + n0 // 128
    for first in range(begin, end, BT):
        r = first + tl.arange(0, BT)
        rows = tl.minimum(r, end - 1).to(tl.int64)
        source = tl.load(source_rows + rows).to(tl.int64) if GATHER else rows
        acc = weights_by_tokens(
            weights,
            expert.to(tl.int64) * N + tl.minimum(n, N - 1),
            expert * N + n0,
            weight_scales + scale_row * num_blocks,
            x,
            source,
            0,
            x_scales + source * x_scale_stride_t,
            x_scale_stride_k,
            0,
            num_blocks,
            K,
            BN,
            BT,
            TMA_W,
            False,
            STAGES,
        )  # [BN, BT]
        tl.store(
            out + r.to(tl.int64)[None, :] * N + n[:, None],
            acc.to(out.dtype.element_ty),
            mask=(r < end)[None, :] & (n < N)[:, None],
        )

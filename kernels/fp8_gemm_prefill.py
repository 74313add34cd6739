"""`fp8_gemm` for many rows, bound by the tensor cores: tiles of tokens by outputs.

The kernel here is portable; Hopper's own is chosen here and stands in `fp8_tiles_gluon.py`.
Shapes: T rows, K inputs (a multiple of 128), N outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.device import is_hopper, num_sms
from kernels.fp8_gemm_gluon import GluonPrefill, fits_gluon, gluon_config, launch_gluon, scales_fit_gluon
from kernels.fp8_tiles import BLOCK, tokens_by_weights


class Prefill(NamedTuple):
    """A program makes `tokens` x 128 of the result, and twice that with `two`."""

    tokens: int  # 64 or 128
    two: str  # "none", "tokens", "outputs"
    warps: int
    stages: int
    tma: bool
    group: int  # row tiles that are walked together, so that they find the weights in L2


def prefill_config(num_inputs: int) -> Prefill:
    """The portable kernel's, from the sweep of 2026-11-22 on an H100: small tiles, but for very long sums."""
    if num_inputs > 8192:
        return Prefill(128, "none", warps=8, stages=4, tma=True, group=8)
    return Prefill(64, "none", warps=4, stages=3, tma=True, group=16)


def config_on(
    x: Tensor, x_scales: Tensor, out_dtype: torch.dtype, num_outputs: int
) -> Prefill | GluonPrefill:
    """The kernel for Hopper alone where it runs: there it is 1.2 to 1.4 times as fast as the portable one."""
    if is_hopper(x.device) and fits_gluon(num_outputs, out_dtype) and scales_fit_gluon(x_scales):
        return gluon_config(x.shape[0], num_outputs, num_sms(x.device))
    return prefill_config(x.shape[1])


def launch_prefill(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    out: Tensor,
    config: Prefill | GluonPrefill,
) -> None:
    if isinstance(config, GluonPrefill):
        launch_gluon(x, x_scales, weight, weight_scales, out, config)
        return
    rows = config.tokens * (2 if config.two == "tokens" else 1)
    columns = BLOCK * (2 if config.two == "outputs" else 1)
    tiles = triton.cdiv(out.shape[0], rows) * triton.cdiv(out.shape[1], columns)
    _prefill_kernel[(tiles,)](
        TensorDescriptor.from_tensor(x, [config.tokens, BLOCK]) if config.tma else x,
        x_scales,
        TensorDescriptor.from_tensor(weight, [BLOCK, BLOCK]) if config.tma else weight,
        weight_scales,
        out,
        *out.shape,
        x.shape[1],
        *x_scales.stride(),
        BT=config.tokens,
        TWO_X=config.two == "tokens",
        TWO_W=config.two == "outputs",
        TMA=config.tma,
        GROUP=config.group,
        STAGES=config.stages,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["T", "x_scale_stride_k"])
def _prefill_kernel(
    x,  # [T, K] e4m3
    x_scales,  # [T, K / 128] f32
    weight,  # [N, K] e4m3
    weight_scales,  # [ceil(N / 128), K / 128] f32
    out,  # [T, N]
    T,
    N,
    K,
    x_scale_stride_t,
    x_scale_stride_k,
    BT: tl.constexpr,
    TWO_X: tl.constexpr,
    TWO_W: tl.constexpr,
    TMA: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = BT * 2 if TWO_X else BT
    COLUMNS: tl.constexpr = 256 if TWO_W else 128
    num_t = tl.cdiv(T, ROWS)
    num_n = tl.cdiv(N, COLUMNS)
    # Down GROUP row tiles, then to the next column.
    first_t = tl.program_id(0) // (GROUP * num_n) * GROUP
    height = tl.minimum(num_t - first_t, GROUP)
    place = tl.program_id(0) % (GROUP * num_n)
    t0 = (first_t + place % height) * ROWS
    n0 = place // height * COLUMNS
    t = t0 + tl.arange(0, BT)
    n = n0 + tl.arange(0, 128)
    rows = tl.minimum(t, T - 1).to(tl.int64)
    more_rows = tl.minimum(t + BT, T - 1).to(tl.int64)
    num_blocks = K // 128
    last_scales = tl.cdiv(N, 128) - 1
    acc, more = tokens_by_weights(
        x,
        rows,
        more_rows,
        t0,
        x_scales + rows * x_scale_stride_t,
        x_scales + more_rows * x_scale_stride_t,
        x_scale_stride_k,
        weight,
        tl.minimum(n, N - 1).to(tl.int64),
        tl.minimum(n + 128, N - 1).to(tl.int64),
        n0,
        weight_scales + n0 // 128 * num_blocks,
        weight_scales + tl.minimum(n0 // 128 + 1, last_scales) * num_blocks,
        num_blocks,
        K,
        BT,
        TWO_X,
        TWO_W,
        TMA,
        TMA,
        STAGES,
    )
    pointers = out + t.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(t < T)[:, None] & (n < N)[None, :])
    if TWO_X:
        fits = (t + BT < T)[:, None] & (n < N)[None, :]
        tl.store(pointers + BT * N, more.to(out.dtype.element_ty), mask=fits)
    if TWO_W:
        fits = (t < T)[:, None] & (n + 128 < N)[None, :]
        tl.store(pointers + 128, more.to(out.dtype.element_ty), mask=fits)

"""`grouped_fp8_gemm` for many rows an expert: tiles of rows by outputs, their experts found from the offsets.

Shapes: T tokens, R rows (upper bound), e experts, K inputs (a multiple of 128), N outputs.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.device import is_hopper, num_sms
from kernels.fp8_gemm_gluon import GluonPrefill, fits_gluon
from kernels.fp8_tiles import BLOCK, tokens_by_weights
from kernels.grouped_fp8_gluon import launch_grouped_gluon


class Prefill(NamedTuple):
    """A program makes `tokens` x 128, or twice that with `two`."""

    tokens: int  # 64 or 128
    two: str  # "none", "tokens", "outputs"
    warps: int
    stages: int
    tma: bool  # of weights, and of x where rows are its own
    group: int  # row tiles that are walked together, so that they find the weights in L2


def prefill_config() -> Prefill:
    """The portable kernel's, from the sweep of 2026-11-22 on an H100."""
    return Prefill(128, "none", warps=8, stages=4, tma=True, group=8)


def config_on(
    device: torch.device, out_dtype: torch.dtype, expected_rows: int, num_outputs: int
) -> Prefill | GluonPrefill:
    """The kernel for Hopper alone where it runs: there it is 1.4 to 1.6 times as fast as the portable one.

    Its larger tile is faster for its work, but an expert's last one is half empty.
    """
    if not (is_hopper(device) and fits_gluon(num_outputs, out_dtype)):
        return prefill_config()
    if expected_rows >= 256:
        return GluonPrefill(256, stages=3, group=4, programs=num_sms(device))
    return GluonPrefill(128, stages=5, group=8, programs=num_sms(device))


def launch_prefill(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    out: Tensor,
    config: Prefill | GluonPrefill,
) -> None:
    if isinstance(config, GluonPrefill):
        launch_grouped_gluon(x, x_scales, weights, weight_scales, offsets, rows, out, config)
        return
    num_rows, (num_experts, num_outputs, num_inputs) = out.shape[0], weights.shape
    flat = weights.view(num_experts * num_outputs, num_inputs)
    tile_rows = config.tokens * (2 if config.two == "tokens" else 1)
    columns = BLOCK * (2 if config.two == "outputs" else 1)
    max_row_tiles = num_rows // tile_rows + num_experts
    tma_x = config.tma and rows is None
    _prefill_kernel[(max_row_tiles * triton.cdiv(num_outputs, columns),)](
        TensorDescriptor.from_tensor(x, [config.tokens, BLOCK]) if tma_x else x,
        x_scales,
        TensorDescriptor.from_tensor(flat, [BLOCK, BLOCK]) if config.tma else flat,
        weight_scales,
        offsets,
        rows if rows is not None else offsets,
        out,
        num_experts,
        num_outputs,
        num_inputs,
        *x_scales.stride(),
        BITS=(num_experts - 1).bit_length(),
        BT=config.tokens,
        TWO_X=config.two == "tokens",
        TWO_W=config.two == "outputs",
        GATHER=rows is not None,
        TMA_X=tma_x,
        TMA_W=config.tma,
        GROUP=config.group,
        STAGES=config.stages,
        num_warps=config.warps,
    )


@triton.jit(do_not_specialize=["E", "x_scale_stride_k"])
def _prefill_kernel(
    x,  # [T, K] e4m3
    x_scales,  # [T, K / 128] f32
    weights,  # [e * N, K] e4m3
    weight_scales,  # [e, ceil(N / 128), K / 128] f32
    offsets,  # [e + 1]
    source_rows,  # [R], if GATHER
    out,  # [R, N]
    E,
    N,
    K,
    x_scale_stride_t,
    x_scale_stride_k,
    BITS: tl.constexpr,  # of the last expert's number
    BT: tl.constexpr,
    TWO_X: tl.constexpr,
    TWO_W: tl.constexpr,
    GATHER: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = BT * 2 if TWO_X else BT
    COLUMNS: tl.constexpr = 256 if TWO_W else 128
    # Row tiles are numbered so that an expert's first one needs nobody else's count: every expert has room
    # for one tile that is not full, and some numbers stay empty: no blocks, no rows. (Prefix sums, or a
    # branch around the loop, would end specialization of warps.)
    num_t = tl.load(offsets + E) // ROWS + E
    num_n = tl.cdiv(N, COLUMNS)
    # Down GROUP row tiles, then to the next column.
    first_t = tl.program_id(0) // (GROUP * num_n) * GROUP
    height = tl.maximum(tl.minimum(num_t - first_t, GROUP), 1)
    place = tl.program_id(0) % (GROUP * num_n)
    tile_t = first_t + place % height
    n0 = place // height * COLUMNS
    expert = tl.full((), 0, tl.int32)  # becomes the last that begins at or before the tile
    for bit in tl.static_range(BITS):
        later = expert + (1 << (BITS - 1 - bit))
        begin = tl.load(offsets + tl.minimum(later, E)) // ROWS + later
        expert = tl.where((later < E) & (begin <= tile_t), later, expert)
    r0 = tl.load(offsets + expert)
    r0 += (tile_t - r0 // ROWS - expert) * ROWS
    end = tl.load(offsets + expert + 1)
    exists = (r0 < end) & (n0 < N)
    r = r0 + tl.arange(0, BT)
    n = n0 + tl.arange(0, 128)
    rows = tl.maximum(tl.minimum(r, end - 1), 0).to(tl.int64)
    more_rows = tl.maximum(tl.minimum(r + BT, end - 1), 0).to(tl.int64)
    source = tl.load(source_rows + rows).to(tl.int64) if GATHER else rows
    more_source = tl.load(source_rows + more_rows).to(tl.int64) if GATHER else more_rows
    num_blocks = K // 128
    num_scales = tl.cdiv(N, 128)
    weight_row = expert.to(tl.int64) * N
    acc, more = tokens_by_weights(
        x,
        source,
        more_source,
        r0,
        x_scales + source * x_scale_stride_t,
        x_scales + more_source * x_scale_stride_t,
        x_scale_stride_k,
        weights,
        weight_row + tl.minimum(n, N - 1),
        weight_row + tl.minimum(n + 128, N - 1),
        expert * N + n0,
        weight_scales + (expert * num_scales + n0 // 128) * num_blocks,
        weight_scales + (expert * num_scales + tl.minimum(n0 // 128 + 1, num_scales - 1)) * num_blocks,
        tl.where(exists, num_blocks, 0),
        K,
        BT,
        TWO_X,
        TWO_W,
        TMA_X,
        TMA_W,
        STAGES,
    )
    pointers = out + r.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, acc.to(out.dtype.element_ty), mask=(r < end)[:, None] & (n < N)[None, :])
    if TWO_X:
        fits = (r + BT < end)[:, None] & (n < N)[None, :]
        tl.store(pointers + BT * N, more.to(out.dtype.element_ty), mask=fits)
    if TWO_W:
        fits = (r < end)[:, None] & (n + 128 < N)[None, :]
        tl.store(pointers + 128, more.to(out.dtype.element_ty), mask=fits)

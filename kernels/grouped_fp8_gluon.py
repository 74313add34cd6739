"""`grouped_fp8_gemm` for many rows an expert, for NVIDIA Hopper alone: the kernel in `fp8_tiles_gluon.py`.

Small kernels go before it: one numbers the row tiles that the experts' counts make, one lays scales out tile
by tile (TMA fetches from multiples of 16 bytes), and where rows are not x's own one gathers them (TMA on
Hopper fetches rows only as they follow one another).
Shapes: T tokens, R rows (upper bound), e experts, K inputs (a multiple of 128), N outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8_gemm_gluon import GluonPrefill, launch_tiles


def launch_grouped_gluon(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    out: Tensor,
    config: GluonPrefill,
) -> None:
    """Fill `out`, [R, N] bf16 with N a multiple of 8, but for rows from offsets[e] on."""
    num_rows, (num_experts, num_outputs, num_inputs) = out.shape[0], weights.shape
    max_tiles = num_rows // config.tokens + num_experts
    tiles = torch.empty(1 + 3 * max_tiles, dtype=torch.int32, device=x.device)
    _number_tiles[(triton.cdiv(max_tiles, 128),)](
        offsets, tiles, num_experts, max_tiles, ROWS=config.tokens, E=triton.next_power_of_2(num_experts)
    )
    scales = _arranged(x_scales, tiles, rows, max_tiles, config.tokens)
    if rows is not None:
        x = _gathered(x, rows, offsets, num_rows)
    launch_tiles(
        x,
        scales,
        weights.view(num_experts * num_outputs, num_inputs),
        weight_scales,
        tiles,
        out,
        num_outputs,
        max_tiles,
        config,
    )


def _arranged(x_scales: Tensor, tiles: Tensor, rows: Tensor | None, max_tiles: int, tile_rows: int) -> Tensor:
    num_blocks = x_scales.shape[1]
    out = torch.empty(num_blocks, max_tiles * tile_rows, dtype=torch.float32, device=x_scales.device)
    _arrange_scales[(max_tiles, triton.cdiv(num_blocks, 8))](
        x_scales,
        tiles,
        rows if rows is not None else tiles,
        out,
        num_blocks,
        *x_scales.stride(),
        out.shape[1],
        GATHER=rows is not None,
        ROWS=tile_rows,
    )
    return out.t()


def _gathered(x: Tensor, rows: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
    num_words = x.shape[1] // 4
    out = torch.empty(num_rows, x.shape[1], dtype=x.dtype, device=x.device)
    _gather_rows[(triton.cdiv(num_rows, 16), triton.cdiv(num_words, 512))](
        x.view(torch.int32), rows, offsets, out.view(torch.int32), offsets.shape[0] - 1, num_words
    )
    return out


@triton.jit(do_not_specialize=["num_experts", "max_tiles"])
def _number_tiles(
    offsets,  # [e + 1]
    tiles,  # [1 + 3 * max_tiles]: how many there are, then expert, first row and the expert's end of each
    num_experts,
    max_tiles,
    ROWS: tl.constexpr,
    E: tl.constexpr,
):
    experts = tl.arange(0, E)
    begins = tl.load(offsets + tl.minimum(experts, num_experts)).to(tl.int32)
    ends = tl.load(offsets + tl.minimum(experts + 1, num_experts)).to(tl.int32)
    counts = (ends - begins + ROWS - 1) // ROWS
    before = tl.cumsum(counts, 0)  # tiles of an expert and of all before it
    total = tl.sum(counts, 0)
    tile = tl.program_id(0) * 128 + tl.arange(0, 128)
    expert = tl.sum((before[None, :] <= tile[:, None]).to(tl.int32), 1)
    mine = expert[:, None] == experts[None, :]
    first = tl.sum(tl.where(mine, (begins - (before - counts) * ROWS)[None, :], 0), 1) + tile * ROWS
    end = tl.sum(tl.where(mine, ends[None, :], 0), 1)
    if tl.program_id(0) == 0:
        tl.store(tiles, total)
    exists = tile < tl.minimum(total, max_tiles)
    tl.store(tiles + 1 + 3 * tile, expert, mask=exists)
    tl.store(tiles + 2 + 3 * tile, first, mask=exists)
    tl.store(tiles + 3 + 3 * tile, end, mask=exists)


@triton.jit(do_not_specialize=["num_blocks", "x_scale_stride_k", "out_stride"])
def _arrange_scales(
    x_scales,  # [T, K / 128]
    tiles,  # table of row tiles
    rows,  # [R], if GATHER
    out,  # [K / 128, max_tiles * ROWS]
    num_blocks,
    x_scale_stride_t,
    x_scale_stride_k,
    out_stride,
    GATHER: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile >= tl.load(tiles):
        return
    nth = tl.arange(0, ROWS)
    row = tl.load(tiles + 2 + 3 * tile) + nth
    exists = row < tl.load(tiles + 3 + 3 * tile)
    if GATHER:
        row = tl.load(rows + row, mask=exists, other=0)
    block = tl.program_id(1) * 8 + tl.arange(0, 8)
    at = row.to(tl.int64)[None, :] * x_scale_stride_t + block[:, None] * x_scale_stride_k
    mask = (block < num_blocks)[:, None]
    scales = tl.load(x_scales + at, mask=mask & exists[None, :], other=0.0)
    tl.store(out + block[:, None] * out_stride + (tile * ROWS + nth)[None, :], scales, mask=mask)


@triton.jit(do_not_specialize=["num_experts"])
def _gather_rows(
    source,  # [T, W] words of four e4m3
    rows,  # [R]
    offsets,  # [e + 1]
    out,  # [R, W]
    num_experts,
    W,
):
    row = tl.program_id(0) * 16 + tl.arange(0, 16)
    word = tl.program_id(1) * 512 + tl.arange(0, 512)
    exists = row < tl.load(offsets + num_experts)
    from_row = tl.load(rows + row, mask=exists, other=0).to(tl.int64)
    mask = exists[:, None] & (word < W)[None, :]
    words = tl.load(source + from_row[:, None] * W + word[None, :], mask=mask)
    tl.store(out + row.to(tl.int64)[:, None] * W + word[None, :], words, mask=mask)

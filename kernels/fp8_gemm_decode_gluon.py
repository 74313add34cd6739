"""The decode forms of `fp8_gemm` and `grouped_fp8_gemm` for NVIDIA Hopper alone, in Gluon.

    out[t, n] = sum_b  x_scale[t, b] * weight_scale[n // 128, b] * (sum_k in b  x[t, k] * weight[n, k])
One warp (four, where rows are gathered) fetches into a ring of stages and runs ahead over the ends of tiles;
one or two groups of four warps multiply, each all tokens of the tile by its own outputs. Tokens are rows: a
thread then needs the scales of few of them. A stage holds two blocks of K, so that one's product is scaled
while the other's is made. Two programs share a processor where they fit: one fetches while the other ends.
Shapes: T tokens, R rows of the result, e experts, K inputs, N outputs, S splits of K, G groups that multiply.
"""

from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.device import shared_bytes
from kernels.fp8_tiles import BLOCK
from kernels.gluon_layouts import stored_layout
from kernels.split_sum import parts_of, split_counters

_BLOCKS = 2  # of K, in a stage


class GluonDecode(NamedTuple):
    """A program makes `tokens` x (`groups` * `outputs`) over a share of K's blocks."""

    tokens: int  # 64 or 128
    outputs: int  # of a group of warps: 32 or 64
    groups: int  # 1 or 2
    splits: int
    stages: int
    residents: int  # programs on a processor: 2 with one group only


def decode_config(num_rows: int, num_outputs: int, num_inputs: int, sms: int) -> GluonDecode:
    """For 33 to 256 rows; from the sweeps of 2026-11-22 on an H100.

    A sum over splits costs 1.4 us and more, so tiles are narrow rather than split, as long as all processors
    have work; yet each tile reads the tokens again, so they are no narrower than that.
    """
    row_tiles = triton.cdiv(num_rows, 64)
    tiles = triton.cdiv(num_outputs, 64) * row_tiles
    if row_tiles > 1 and tiles >= 100 and (row_tiles > 2 or num_inputs >= 8192):
        return _filled(128, 64, 1, 1, residents=1)
    outputs, splits = 64, 1
    if tiles < 100 or (row_tiles == 1 and tiles > 2 * sms):
        outputs = 32
        tiles = triton.cdiv(num_outputs, outputs) * row_tiles
        splits = max(1, min(sms // tiles, num_inputs // BLOCK // 14))
    # Where two tiles of tokens read the same weights at once, a deep ring beats room for a second program.
    residents = 1 if row_tiles > 1 and outputs == 64 and tiles <= sms else 2
    return _filled(64, outputs, 1, splits, residents=residents)


def grouped_decode_config(expected_rows: int) -> GluonDecode:
    """For up to 128 rows an expert; from the same sweep."""
    if expected_rows <= 64:
        return _filled(64, 64, 1, 1, residents=2)
    return _filled(128, 64, 2, 1, residents=1)


def _filled(tokens: int, outputs: int, groups: int, splits: int, *, residents: int) -> GluonDecode:
    """With as many stages as shared memory holds."""
    stage = _BLOCKS * ((tokens + outputs * groups) * BLOCK + 4 * tokens)
    # On their way to the result 16 bytes of every thread pass through shared memory.
    stages = (shared_bytes(residents) - groups * 2048) // (stage + 16)
    return GluonDecode(tokens, outputs, groups, splits, stages, residents)


def launch_dense(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    weight_scales: Tensor,
    out: Tensor,
    config: GluonDecode,
    sms: int,
) -> None:
    """x [T, K] by weight [N, K] into out [T, N]."""
    _launch(x, x_scales, weight, weight_scales, None, None, out, weight.shape[0], config, sms)


def launch_grouped(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    out: Tensor,
    config: GluonDecode,
    sms: int,
) -> None:
    """x [T, K] or its `rows` by weights [e, N, K] into out [R, N]."""
    num_outputs = weights.shape[1]
    flat = weights.view(-1, weights.shape[2])
    _launch(x, x_scales, flat, weight_scales, offsets, rows, out, num_outputs, config, sms)


def _launch(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,  # [e * N, K]
    weight_scales: Tensor,
    offsets: Tensor | None,
    rows: Tensor | None,
    out: Tensor,
    num_outputs: int,
    config: GluonDecode,
    sms: int,
) -> None:
    tiles_n = triton.cdiv(num_outputs, config.outputs * config.groups)
    # Tiles of tokens, or experts.
    outer = triton.cdiv(x.shape[0], config.tokens) if offsets is None else weight.shape[0] // num_outputs
    num_tiles = outer * tiles_n * config.groups
    parts = parts_of(num_tiles, config.splits, config.tokens * config.outputs, x.device, "fp8_gemm")
    num_work = outer * tiles_n * config.splits
    producers = 1 if rows is None else 4
    _decode[(min(num_work, sms * config.residents),)](
        _described(x, config.tokens) if rows is None else x,
        x_scales,
        _described(weight, config.outputs),
        weight_scales,
        x if offsets is None else offsets,
        x if rows is None else rows,
        out,
        parts,
        split_counters(x.device),
        x.shape[0],
        num_outputs,
        x.shape[1],
        num_work,
        *x_scales.stride(),
        BT=config.tokens,
        BN=config.outputs,
        GROUPS=config.groups,
        SPLITS=config.splits,
        STAGES=config.stages,
        KB=_BLOCKS,
        GROUPED=offsets is not None,
        GATHER=rows is not None,
        PRODUCERS=producers,
        num_warps=4,
        maxnreg=None if config.residents == 1 else 128,
    )


def _described(matrix: Tensor, rows: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for([rows, BLOCK], gl.float8e4nv)
    return TensorDescriptor.from_tensor(matrix, [rows, BLOCK], layout)


@gluon.jit
def _work_of(
    work, offsets, T, tiles_n, BT: gl.constexpr, SPLITS: gl.constexpr, GROUPED: gl.constexpr
):  # fmt: skip
    """A piece of work's expert or tile of tokens, tile of outputs, split of K, first row, and end of rows."""
    if GROUPED:
        outer = work // tiles_n
        tile_n = work % tiles_n
        split = 0
        begin = gl.load(offsets + outer)
        end = gl.load(offsets + outer + 1)
    else:
        # Tiles that share weights run side by side.
        tiles_t = gl.cdiv(T, BT)
        outer = work % tiles_t
        split = work // tiles_t % SPLITS
        tile_n = work // tiles_t // SPLITS
        begin = outer * BT
        end = gl.minimum(begin + BT, T)
    return outer, tile_n, split, begin, end


@gluon.jit
def _produce(
    sources, ring, shape, BT: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr, SPLITS: gl.constexpr,
    STAGES: gl.constexpr, KB: gl.constexpr, GROUPED: gl.constexpr, GATHER: gl.constexpr,
    PRODUCERS: gl.constexpr,
):  # fmt: skip
    """Fetch tokens, their scales and weights, block after block of K, into the ring."""
    x, x_scales, weight, source_rows, scale_stride_t, scale_stride_k = sources
    x_tiles, scale_tiles, weight_tiles, ready, free = ring
    offsets, T, N, K, num_work = shape
    ROWS: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [PRODUCERS, 1], [1, 0])
    SCALES: gl.constexpr = gl.BlockedLayout([1], [32], [PRODUCERS], [0])
    BYTES: gl.constexpr = KB * (GROUPS * BN * 128 + (0 if GATHER else BT * 128))
    tiles_n = gl.cdiv(N, BN * GROUPS)
    num_blocks = K // 128
    pieces = gl.cdiv(num_blocks, KB)
    t = gl.arange(0, BT, layout=SCALES)
    t_wide = gl.arange(0, BT, layout=gl.SliceLayout(1, ROWS))
    inputs = gl.arange(0, 128, layout=gl.SliceLayout(0, ROWS))
    step = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        outer, tile_n, split, begin, end = _work_of(work, offsets, T, tiles_n, BT, SPLITS, GROUPED)
        first_n = tile_n * (BN * GROUPS) + (outer * N if GROUPED else 0)
        for first in range(begin, end, BT):
            source = gl.minimum(first + t, end - 1).to(gl.int64)
            if GATHER:
                source = gl.load(source_rows + source).to(gl.int64)
                there = first + t_wide < end
                wide = gl.load(source_rows + gl.minimum(first + t_wide, end - 1)).to(gl.int64)
                x_pointers = x + (wide * K)[:, None] + inputs[None, :]
            scales = x_scales + source * scale_stride_t
            for piece in range(pieces * split // SPLITS, pieces * (split + 1) // SPLITS):
                stage = step % STAGES
                # A stage's first use waits for the phase before the first, which counts as over.
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(stage), BYTES)
                for kb in gl.static_range(KB):
                    k = (piece * KB + kb) * 128  # beyond K zeros are fetched, and any scales
                    for group in gl.static_range(GROUPS):
                        tma.async_copy_global_to_shared(
                            weight,
                            [first_n + group * BN, k],
                            ready.index(stage),
                            weight_tiles.index((stage * KB + kb) * GROUPS + group),
                        )
                    x_tile = x_tiles.index(stage * KB + kb)
                    if GATHER:
                        fits = there[:, None] & (k + inputs < K)[None, :]
                        async_copy.async_copy_global_to_shared(x_tile, x_pointers + k, mask=fits)
                    else:
                        tma.async_copy_global_to_shared(x, [first, k], ready.index(stage), x_tile)
                    block = gl.minimum(piece * KB + kb, num_blocks - 1)
                    async_copy.async_copy_global_to_shared(
                        scale_tiles.index(stage * KB + kb), scales + block * scale_stride_k
                    )
                async_copy.mbarrier_arrive(ready.index(stage), increment_count=False)
                step += 1
    async_copy.wait_group(0)


@gluon.jit
def _store(acc, out, first_row, end, first_column, N, STORED: gl.constexpr):
    """Sixteen bytes a thread, of rows up to `end`: four times fewer stores than of what wgmma leaves it."""
    rows = first_row + gl.arange(0, acc.shape[0], layout=gl.SliceLayout(1, STORED))
    columns = first_column + gl.arange(0, acc.shape[1], layout=gl.SliceLayout(0, STORED))
    gl.store(
        out + rows.to(gl.int64)[:, None] * N + columns[None, :],
        gl.convert_layout(acc.to(out.dtype.element_ty), STORED),
        mask=(rows < end)[:, None] & (columns < N)[None, :],
    )


@gluon.jit
def _consume(
    group, ring, shape, results, BT: gl.constexpr, BN: gl.constexpr, GROUPS: gl.constexpr,
    SPLITS: gl.constexpr, STAGES: gl.constexpr, KB: gl.constexpr, GROUPED: gl.constexpr,
    GATHER: gl.constexpr,
):  # fmt: skip
    """Multiply what the ring holds, for the group's outputs; the last of a tile's splits adds them up."""
    x_tiles, scale_tiles, weight_tiles, ready, free = ring
    offsets, T, N, K, num_work = shape
    weight_scales, out, parts, counters = results
    SUM: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    tiles_n = gl.cdiv(N, BN * GROUPS)
    num_blocks = K // 128
    pieces = gl.cdiv(num_blocks, KB)
    t = gl.arange(0, BT, layout=gl.SliceLayout(1, SUM))
    columns = gl.arange(0, BN, layout=gl.SliceLayout(0, SUM))
    nothing = gl.zeros((BT, BN), gl.float32, SUM)
    step = 0
    for work in range(gl.program_id(0), num_work, gl.num_programs(0)):
        outer, tile_n, split, begin, end = _work_of(work, offsets, T, tiles_n, BT, SPLITS, GROUPED)
        first_n = (tile_n * GROUPS + group) * BN
        scale_row = gl.minimum(first_n, N - 1) // 128 + (outer * gl.cdiv(N, 128) if GROUPED else 0)
        scales = weight_scales + scale_row * num_blocks
        first_piece, last_piece = pieces * split // SPLITS, pieces * (split + 1) // SPLITS
        for first in range(begin, end, BT):
            acc = gl.zeros((BT, BN), gl.float32, SUM)
            ahead = gl.load(scales + gl.minimum(first_piece * KB, num_blocks - 1))
            more_ahead = gl.load(scales + gl.minimum(first_piece * KB + 1, num_blocks - 1))
            for piece in range(first_piece, last_piece):
                stage = step % STAGES
                scale = ahead
                ahead = gl.load(scales + gl.minimum((piece + 1) * KB, num_blocks - 1))
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if GATHER:
                    fence_async_shared()
                at = stage * KB
                token = warpgroup_mma(
                    x_tiles.index(at),
                    weight_tiles.index(at * GROUPS + group).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
                more_scale = more_ahead
                more_ahead = gl.load(scales + gl.minimum((piece + 1) * KB + 1, num_blocks - 1))
                more_token = warpgroup_mma(
                    x_tiles.index(at + 1),
                    weight_tiles.index((at + 1) * GROUPS + group).permute((1, 0)),
                    nothing,
                    use_acc=False,
                    is_async=True,
                )
                x_scale = scale_tiles.index(at).load(gl.SliceLayout(1, SUM)) * scale
                more_x_scale = scale_tiles.index(at + 1).load(gl.SliceLayout(1, SUM)) * more_scale
                # While one block's product is scaled, the next is made.
                product = warpgroup_mma_wait(1, deps=[token])
                acc += product * x_scale[:, None]
                product = warpgroup_mma_wait(0, deps=[more_token])
                gl.thread_barrier()  # a wait is one warp's own
                mbarrier.arrive(free.index(stage))
                acc += product * more_x_scale[:, None]
                step += 1
            if SPLITS == 1:
                _store(acc, out, first, end, first_n, N, stored_layout(BT, BN))
            else:
                rows = first + t
                n = first_n + columns
                fits = (rows < end)[:, None] & (n < N)[None, :]
                tile = (outer * tiles_n + tile_n) * GROUPS + group
                part = parts + tile.to(gl.int64) * (SPLITS * BT * BN)
                part += t[:, None] * BN + columns[None, :]
                gl.store(part + split * (BT * BN), acc, mask=fits)
                gl.thread_barrier()  # all threads have written before one of them counts
                if gl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1:
                    acc = gl.load(part, mask=fits, other=0.0, cache_modifier=".cg")
                    for other in gl.static_range(1, SPLITS):
                        acc += gl.load(part + other * (BT * BN), mask=fits, other=0.0, cache_modifier=".cg")
                    gl.store(counters + tile, 0)
                    _store(acc, out, first, end, first_n, N, stored_layout(BT, BN))


@gluon.jit(do_not_specialize=["T", "num_work", "scale_stride_k"])
def _decode(
    x,  # [T, K] e4m3: a descriptor, or with GATHER a pointer
    x_scales,  # [T, K / 128] f32
    weight,  # [e * N, K] e4m3
    weight_scales,  # [e, ceil(N / 128), K / 128] f32
    offsets,  # [e + 1], if GROUPED
    source_rows,  # [R], if GATHER
    out,  # [R, N]
    parts,  # [tiles, S, BT, BN] f32
    counters,  # [tiles] i32
    T,
    N,
    K,
    num_work,
    scale_stride_t,
    scale_stride_k,
    BT: gl.constexpr,
    BN: gl.constexpr,
    GROUPS: gl.constexpr,
    SPLITS: gl.constexpr,
    STAGES: gl.constexpr,
    KB: gl.constexpr,
    GROUPED: gl.constexpr,
    GATHER: gl.constexpr,
    PRODUCERS: gl.constexpr,
):
    X_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BT, 128], gl.float8e4nv)
    W_SHARED: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, 128], gl.float8e4nv)
    SCALES: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    x_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KB, BT, 128], X_SHARED)
    weight_tiles = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * KB * GROUPS, BN, 128], W_SHARED)
    scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * KB, BT], SCALES)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # Every fetching thread's copies have landed, and TMA's bytes.
        mbarrier.init(ready.index(stage), count=32 * PRODUCERS + 1)
        mbarrier.init(free.index(stage), count=GROUPS)
    fence_async_shared()
    gl.thread_barrier()

    # What both kinds of warps are given is passed as one tuple; constants in it would become variables.
    ring = (x_tiles, scale_tiles, weight_tiles, ready, free)
    shape = (offsets, T, N, K, num_work)
    sources = (x, x_scales, weight, source_rows, scale_stride_t, scale_stride_k)
    results = (weight_scales, out, parts, counters)
    # fmt: off
    if GROUPS == 1:
        gl.warp_specialize(
            [
                (_consume, (0, ring, shape, results, BT, BN, GROUPS, SPLITS, STAGES, KB, GROUPED, GATHER)),
                (
                    _produce,
                    (sources, ring, shape, BT, BN, GROUPS, SPLITS, STAGES, KB, GROUPED, GATHER, PRODUCERS),
                ),
            ],
            [PRODUCERS],
            [56],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, ring, shape, results, BT, BN, GROUPS, SPLITS, STAGES, KB, GROUPED, GATHER)),
                (_consume, (1, ring, shape, results, BT, BN, GROUPS, SPLITS, STAGES, KB, GROUPED, GATHER)),
                (
                    _produce,
                    (sources, ring, shape, BT, BN, GROUPS, SPLITS, STAGES, KB, GROUPED, GATHER, PRODUCERS),
                ),
            ],
            [4, PRODUCERS],
            [216, 56],
        )
    # fmt: on

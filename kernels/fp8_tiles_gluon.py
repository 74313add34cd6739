"""The kernel of `fp8_gemm_gluon.py` and `grouped_fp8_gluon.py`, for NVIDIA Hopper alone, in Gluon.

In plain Triton the warps that multiply also load, wait and scale, all at the same time, and the tensor cores
stand still meanwhile. Here one warp loads, by TMA, into a ring of stages that runs on from tile to tile; two
warp groups, each for half of the tile's rows, multiply a block of 128 of K and add the scaled product to fp32
registers. Nothing but the stages' barriers joins the two groups, so one scales while the other multiplies.
Programs stay for many tiles: what the ring holds at a tile's end are already the next one's operands.
Shapes: T rows, K inputs (a multiple of 128), N outputs, e experts.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _units(row_tiles, N, NARROW: gl.constexpr):
    """How many full tiles, and how many units of work: these, then pairs of tiles of the last, half column.

    A tile of 64 columns takes little more than half the time of one of 128: in pairs the units are alike.
    """
    if NARROW:
        full = row_tiles * (N // 128)
        units = full + gl.cdiv(row_tiles, 2)
    else:
        full = row_tiles * gl.cdiv(N, 128)
        units = full
    return full, units


@gluon.jit
def _tiles_of(unit, full, row_tiles, NARROW: gl.constexpr):
    count = 1
    if NARROW:
        count = gl.where(unit < full, 1, gl.minimum(2, row_tiles - 2 * (unit - full)))
    return count


@gluon.jit
def _tile_at(
    unit, nth, full, tiles, row_tiles, T, N, ROWS: gl.constexpr, GROUPED: gl.constexpr, NARROW: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """First row, last row + 1, where its scales begin, expert, first column.

    Down GROUP row tiles, then to the next column.
    """
    columns = N // 128 if NARROW else gl.cdiv(N, 128)
    first = unit // (GROUP * columns) * GROUP
    height = gl.maximum(gl.minimum(row_tiles - first, GROUP), 1)
    place = unit % (GROUP * columns)
    tile = first + place % height
    column = place // height * 128
    if NARROW:
        tile = gl.where(unit < full, tile, 2 * (unit - full) + nth)
        column = gl.where(unit < full, column, columns * 128)
    if GROUPED:
        expert = gl.load(tiles + 1 + 3 * tile)
        row = gl.load(tiles + 2 + 3 * tile)
        end = gl.load(tiles + 3 + 3 * tile)
    else:
        expert = 0
        row = tile * ROWS
        end = T
    return row, end, tile * ROWS, expert, column


@gluon.jit
def _produce(
    x, x_scales, weight, tiles, row_tiles, x_ring, scale_ring, w_ring, ready, free, T, N, K, x_scale_stride,
    ROWS: gl.constexpr, GROUPED: gl.constexpr, NARROW: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    PARTS: gl.constexpr = ROWS // 64
    step = 0
    full, units = _units(row_tiles, N, NARROW)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        for nth in range(_tiles_of(unit, full, row_tiles, NARROW)):
            row, _, scales_row, expert, column = _tile_at(
                unit, nth, full, tiles, row_tiles, T, N, ROWS, GROUPED, NARROW, GROUP
            )
            for block in range(K // 128):
                stage = step % STAGES
                # A stage's first use waits for the phase before the first, which counts as over.
                mbarrier.wait(free.index(stage), ((step // STAGES) & 1) ^ 1)
                landed = ready.index(stage)
                mbarrier.expect(landed, (ROWS + 128) * 128 + ROWS * 4)
                w_at = [expert * N + column, block * 128]
                tma.async_copy_global_to_shared(weight, w_at, landed, w_ring.index(stage))
                for part in gl.static_range(PARTS):
                    x_at = [row + 64 * part, block * 128]
                    tma.async_copy_global_to_shared(x, x_at, landed, x_ring.index(stage * PARTS + part))
                # Past the last row are the next block's scales, or zeros: of rows that nobody stores.
                for part in gl.static_range(PARTS):
                    at = [block * x_scale_stride + scales_row + 64 * part]
                    scales = scale_ring.index(stage * PARTS + part)
                    tma.async_copy_global_to_shared(x_scales, at, landed, scales)
                step += 1


@gluon.jit
def _store(acc, out_tile, out_described, out, row, end, column, N, COLUMNS: gl.constexpr, TILE: gl.constexpr):
    """64 rows, by TMA where all are the expert's and a tile is 128 columns (past N it stores nothing)."""
    acc = acc.to(gl.bfloat16)
    if COLUMNS == 128 and row + 64 <= end:
        out_tile.store(acc)
        fence_async_shared()
        tma.async_copy_shared_to_global(out_described, [row, column], out_tile)
    else:
        rows = row + gl.arange(0, 64, layout=gl.SliceLayout(1, TILE))
        columns = column + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, TILE))
        where = out + rows.to(gl.int64)[:, None] * N + columns[None, :]
        gl.store(where, acc, mask=(rows < end)[:, None] & (columns < N)[None, :])


@gluon.jit
def _multiply(
    half: gl.constexpr, weight_scale_at, out_described, out, x_ring, scale_ring, w_ring, out_tiles, ready,
    free, step, row, end, column, N, blocks, ROWS: gl.constexpr, COLUMNS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp group's half of a tile: 64 rows, or twice 64 with one set of registers for unscaled sums."""
    PARTS: gl.constexpr = ROWS // 64
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 32])
    SCALES: gl.constexpr = gl.SliceLayout(1, TILE)
    # Handed on though never added to: otherwise the compiler takes other registers each time, and spills.
    product = gl.zeros((64, COLUMNS), gl.float32, TILE)
    acc = gl.zeros((64, COLUMNS), gl.float32, TILE)
    more = gl.zeros((64, COLUMNS), gl.float32, TILE)
    weight_scale = gl.load(weight_scale_at)
    for block in range(blocks):
        here = weight_scale
        weight_scale = gl.load(weight_scale_at + gl.minimum(block + 1, blocks - 1))  # a block ahead
        stage = step % STAGES
        part = stage * PARTS + half * (PARTS // 2)
        mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
        w_tile = w_ring.index(stage)
        if COLUMNS < 128:
            w_tile = w_tile.slice(0, COLUMNS)
        w_tile = w_tile.permute((1, 0))
        token = warpgroup_mma(x_ring.index(part), w_tile, product, use_acc=False, is_async=True)
        scale = scale_ring.index(part).load(SCALES) * here
        if PARTS == 4:
            more_scale = scale_ring.index(part + 1).load(SCALES) * here
        product = warpgroup_mma_wait(0, deps=[token])
        if PARTS == 4:
            acc += product * scale[:, None]
            token = warpgroup_mma(x_ring.index(part + 1), w_tile, product, use_acc=False, is_async=True)
            product = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(free.index(stage))  # after a barrier, which it implies, of the warp group
        if PARTS == 4:
            more += product * more_scale[:, None]
        else:
            acc += product * scale[:, None]
        step += 1
    row += half * (ROWS // 2)
    tma.store_wait(0)
    first = half * (PARTS // 2)
    _store(acc, out_tiles.index(first), out_described, out, row, end, column, N, COLUMNS, TILE)
    if PARTS == 4:
        _store(more, out_tiles.index(first + 1), out_described, out, row + 64, end, column, N, COLUMNS, TILE)
    return step


@gluon.jit
def _consume(
    half: gl.constexpr, weight_scales, tiles, out_described, out, row_tiles, x_ring, scale_ring, w_ring,
    out_tiles, ready, free, T, N, K, ROWS: gl.constexpr, GROUPED: gl.constexpr, NARROW: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    blocks = K // 128
    step = 0
    full, units = _units(row_tiles, N, NARROW)
    for unit in range(gl.program_id(0), units, gl.num_programs(0)):
        for nth in range(_tiles_of(unit, full, row_tiles, NARROW)):
            row, end, _, expert, column = _tile_at(
                unit, nth, full, tiles, row_tiles, T, N, ROWS, GROUPED, NARROW, GROUP
            )
            weight_scale_at = weight_scales + (expert * gl.cdiv(N, 128) + column // 128) * blocks
            if NARROW:
                if unit < full:
                    step = _multiply(
                        half, weight_scale_at, out_described, out, x_ring, scale_ring, w_ring, out_tiles,
                        ready, free, step, row, end, column, N, blocks, ROWS, 128, STAGES,
                    )  # fmt: skip
                else:
                    step = _multiply(
                        half, weight_scale_at, out_described, out, x_ring, scale_ring, w_ring, out_tiles,
                        ready, free, step, row, end, column, N, blocks, ROWS, 64, STAGES,
                    )  # fmt: skip
            else:
                step = _multiply(
                    half, weight_scale_at, out_described, out, x_ring, scale_ring, w_ring, out_tiles, ready,
                    free, step, row, end, column, N, blocks, ROWS, 128, STAGES,
                )  # fmt: skip
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["row_tiles", "T", "x_scale_stride"])
def tiles_kernel(
    x,  # [T, K] e4m3, described
    x_scales,  # [K / 128 * x_scale_stride] f32, described; if GROUPED, tile by tile
    weight,  # [e * N, K] e4m3, described
    weight_scales,  # [e, ceil(N / 128), K / 128] f32
    tiles,  # if GROUPED: how many row tiles, then expert, first row, the expert's end of each
    out_described,  # [T, N] bf16
    out,
    row_tiles,  # unless GROUPED
    T,
    N,
    K,
    x_scale_stride,  # to the next block of K; to the next row it is 1
    ROWS: gl.constexpr,
    GROUPED: gl.constexpr,
    NARROW: gl.constexpr,  # the last column of tiles is 64 wide
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
):
    if GROUPED:
        row_tiles = gl.load(tiles)
    PARTS: gl.constexpr = ROWS // 64
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES * PARTS, 64, 128], x.layout)
    w_ring = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 128, 128], weight.layout)
    out_tiles = gl.allocate_shared_memory(gl.bfloat16, [PARTS, 64, 128], out_described.layout)
    scale_ring = gl.allocate_shared_memory(gl.float32, [STAGES * PARTS, 64], x_scales.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)  # both warp groups
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    0, weight_scales, tiles, out_described, out, row_tiles, x_ring, scale_ring, w_ring,
                    out_tiles, ready, free, T, N, K, ROWS, GROUPED, NARROW, GROUP, STAGES,
                ),
            ),
            (
                _consume,
                (
                    1, weight_scales, tiles, out_described, out, row_tiles, x_ring, scale_ring, w_ring,
                    out_tiles, ready, free, T, N, K, ROWS, GROUPED, NARROW, GROUP, STAGES,
                ),
            ),
            (
                _produce,
                (
                    x, x_scales, weight, tiles, row_tiles, x_ring, scale_ring, w_ring, ready, free, T, N, K,
                    x_scale_stride, ROWS, GROUPED, NARROW, GROUP, STAGES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip

"""A sum split over programs and put together in the launch that made its parts, in one fixed order.

Every program writes its part and counts itself; whoever finds that it is the last adds up the parts, always
in the order of the splits, so that the bits do not depend on who that is. The counter is left at zero for
the next launch (and the next replay of a CUDA graph). Shapes: S splits, a tile of BN x BT.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import require

MAX_TILES = 16384


@lru_cache(maxsize=16)
def split_counters(device: torch.device) -> Tensor:
    """[MAX_TILES] int32 zeros that all launches on a device share, so those that split sums must follow one
    another on one stream. Made at the first call, which must not be inside the capture of a graph: their
    memory would be the graph's, and zeroed by its replays alone."""
    require(
        device.type != "cuda" or not torch.cuda.is_current_stream_capturing(),
        "split_sum",
        "launch once before a graph is captured, so that its counters exist",
    )
    return torch.zeros(MAX_TILES, dtype=torch.int32, device=device)


def parts_of(num_tiles: int, splits: int, tile_size: int, device: torch.device, operation: str) -> Tensor:
    """Room for the parts, [tiles, S, tile size] float32; nothing where nothing is split."""
    if splits == 1:
        return torch.empty(0, dtype=torch.float32, device=device)
    require(num_tiles <= MAX_TILES, operation, f"{num_tiles} tiles of split sums are more than {MAX_TILES}")
    return torch.empty(num_tiles, splits, tile_size, dtype=torch.float32, device=device)


@triton.jit
def is_last_part(
    acc,  # [BN, BT] f32
    parts,  # of the tile: pointer to [S, BN * BT] f32
    counter,  # of the tile
    split,
    SPLITS: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    """Hand in a part; true for the one program that comes last."""
    offsets = tl.arange(0, BN)[:, None] * BT + tl.arange(0, BT)[None, :]
    tl.store(parts + split * (BN * BT) + offsets, acc)
    tl.debug_barrier()  # all threads have written before one of them counts
    return tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1


@triton.jit
def sum_of_parts(parts, counter, SPLITS: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr):
    """[BN, BT]; for the last program."""
    offsets = tl.arange(0, BN)[:, None] * BT + tl.arange(0, BT)[None, :]
    acc = tl.load(parts + offsets, cache_modifier=".cg")  # others wrote it: past the processor's own cache
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(parts + split * (BN * BT) + offsets, cache_modifier=".cg")
    tl.store(counter, 0)
    return acc

"""Products with a weight, y = x W^T, and the form of them in which a row's bits are its own.

A library picks the order of a product's sums by the number of rows and by addresses, so that a row alone and
the same row among others round differently. `deterministic` sends every row through products of a few fixed
numbers of rows, from aligned buffers filled up with zeros. That a row then comes out the same at every place
of every tile is the library's doing and is tried out when a model is made (`stable`), never assumed.
Shapes: T rows, K inputs, N outputs, H matrices (of attention heads).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch

# Rows of a product. Tiles of 4 and more make equal bits with MKL and oneDNN, those of 1 and 2 others. So a
# single row pays for four.
_TILES = (64, 16, 4)
_ALIGNED = 32  # columns are filled up to a multiple of this, so that every row begins at 64 bytes in bf16


def linear(x: Tensor, weight: Tensor, *, backend: Backend) -> Tensor:
    """Multiply rows with a weight, or the rows of each head with its own.

    Args:
        x: [T, K] or [H, T, K].
        weight: [N, K] or [H, N, K], same dtype.

    Returns:
        [T, N] or [H, T, N].
    """
    require(
        x.ndim == weight.ndim and x.shape[-1] == weight.shape[-1],
        "linear",
        f"x {tuple(x.shape)} does not fit weight {tuple(weight.shape)}",
    )
    if backend == "triton":
        return linear_fp32(x, weight, backend=backend).to(x.dtype)
    require_torch(backend, "linear")
    return linear_reference(x, weight) if backend == "reference" else linear_deterministic(x, weight)


def linear_fp32(x: Tensor, weight: Tensor, *, backend: Backend) -> Tensor:
    """Multiply rows with a weight in float32, whatever the rows are: gates, head weights, logits.

    Args:
        x: [T, K], any float dtype.
        weight: [N, K] float32, for `triton` bf16 like x: their products are exact in float32.

    Returns:
        [T, N] float32.
    """
    if backend == "triton":
        # cuBLAS: it reads a weight of many outputs once, whatever the number of rows.
        return torch.mm(x, weight.t(), out_dtype=torch.float32)
    return linear(x.float(), weight, backend=backend)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight) if weight.ndim == 2 else torch.bmm(x, weight.transpose(1, 2))


def linear_deterministic(x: Tensor, weight: Tensor) -> Tensor:
    num_rows, width = x.shape[-2:]
    if missing := -width % _ALIGNED:
        weight = F.pad(weight, (0, missing))
    results = []
    for start, size in _tiles(num_rows):
        rows = x[..., start : start + size, :]
        tile = x.new_zeros(*x.shape[:-2], size, width + missing)
        tile[..., : rows.shape[-2], :width] = rows
        results.append(linear_reference(tile, weight)[..., : rows.shape[-2], :])
    if not results:
        return x.new_empty(*x.shape[:-1], weight.shape[-2])
    return results[0] if len(results) == 1 else torch.cat(results, dim=-2)


def _tiles(num_rows: int) -> Iterator[tuple[int, int]]:
    """Start and size of tiles that cover the rows; the last one may reach beyond them."""
    start = 0
    for size in _TILES:
        while num_rows - start >= size:
            yield start, size
            start += size
    if start < num_rows:
        yield start, _TILES[-1]


def stable(weight: Tensor, *, backend: Backend) -> Tensor:
    """The weight, for `deterministic` contiguous and after a trial of products of its shape.

    Raises:
        UnsupportedKernel: rows change bits with their place or their neighbours here.
    """
    if backend != "deterministic":
        return weight
    _try_rows(tuple(weight.shape), weight.dtype, weight.device, torch.get_num_threads())
    return weight.contiguous()  # as in the trial: transposed ones run other code


@lru_cache(maxsize=256)
def _try_rows(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, num_threads: int) -> None:
    """Rows in tiles of every size, at other places, with other neighbours, and with one thread.

    Their products add up to zero, so that what comes out is rounding alone, which the order of sums decides
    and data do not: where the order differs, nearly every number does.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_rows, half = _TILES[0], shape[-1] // 2
    x = torch.randn(*shape[:-2], num_rows, half, generator=generator, device=device).to(dtype)
    x = F.pad(torch.cat([x, -x], dim=-1), (0, shape[-1] % 2))
    weight = torch.randn(*shape[:-1], half, generator=generator, device=device).to(dtype)
    weight = F.pad(torch.cat([weight, weight], dim=-1), (0, shape[-1] % 2))
    expected = linear_deterministic(x, weight)
    # Every row visits several places of the largest tile and all of the smallest one.
    same = all(
        torch.equal(linear_deterministic(x.roll(shift, -2), weight), expected.roll(shift, -2))
        for shift in (1, 6, num_rows // 2)
    )
    for size in (*_TILES[1:], _TILES[-1] - 1):  # the last among zeros
        parts = [linear_deterministic(part.roll(1, -2), weight).roll(-1, -2) for part in x.split(size, -2)]
        same = same and torch.equal(torch.cat(parts, -2), expected)
    if num_threads > 1:  # experts elsewhere run with one
        torch.set_num_threads(1)
        same = same and torch.equal(linear_deterministic(x, weight), expected)
        torch.set_num_threads(num_threads)
    require(
        same,
        "linear",
        f"'deterministic' cannot be had here: with weights {shape} of {dtype} the bits of a row change with "
        "its place or its neighbours in this machine's matrix library",
    )

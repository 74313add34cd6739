"""The sums of blocks of expert groups, from wherever they were made, added in the tree of `group_tree.py`.

    out[t] = the tree over parts[b][t], then + shared[t]; all in fp32, rounded once
What `expert_sum.py` does with rows of experts in one place, for sums that came from several. The parts lie in
mailboxes, each of its own, and are read once. Shapes: T tokens, D width, B blocks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.group_tree import add_all

MAX_BLOCKS = 8


@dataclass(frozen=True)
class _Config:
    """Numbers of a program, and its warps."""

    width: int
    num_warps: int


def block_sum(
    parts: Sequence[tuple[range, Tensor]], shared: Tensor | None, *, dtype: torch.dtype, backend: Backend
) -> Tensor:
    """Add the sums of all blocks.

    Args:
        parts: at most MAX_BLOCKS aligned blocks of groups, ascending, without gaps, and of each [T, D] bf16
            or float32, contiguous. They are left as they are.
        shared: [T, D], added last.
        dtype: of the result.

    Returns:
        [T, D] in memory of its own.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others.
    """
    require_triton_or_reference(backend, "block_sum")
    require(0 < len(parts) <= MAX_BLOCKS, "block_sum", f"{len(parts)} blocks, 1 to {MAX_BLOCKS} can be")
    tensors = [tensor for _, tensor in parts]
    first, everything = tensors[0], [*tensors, *([] if shared is None else [shared])]
    for tensor in everything:
        require(
            tensor.shape == first.shape and tensor.is_contiguous(),
            "block_sum",
            f"sums must be contiguous and of one shape: {tuple(tensor.shape)}, {tuple(first.shape)}",
        )
    require(len({tensor.dtype for tensor in tensors}) == 1, "block_sum", "sums must be of one dtype")
    if backend == "reference":
        return block_sum_reference(parts, shared, dtype=dtype)
    return _launch(parts, shared, dtype, _Config(width=1024, num_warps=4))


def block_sum_reference(
    parts: Sequence[tuple[range, Tensor]], shared: Tensor | None, *, dtype: torch.dtype
) -> Tensor:
    total: Tensor = add_all([(block, tensor.float()) for block, tensor in parts], torch.add)
    return (total if shared is None else total + shared.float()).to(dtype, copy=True)


def _launch(
    parts: Sequence[tuple[range, Tensor]], shared: Tensor | None, dtype: torch.dtype, config: _Config
) -> Tensor:
    first = parts[0][1]
    out = torch.empty(first.shape, dtype=dtype, device=first.device)
    if not out.numel():
        return out
    tensors = [tensor for _, tensor in parts]
    _block_sum[(triton.cdiv(out.numel(), config.width),)](
        *tensors,
        *[first] * (MAX_BLOCKS - len(tensors)),  # not read
        shared,
        out,
        out.numel(),
        BLOCKS=len(parts),
        ORDER=_order(parts),
        HAS_SHARED=shared is not None,
        WIDTH=config.width,
        num_warps=config.num_warps,
    )
    return out


def _order(parts: Sequence[tuple[range, Tensor]]) -> int:
    """The additions one after another, eight bits each: to which part, and which one."""
    additions: list[int] = []

    def add(left: int, right: int) -> int:
        additions.append(left | right << 4)
        return left

    add_all([(block, place) for place, (block, _) in enumerate(parts)], add)
    return sum(addition << 8 * n for n, addition in enumerate(additions))


@triton.jit
def _block_sum(
    part0, part1, part2, part3, part4, part5, part6, part7,  # [T * D], BLOCKS of them read
    shared_ptr,  # [T * D]
    out_ptr,  # [T * D]
    size,
    BLOCKS: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    is_there = at < size
    parts = (part0, part1, part2, part3, part4, part5, part6, part7)
    # Tuples grow by addition, as Triton knows no unpacking (and mypy no such tuple).
    sums = ()
    for b in tl.static_range(BLOCKS):  # all loads first, so that they are on their way together
        loaded = tl.load(parts[b] + at, mask=is_there, other=0.0).to(tl.float32)
        sums = sums + (loaded,)  # type: ignore[assignment]  # noqa: RUF005
    for n in tl.static_range(BLOCKS - 1):
        added = ()
        for b in tl.static_range(BLOCKS):
            grown = sums[b]  # type: ignore[var-annotated]
            if b == ((ORDER >> (8 * n)) & 15):
                grown = sums[b] + sums[(ORDER >> (8 * n + 4)) & 15]
            added = added + (grown,)  # type: ignore[assignment]  # noqa: RUF005
        sums = added
    total = sums[0]  # type: ignore[misc]
    if HAS_SHARED:
        total += tl.load(shared_ptr + at, mask=is_there, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=is_there)

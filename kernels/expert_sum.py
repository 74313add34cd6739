"""The weighted sum of what a token's experts gave, in an order that does not depend on where they ran.

    out[t] = sum over the groups of (sum over the token's experts in the group of weight * row) + shared[t]
Within a group experts are added in ascending order, groups in the tree of `group_tree.py`, all in fp32.
Shapes: T tokens, k experts a token, D width, R rows of experts' results, G groups.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.group_tree import add_all


@dataclass(frozen=True)
class _Config:
    """Channels of a program, and its warps."""

    width: int
    num_warps: int


def expert_sum(
    outputs: Tensor,
    places: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    group_size: int,
    first_group: int,
    num_groups: int,
    shared: Tensor | None,
    dtype: torch.dtype,
    backend: Backend,
) -> Tensor:
    """Sum one block of the tree of groups.

    Args:
        outputs: [R, D] bf16 or float32, the experts' rows.
        places: [T, k] int32, the row of a token's j-th expert; -1 where there is none.
        experts: [T, k] integer, global numbers, ascending in a row; weights: [T, k] float32.
        first_group, num_groups: the groups to add, a block of the tree: 2^j from a multiple of 2^j on.
            Experts outside them are left out.
        shared: [T, D], added last.
        dtype: of the result.

    Returns:
        [T, D].

    Raises:
        UnsupportedKernel: shapes or layouts are others, or the groups are no block of the tree.
    """
    require_triton_or_reference(backend, "expert_sum")
    require(
        num_groups > 0 and num_groups & (num_groups - 1) == 0 == first_group % num_groups,
        "expert_sum",
        f"{num_groups} groups from {first_group} are no block of the tree",
    )
    require(
        places.shape == experts.shape == weights.shape,
        "expert_sum",
        f"{places.shape}, {experts.shape} and {weights.shape} differ",
    )
    require(places.is_contiguous() and experts.is_contiguous(), "expert_sum", "places must be contiguous")
    require(weights.is_contiguous(), "expert_sum", "weights must be contiguous")
    require(
        shared is None or shared.shape == (places.shape[0], outputs.shape[1]),
        "expert_sum",
        f"shared is {() if shared is None else tuple(shared.shape)}, for {places.shape[0]} tokens of "
        f"{outputs.shape[1]} channels",
    )
    if backend == "reference":
        return expert_sum_reference(
            outputs,
            places,
            experts,
            weights,
            group_size=group_size,
            first_group=first_group,
            num_groups=num_groups,
            shared=shared,
            dtype=dtype,
        )
    require(
        outputs.stride(1) == 1 and (shared is None or shared.stride(1) == 1),
        "expert_sum",
        "the channels of a row must be contiguous",
    )
    config = _config_for(places.shape[0], outputs.shape[1])
    return _launch(
        outputs, places, experts, weights, group_size, first_group, num_groups, shared, dtype, config
    )


def expert_sum_reference(
    outputs: Tensor,
    places: Tensor,
    experts: Tensor,
    weights: Tensor,
    *,
    group_size: int,
    first_group: int,
    num_groups: int,
    shared: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    num_tokens, width = places.shape[0], outputs.shape[1]
    groups = torch.zeros(num_groups, num_tokens, width, device=outputs.device)
    for j in range(places.shape[1]):  # ascending experts
        group = experts[:, j] // group_size - first_group
        token = ((places[:, j] >= 0) & (group >= 0) & (group < num_groups)).nonzero().squeeze(1)
        rows = outputs[places[token, j].long()].float() * weights[token, j].unsqueeze(1)
        groups[group[token].long(), token] += rows
    leaves = zip((range(g, g + 1) for g in range(first_group, first_group + num_groups)), groups, strict=True)
    total: Tensor = add_all(leaves, torch.add)
    return (total if shared is None else total + shared.float()).to(dtype)


def _config_for(num_tokens: int, width: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100: eight rows, of 32 bytes for every thread, are on their way at
    once."""
    if num_tokens <= 256:
        return _Config(width=min(2048, triton.next_power_of_2(width)), num_warps=4)
    return _Config(width=min(1024, triton.next_power_of_2(width)), num_warps=2)


def _launch(
    outputs: Tensor,
    places: Tensor,
    experts: Tensor,
    weights: Tensor,
    group_size: int,
    first_group: int,
    num_groups: int,
    shared: Tensor | None,
    dtype: torch.dtype,
    config: _Config,
) -> Tensor:
    num_tokens, width = places.shape[0], outputs.shape[1]
    out = torch.empty(num_tokens, width, dtype=dtype, device=outputs.device)
    if out.numel():
        _expert_sum[(num_tokens, triton.cdiv(width, config.width))](
            outputs,
            places,
            experts,
            weights,
            shared,
            out,
            outputs.stride(0),
            0 if shared is None else shared.stride(0),
            width,
            GROUP_SIZE=group_size,
            FIRST_GROUP=first_group,
            NUM_GROUPS=num_groups,
            K=places.shape[1],
            WIDTH=config.width,
            HAS_SHARED=shared is not None,
            num_warps=config.num_warps,
        )
    return out


@triton.jit
def _expert_sum(
    outputs_ptr,  # [R, D]
    places_ptr,  # [T, K]
    experts_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    shared_ptr,  # [T, D]
    out_ptr,  # [T, D]
    outputs_stride,
    shared_stride,
    width,
    GROUP_SIZE: tl.constexpr,
    FIRST_GROUP: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_SHARED: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    in_row = columns < width
    # Tuples grow by addition, as Triton knows no unpacking (and mypy no such tuple).
    sums = ()
    for _ in tl.static_range(NUM_GROUPS):
        sums = sums + (tl.zeros([WIDTH], dtype=tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    rows = ()
    for j in tl.static_range(K):  # all loads first, so that they are on their way together
        place = tl.load(places_ptr + token * K + j).to(tl.int64)
        row = outputs_ptr + place * outputs_stride + columns
        loaded = tl.load(row, mask=in_row & (place >= 0), other=0.0)
        rows = rows + (loaded,)  # type: ignore[assignment]  # noqa: RUF005
    for j in tl.static_range(K):
        row = rows[j].to(tl.float32)
        group = tl.load(experts_ptr + token * K + j) // GROUP_SIZE - FIRST_GROUP
        weight = tl.load(weights_ptr + token * K + j)
        added = ()
        for g in tl.static_range(NUM_GROUPS):
            added = added + (sums[g] + row * tl.where(group == g, weight, 0.0),)  # noqa: RUF005
        sums = added
    for level in tl.static_range(8):  # the tree: neighbours, then pairs of them
        if NUM_GROUPS >> level > 1:
            pairs = ()
            for i in tl.static_range(NUM_GROUPS >> level + 1):
                pairs = pairs + (sums[2 * i] + sums[2 * i + 1],)  # type: ignore[assignment]  # noqa: RUF005
            sums = pairs
    total = sums[0]  # type: ignore[misc]
    if HAS_SHARED:
        total += tl.load(shared_ptr + token * shared_stride + columns, mask=in_row, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + columns, total.to(out_ptr.dtype.element_ty), mask=in_row)

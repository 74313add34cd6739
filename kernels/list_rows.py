"""The rows of each expert and of each group of experts, for who is told a choice, without asking the host.

`dispatch_plan.py` makes the choice and lists in one go; here the choice came from elsewhere, as that of a
gate on another GPU. The kernels stand in `dispatch_lists.py`. Few tokens take one launch, many two.
Shapes: T tokens, E experts, e of them held here, G groups, k experts a token.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.dispatch_lists import count_parts, list_all, list_parts


@dataclass(frozen=True)
class RoutedRows:
    """Where each token goes, and where its rows stand; all int32 but the weights.

    Attributes:
        experts: [T, k], global numbers, ascending in a row; weights: [T, k] float32.
        offsets: [e + 1]; the rows of the i-th expert held here are offsets[i] to offsets[i + 1].
        rows: [T * k], tokens by expert, ascending for each; only the first offsets[e] are written.
        places: [T, k], where in `rows` a token stands for its j-th expert; -1 where that is not held here.
        node_counts: [G], how many tokens have an expert in each group.
        node_tokens: [G, T], which, ascending; only the first node_counts[g] of a row are written.
    """

    experts: Tensor
    weights: Tensor
    offsets: Tensor
    rows: Tensor
    places: Tensor
    node_counts: Tensor
    node_tokens: Tensor


@dataclass(frozen=True)
class ListConfig:
    """Tokens of a part that is counted and placed by itself, 0 for all at once, at most 128; warps."""

    part_tokens: int
    num_warps: int

    def tokens_at_once(self, num_tokens: int) -> int:
        return self.part_tokens or _power_of_2(num_tokens)

    def readable(self, num_tokens: int, k: int) -> int:
        """Choices that are read without a mask."""
        at_once = self.tokens_at_once(num_tokens)
        return -(-num_tokens // at_once) * at_once * _power_of_2(k)


def list_rows(
    experts: Tensor,
    weights: Tensor,
    *,
    all_experts: int,
    num_groups: int,
    first_expert: int,
    num_experts: int,
    backend: Backend,
) -> RoutedRows:
    """List the rows of a choice.

    Args:
        experts: [T, k] int32, contiguous, ascending in a row, each from 0 to E - 1; weights: [T, k] float32.
        all_experts: E.
        first_expert, num_experts: the experts held here, e of them.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others; for `triton` E and G are powers of two.
    """
    require_triton_or_reference(backend, "list_rows")
    require(
        experts.dtype == torch.int32 and weights.dtype == torch.float32,
        "list_rows",
        f"experts must be int32 and weights float32, not {experts.dtype} and {weights.dtype}",
    )
    require(
        experts.ndim == 2 and experts.shape == weights.shape,
        "list_rows",
        f"experts {tuple(experts.shape)} and weights {tuple(weights.shape)} differ",
    )
    require(
        first_expert >= 0 and num_experts > 0 and first_expert + num_experts <= all_experts,
        "list_rows",
        f"experts {first_expert} and {num_experts} more are not among {all_experts}",
    )
    if backend == "reference":
        return list_rows_reference(
            experts,
            weights,
            all_experts=all_experts,
            num_groups=num_groups,
            first_expert=first_expert,
            num_experts=num_experts,
        )
    require(
        all_experts & (all_experts - 1) == 0 == num_groups & (num_groups - 1),
        "list_rows",
        f"{all_experts} experts in {num_groups} groups are no powers of two",
    )
    require(experts.is_contiguous(), "list_rows", "experts must be contiguous")
    return _launch(experts, weights, all_experts, num_groups, first_expert, num_experts)


def list_rows_reference(
    experts: Tensor,
    weights: Tensor,
    *,
    all_experts: int,
    num_groups: int,
    first_expert: int,
    num_experts: int,
) -> RoutedRows:
    """The same; the host asks the device."""
    num_tokens, k = experts.shape
    local = (experts - first_expert).flatten()
    held = (local >= 0) & (local < num_experts)
    order = torch.where(held, local, num_experts).argsort(stable=True)
    counts = torch.bincount(local[held], minlength=num_experts)
    num_held = int(counts.sum())
    rows = torch.full((num_tokens * k,), -1, dtype=torch.int32, device=experts.device)
    rows[:num_held] = (order[:num_held] // k).int()
    places = torch.full_like(rows, -1)
    places[order[:num_held]] = torch.arange(num_held, dtype=torch.int32, device=experts.device)
    nodes = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=experts.device)
    nodes.scatter_(1, experts.long() // (all_experts // num_groups), True)
    node_tokens = nodes.t().int().argsort(dim=1, descending=True, stable=True).int()
    return RoutedRows(
        experts=experts.int(),
        weights=weights,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        rows=rows,
        places=places.view(num_tokens, k),
        node_counts=nodes.sum(0).int(),
        node_tokens=node_tokens,
    )


def _power_of_2(at_least: int) -> int:
    return 1 << (at_least - 1).bit_length()


def list_config(num_tokens: int) -> ListConfig:
    """From the sweep of 2026-11-22 on an H100: at once costs tokens times experts, parts one more launch."""
    return ListConfig(part_tokens=0 if num_tokens <= 512 else 32, num_warps=8)


def _launch(
    experts: Tensor, weights: Tensor, all_experts: int, num_groups: int, first_expert: int, num_experts: int
) -> RoutedRows:
    routed = empty_lists(experts, weights, num_groups, num_experts)
    if len(experts):
        config = list_config(len(experts))
        launch_lists(experts, routed, all_experts, first_expert, config, is_choice=True)
    return routed


def empty_lists(experts: Tensor, weights: Tensor, num_groups: int, num_experts: int) -> RoutedRows:
    """Lists to be filled; of no tokens they are complete."""
    num_tokens, k = experts.shape

    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=experts.device)

    routed = RoutedRows(
        experts=experts,
        weights=weights,
        offsets=empty(num_experts + 1),
        rows=empty(num_tokens * k),
        places=empty(num_tokens, k),
        node_counts=empty(num_groups),
        node_tokens=empty(num_groups, num_tokens),
    )
    if num_tokens == 0:
        routed.offsets.zero_()
        routed.node_counts.zero_()
    return routed


def launch_lists(
    choices: Tensor,
    routed: RoutedRows,
    all_experts: int,
    first_expert: int,
    config: ListConfig,
    *,
    is_choice: bool,
) -> None:
    """Fill the lists of `routed`.

    Args:
        choices: its experts, [T, k] of any integer type. Narrow ones are quicker to read.
        is_choice: they are the experts themselves. Otherwise they are a copy that can be read beyond its end
            (`ListConfig.readable`), and `places` says already what is not held here.
    """
    num_tokens, k = routed.places.shape
    num_groups, num_experts = len(routed.node_counts), len(routed.offsets) - 1
    block_k = _power_of_2(k)
    lists = (routed.offsets, routed.rows, routed.places, routed.node_counts, routed.node_tokens)
    if not config.part_tokens:
        list_all[(num_experts + num_groups,)](
            choices,
            *lists,
            num_tokens,
            first_expert,
            K=k,
            BLOCK_K=block_k,
            GROUP_SIZE=all_experts // num_groups,
            NUM_EXPERTS=num_experts,
            TOKENS=config.tokens_at_once(num_tokens),
            IS_CHOICE=is_choice,
            num_warps=config.num_warps,
        )
        return
    num_parts = triton.cdiv(num_tokens, config.part_tokens)
    parts_stride = triton.cdiv(num_parts, 64) * 64  # they are read so many at a time
    counts = torch.empty(all_experts, parts_stride, dtype=torch.uint8, device=choices.device)
    node_counts = torch.empty(num_groups, parts_stride, dtype=torch.uint8, device=choices.device)
    count_parts[(num_parts,)](
        choices,
        counts,
        node_counts,
        num_tokens,
        parts_stride,
        E=all_experts,
        G=num_groups,
        K=k,
        BLOCK_K=block_k,
        TOKENS=config.part_tokens,
        num_warps=config.num_warps,
    )
    list_parts[(num_parts, 2)](
        choices,
        counts,
        node_counts,
        *lists,
        num_tokens,
        num_parts,
        parts_stride,
        first_expert,
        E=all_experts,
        G=num_groups,
        K=k,
        BLOCK_K=block_k,
        NUM_EXPERTS=num_experts,
        TOKENS=config.part_tokens,
        IS_CHOICE=is_choice,
        num_warps=config.num_warps,
    )

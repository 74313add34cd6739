"""Which expert worker holds which experts, and the order in which their results are added.

The router's groups are the unit: `n_group` groups of equal size, contiguous in the numbers of the experts.
Every worker holds a run of whole groups, of every layer. At full size there are as many workers as groups;
fewer workers hold several groups each.

The sum of a token is a tree over the groups, not a chain: experts of a group in ascending order, then groups
in pairs, pairs in pairs, and so on.

    ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

A chain would round differently when a worker adds up four groups before they reach the others. In the tree,
a worker that holds an aligned block of groups (2^j of them, beginning at a multiple of 2^j) returns a partial
sum that the tree contains, so 1, 2, 4 and 8 workers and a single process make the same bits. A worker whose
groups are no such block returns one sum for each of the few blocks they fall into.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.group_tree import add_all, blocks_of
from model.moe import DispatchPlan
from workers.transport.protocol import Address


class PlacementError(Exception):
    """A placement that leaves out a group or names one twice, or that a plan or a worker does not fit."""


class TooManyNodes(PlacementError):
    """A token needs more workers than `topk_group`: placement and router do not agree on the groups."""

    def __init__(self, token: int, num_nodes: int, limit: int) -> None:
        super().__init__(token, num_nodes, limit)
        self.token, self.num_nodes, self.limit = token, num_nodes, limit

    def __str__(self) -> str:
        return f"token {self.token} needs {self.num_nodes} expert workers; at most {self.limit} are allowed"


@dataclass(frozen=True)
class ExpertShare:
    """One worker and the groups it holds."""

    address: Address
    groups: range

    @property
    def peer(self) -> str:
        return self.address.name

    @cached_property
    def blocks(self) -> tuple[range, ...]:
        """The blocks of the tree for which it returns a sum each."""
        return blocks_of(self.groups)


@dataclass(frozen=True)
class ExpertPlacement:
    """Who holds which groups, from one change to the next: `epoch` counts the changes.

    Attributes:
        epoch: two placements of a cluster that differ have different epochs; a later one has a higher epoch.
        num_experts: routed experts of a layer.
        num_groups: `n_group` of the model.
        shares: in ascending order of their groups; together each group once.

    Raises:
        PlacementError: when made, for shares that are not complete, disjoint and in order.
    """

    epoch: int
    num_experts: int
    num_groups: int
    shares: tuple[ExpertShare, ...]

    def __post_init__(self) -> None:
        if self.num_groups < 1 or self.num_experts % self.num_groups:
            raise PlacementError(f"{self.num_experts} experts do not make {self.num_groups} equal groups")
        end = 0
        for share in self.shares:
            if share.groups.step != 1 or not share.groups:
                raise PlacementError(f"{share.peer}: {share.groups} is no run of groups")
            if share.groups.start != end:
                what = "are held by nobody" if share.groups.start > end else "are held twice"
                low, high = sorted((share.groups.start, end))
                raise PlacementError(f"groups {low} to {high - 1} {what}, before {share.peer}")
            end = share.groups.stop
        if end != self.num_groups:
            raise PlacementError(f"the shares end at group {end}, the model has {self.num_groups}")
        if len({share.peer for share in self.shares}) < len(self.shares):
            raise PlacementError("one worker has two shares")

    @classmethod
    def even(
        cls, epoch: int, num_experts: int, num_groups: int, workers: Sequence[Address]
    ) -> "ExpertPlacement":
        """Groups dealt out in runs of equal length; where that cannot be, the first workers have one more."""
        if not 0 < len(workers) <= num_groups:
            raise PlacementError(f"{len(workers)} workers for {num_groups} groups")
        base, more = divmod(num_groups, len(workers))
        shares = []
        start = 0
        for index, address in enumerate(workers):
            stop = start + base + (index < more)
            shares.append(ExpertShare(address, range(start, stop)))
            start = stop
        return cls(epoch, num_experts, num_groups, tuple(shares))

    @property
    def group_size(self) -> int:
        return self.num_experts // self.num_groups

    @cached_property
    def share_of_expert(self) -> npt.NDArray[np.int64]:
        """[E]: the index of the share that holds each expert."""
        sizes = [len(share.groups) * self.group_size for share in self.shares]
        return np.repeat(np.arange(len(self.shares)), sizes)

    def share_of(self, peer: str) -> ExpertShare | None:
        """What a worker holds; None if it has no part in this placement."""
        return next((share for share in self.shares if share.peer == peer), None)


def node_lists(
    plan: DispatchPlan, placement: ExpertPlacement, topk_group: int
) -> tuple[list[tuple[ExpertShare, Tensor]], int]:
    """Which tokens each worker gets, and the most workers that one token needs.

    Returns:
        Workers in order with [t] int64 tokens, ascending, nobody with nothing; and the count.

    Raises:
        TooManyNodes: for the first token that needs more than `topk_group` workers.
        IndexError: an expert that the model does not have.
    """
    experts = plan.experts.numpy()
    if experts.size and experts.min() < 0:
        raise IndexError(f"expert {experts.min()}")
    nodes = placement.share_of_expert[experts]
    needed = np.zeros((len(experts), len(placement.shares)), dtype=bool)
    np.put_along_axis(needed, nodes, True, axis=1)
    counts = needed.sum(axis=1)
    if counts.max(initial=0) > topk_group:
        token = int((counts > topk_group).argmax())
        raise TooManyNodes(token, int(counts[token]), topk_group)
    lists = [
        (share, torch.from_numpy(rows))
        for share, column in zip(placement.shares, needed.T, strict=True)
        if len(rows := np.flatnonzero(column))
    ]
    return lists, int(counts.max(initial=0))


@dataclass(frozen=True)
class PartialSum:
    """The sum of a block: of all tokens, or of those in `rows`, the others having nothing there."""

    values: Tensor  # [T, D] or [t, D], float32
    rows: Tensor | None  # [t]

    def dense(self, num_tokens: int) -> Tensor:
        """[T, D], zeros for the tokens that have nothing; its memory may be that of `values`."""
        if self.rows is None:
            return self.values
        out = torch.zeros(num_tokens, self.values.shape[1])
        return out.index_copy_(0, self.rows, self.values)


def combine(parts: Iterable[tuple[range, PartialSum | None]], num_tokens: int, width: int) -> Tensor:
    """[T, D] float32: the tree over all blocks, in order, of which None adds nothing. Uses up the parts.

    Nothing is as good as a sum of zeros: a sum that began at zero is never -0, so adding zero changes no bit.
    """

    def add(left: PartialSum | None, right: PartialSum | None) -> PartialSum | None:
        if left is None or right is None:
            return left or right
        total = left.dense(num_tokens)
        if right.rows is None:
            total.add_(right.values)
        else:
            total.index_add_(0, right.rows, right.values)
        return PartialSum(total, None)

    root = add_all(parts, add)
    return torch.zeros(num_tokens, width) if root is None else root.dense(num_tokens)

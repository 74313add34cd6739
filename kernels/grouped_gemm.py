"""Routed experts: each computes the tokens sent to it, and a token gets one weighted sum, in expert order.

    out[t] = sum_e weight[t, e] * W_down[e] (silu(W_gate[e] x[t]) * (W_up[e] x[t]))
The order of the sum is part of the result: it must not depend on which expert answers first, nor on where
the experts are. Within a group experts are added in ascending order, groups in the tree of `group_tree.py`.
Shapes: T tokens, D width, I inner width, e experts held here, k experts a token, S blocks of the tree.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.group_tree import add_in_tree
from kernels.linear import linear
from kernels.swiglu import swiglu


def grouped_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int,
    group_size: int,
    *,
    backend: Backend,
) -> Tensor:
    """Run the experts held here.

    Args:
        x: [T, D].
        experts: [T, k] int64, global numbers; those not held here are skipped.
        weights: [T, k] float32.
        gate_up: [e, 2 I, D]; down: [e, D, I]; x's dtype.
        first_expert: global number of the first expert held here, the first of its group.
        group_size: experts of a group; e is a multiple of it.

    Returns:
        [S, T, D] float32: the sum of each block that the groups held here fall into; S is 1 for 2^j groups
        that begin at a multiple of 2^j.
    """
    require(gate_up.shape[0] == down.shape[0], "grouped_experts", "gate_up and down hold different experts")
    require(
        first_expert % group_size == gate_up.shape[0] % group_size == 0,
        "grouped_experts",
        f"experts {first_expert} and {gate_up.shape[0]} more are no groups of {group_size}",
    )
    require_torch(backend, "grouped_experts")
    return _one_by_one(x, experts, weights, gate_up, down, first_expert, group_size, backend)


def _one_by_one(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int,
    group_size: int,
    backend: Backend,
) -> Tensor:
    """Both backends: what tokens come together can change bits in the two products and in silu alone."""
    num_experts, k = gate_up.shape[0], experts.shape[1]
    groups: list[Tensor | None] = [None] * (num_experts // group_size)  # None: no token came
    local = (experts - first_expert).flatten()
    order = local.argsort(stable=True)
    counts = torch.bincount(local.clamp(-1, num_experts) + 1, minlength=num_experts + 2).tolist()
    start = counts[0]
    flat_weights = weights.flatten()
    for expert, count in enumerate(counts[1 : num_experts + 1]):
        if count == 0:
            continue
        rows = order[start : start + count]
        start += count
        tokens = rows // k
        inner = swiglu(linear(x[tokens], gate_up[expert], backend=backend), backend=backend)
        result = linear(inner, down[expert], backend=backend).float()
        result.mul_(flat_weights[rows].unsqueeze(1))
        group = expert // group_size
        if (out := groups[group]) is None:
            out = groups[group] = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        out.index_add_(0, tokens, result)
    first_group = first_expert // group_size
    leaves = [(range(group, group + 1), out) for group, out in enumerate(groups, start=first_group)]
    sums = [
        torch.zeros(x.shape, dtype=torch.float32, device=x.device) if total is None else total
        for _, total in add_in_tree(leaves, _add)
    ]
    return sums[0].unsqueeze(0) if len(sums) == 1 else torch.stack(sums)


def _add(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left.add_(right)

"""Routed experts: each computes the tokens sent to it, and a token gets one weighted sum, in expert order.

    out[t] = sum_e weight[t, e] * W_down[e] (silu(W_gate[e] x[t]) * (W_up[e] x[t]))     e ascending
The order of the sum is part of the result: it must not depend on which expert answers first.
Shapes: T tokens, D width, I inner width, e experts held here, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_reference
from kernels.swiglu import swiglu_reference


def grouped_experts(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    first_expert: int,
    *,
    backend: Backend,
) -> Tensor:
    """Run the experts held here.

    Args:
        x: [T, D].
        experts: [T, k] int64, global numbers; those not held here are skipped.
        weights: [T, k] float32.
        gate_up: [e, 2 I, D]; down: [e, D, I]; x's dtype.
        first_expert: global number of the first expert held here.

    Returns:
        [T, D] float32.
    """
    require(gate_up.shape[0] == down.shape[0], "grouped_experts", "gate_up and down hold different experts")
    require_reference(backend, "grouped_experts")
    return grouped_experts_reference(x, experts, weights, gate_up, down, first_expert)


def grouped_experts_reference(
    x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, first_expert: int
) -> Tensor:
    num_experts, k = gate_up.shape[0], experts.shape[1]
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
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
        inner = swiglu_reference(F.linear(x[tokens], gate_up[expert]))
        result = F.linear(inner, down[expert]).float().mul_(flat_weights[rows].unsqueeze(1))
        out.index_add_(0, tokens, result)
    return out

"""The router's choice: at most `topk_group` groups, and the k best experts in them.

    s = sigmoid(logits);  s' = s + bias  (the bias chooses and never weighs)
    group score = sum of the group's two best s'; the best `topk_group` groups stay, the rest becomes -inf
    the k largest s' are chosen; their weights are s, normalised to sum 1, times `scale`
Ties go to the lower group and the lower expert. Shapes: T tokens, E experts, G groups.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.whole_vectors import in_whole_vectors


def gate_topk(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_group: int,
    k: int,
    normalize: bool,
    scale: float,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Choose experts.

    Args:
        logits: [T, E] float32.
        bias: [E] float32, `e_score_correction_bias`.

    Returns:
        experts [T, k] int64, ascending in each row, and their weights [T, k] float32.
    """
    require(logits.dtype == torch.float32, "gate_topk", f"logits must be float32, not {logits.dtype}")
    require(logits.shape[1] % num_groups == 0, "gate_topk", f"{logits.shape[1]} experts, {num_groups} groups")
    require_torch(backend, "gate_topk")
    scores = logits.sigmoid() if backend == "reference" else in_whole_vectors(torch.sigmoid, logits)
    return gate_topk_reference(
        scores, bias, num_groups=num_groups, topk_group=topk_group, k=k, normalize=normalize, scale=scale
    )


def gate_topk_reference(
    scores: Tensor, bias: Tensor, *, num_groups: int, topk_group: int, k: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """The same of scores [T, E]: from here on no number depends on other rows."""
    choice = (scores + bias).unflatten(1, (num_groups, -1))  # [T, G, E/G]
    group_scores = choice.topk(2, dim=-1).values.sum(-1)
    kept_groups = _first_largest(group_scores, topk_group)
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(1, kept_groups, False)
    choice = choice.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(1)
    experts = _first_largest(choice, k).sort(-1).values
    weights = scores.gather(1, experts)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def _first_largest(values: Tensor, k: int) -> Tensor:
    """[T, k] int64: indices of the k largest, ties to the lower index (which torch.topk does not promise)."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :k]

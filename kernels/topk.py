"""The k best-scored keys of each query: higher score first, then the lower index.

No public kernel defines what happens at ties, and genuine ties exist (all heads clipped to zero by the
ReLU), so the rule above is part of the result here. Shapes: T rows, L scores a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch


def topk(scores: Tensor, k: int, *, backend: Backend) -> Tensor:
    """Select.

    Args:
        scores: [T, L] float32; -inf marks what must not be selected.
        k: how many to select; rows with fewer finite scores select all of them.

    Returns:
        [T, k] int32: indices in ascending order, then -1.
    """
    require(scores.dtype == torch.float32, "topk", f"scores must be float32, not {scores.dtype}")
    require(k > 0, "topk", f"k must be positive, not {k}")
    require_torch(backend, "topk")
    return topk_reference(scores, k)


def topk_reference(scores: Tensor, k: int) -> Tensor:
    num_rows, num_scores = scores.shape
    filler = torch.iinfo(torch.int32).max
    if num_scores <= k:
        indices = torch.arange(num_scores, dtype=torch.int32, device=scores.device).expand(num_rows, -1)
        selected = indices.masked_fill(scores == float("-inf"), filler).sort(-1).values
    else:
        # One more than wanted: the least of them is dropped, and if another equals it, torch.topk may have
        # taken any of the scores at the threshold, so those rows are settled by the rule.
        best = scores.topk(k + 1, dim=-1, sorted=False)
        least = best.values.min(-1, keepdim=True)
        indices = best.indices.to(torch.int32).masked_fill_(best.values == float("-inf"), filler)
        indices = indices.scatter_(-1, least.indices, filler)
        crowded = ((best.values == least.values).sum(-1) > 1) & (least.values.squeeze(-1) > float("-inf"))
        selected = indices.sort(-1).values[:, :k]
        if crowded.any():
            selected[crowded] = _lowest_at_ties(scores[crowded], least.values[crowded], k)
    selected = selected.masked_fill(selected == filler, -1)
    return F.pad(selected, (0, k - selected.shape[1]), value=-1)


def _lowest_at_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """[T, k] int32: everything above the threshold, then the first of those that equal it."""
    above, equal = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k).to(torch.int32)

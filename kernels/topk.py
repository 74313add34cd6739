"""The k best-scored keys of each query: higher score first, then the lower index.

No public kernel defines what happens at ties, and genuine ties exist (all heads clipped to zero by the
ReLU), so the rule above is part of the result here. Shapes: T rows, L scores a row.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_reference


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
    require_reference(backend, "topk")
    return topk_reference(scores, k)


def topk_reference(scores: Tensor, k: int) -> Tensor:
    num_rows, num_scores = scores.shape
    if num_scores <= k:
        indices = torch.arange(num_scores, device=scores.device).expand(num_rows, -1)
        kept = scores > float("-inf")
    else:
        best = scores.topk(k, dim=-1, sorted=False)
        indices, kept = best.indices, best.values > float("-inf")
        threshold = best.values.amin(-1, keepdim=True)
        # torch.topk may take any of the scores equal to the threshold: settle the rows that have too many.
        crowded = ((scores >= threshold).sum(-1) > k) & (threshold.squeeze(-1) > float("-inf"))
        if crowded.any():
            indices = indices.clone()
            indices[crowded] = _lowest_at_ties(scores[crowded], threshold[crowded], k)
    filler = torch.iinfo(torch.int32).max
    selected = indices.to(torch.int32).masked_fill(~kept, filler).sort(-1).values
    selected = selected.masked_fill(selected == filler, -1)
    return torch.nn.functional.pad(selected, (0, k - selected.shape[1]), value=-1)


def _lowest_at_ties(scores: Tensor, threshold: Tensor, k: int) -> Tensor:
    """[T, k] int64: everything above the threshold, then the first of those that equal it."""
    above, equal = scores > threshold, scores == threshold
    room = k - above.sum(-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(-1) <= room))
    return chosen.nonzero()[:, 1].view(-1, k)

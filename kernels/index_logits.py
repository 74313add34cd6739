"""The lightning indexer's scores: how much each query wants each visible key.

    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])        for s < visible[t], else -inf
Scores are signed, so -inf and never 0 marks what is not visible. Scales of a quantised query are folded into
w by the caller: every scale is positive and passes through the ReLU, the signed weight does not.
Shapes: T queries, H index heads, D index_head_dim, L keys.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_reference

_TILE_ELEMENTS = 1 << 21  # [rows, H, L] scores alive at once in the reference: 8 MiB, near the cache


def index_logits(
    q: Tensor, keys: Tensor, key_scales: Tensor | None, weights: Tensor, visible: Tensor, *, backend: Backend
) -> Tensor:
    """Score the queries of one sequence against its keys.

    Args:
        q: [T, H, D], e4m3 or any float dtype.
        keys: [L, D], same kind.
        key_scales: [L] float32, or None where keys are not quantised.
        weights: [T, H] float32, with every constant and query scale in it.
        visible: [T] int64, how many of the first keys a query may see.

    Returns:
        [T, L] float32.
    """
    require(q.shape[1] == weights.shape[1], "index_logits", f"{q.shape[1]} heads, {weights.shape[1]} weights")
    require(
        q.shape[2] == keys.shape[1], "index_logits", f"query width {q.shape[2]}, key width {keys.shape[1]}"
    )
    require_reference(backend, "index_logits")
    return index_logits_reference(q, keys, key_scales, weights, visible)


def index_logits_reference(
    q: Tensor, keys: Tensor, key_scales: Tensor | None, weights: Tensor, visible: Tensor
) -> Tensor:
    num_queries, num_heads, _ = q.shape
    num_keys = keys.shape[0]
    wide_keys = keys.float()
    positions = torch.arange(num_keys, device=q.device)
    out = torch.full((num_queries, num_keys), float("-inf"), device=q.device)
    tile = max(1, _TILE_ELEMENTS // max(1, num_heads * num_keys))
    for start in range(0, num_queries, tile):
        rows = slice(start, start + tile)
        seen = slice(0, int(visible[rows].max()))  # no row of the tile sees further
        per_head = (q[rows].float().flatten(0, 1) @ wide_keys[seen].t()).relu_().unflatten(0, (-1, num_heads))
        scores = torch.bmm(weights[rows].unsqueeze(1), per_head).squeeze(1)
        if key_scales is not None:
            scores.mul_(key_scales[seen])
        hidden = positions[seen] >= visible[rows].unsqueeze(1)
        out[rows, seen] = scores.masked_fill_(hidden, float("-inf"))
    return out

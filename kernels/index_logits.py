"""The lightning indexer's scores: how much each query wants each visible key.

    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])        for s < visible[t], else -inf
Scores are signed, so -inf and never 0 marks what is not visible. Scales of a quantised query are folded into
w by the caller: every scale is positive and passes through the ReLU, the signed weight does not.
Shapes: T queries, H index heads, D index_head_dim, L keys.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.linear import linear, stable

_TILE_ELEMENTS = 1 << 21  # [rows, H, L] scores alive at once in the reference: 8 MiB, near the cache
_TILE_KEYS = 512  # keys of a product in the deterministic form; a key is always at the same place of its tile


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
    require_torch(backend, "index_logits")
    form = index_logits_reference if backend == "reference" else index_logits_deterministic
    return form(q, keys, key_scales, weights, visible)


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


def index_logits_deterministic(
    q: Tensor, keys: Tensor, key_scales: Tensor | None, weights: Tensor, visible: Tensor
) -> Tensor:
    num_queries, num_heads, _ = q.shape
    num_keys = keys.shape[0]
    out = torch.full((num_queries, num_keys), float("-inf"), device=q.device)
    tile = max(1, _TILE_ELEMENTS // (num_heads * _TILE_KEYS))
    for first_key in range(0, num_keys, _TILE_KEYS):
        seen = slice(first_key, min(first_key + _TILE_KEYS, num_keys))
        wide_keys = F.pad(keys[seen].float(), (0, 0, 0, first_key + _TILE_KEYS - seen.stop))
        positions = torch.arange(seen.start, seen.stop, device=q.device)
        for start in range(0, num_queries, tile):
            rows = slice(start, start + tile)
            if int(visible[rows].max()) <= first_key:
                continue
            per_head = linear(q[rows].float().flatten(0, 1), wide_keys, backend="deterministic")
            per_head = per_head[:, : len(positions)].relu_().unflatten(0, (-1, num_heads))
            scores = _sum_of_heads(per_head.mul_(weights[rows].unsqueeze(2)))
            if key_scales is not None:
                scores = scores * key_scales[seen]
            hidden = positions >= visible[rows].unsqueeze(1)
            out[rows, seen] = scores.masked_fill(hidden, float("-inf"))
    return out


def _sum_of_heads(per_head: Tensor) -> Tensor:
    """[T, H, L] to [T, L] in a tree, half to half: sums of two, which round alike whatever the shape."""
    while (num_heads := per_head.shape[1]) > 1:
        half = num_heads // 2
        pairs = per_head[:, :half] + per_head[:, half : 2 * half]
        per_head = torch.cat([pairs, per_head[:, 2 * half :]], dim=1) if num_heads % 2 else pairs
    return per_head.squeeze(1)


def require_stable_scores(index_head_dim: int, device: torch.device) -> None:
    """Raise `UnsupportedKernel` where the deterministic form does not keep its promise on this machine.

    Products with tiles of keys are tried, and those with the Hadamard matrix that precede them.
    """
    for num_outputs in (_TILE_KEYS, index_head_dim):
        stable(torch.empty(num_outputs, index_head_dim, device=device), backend="deterministic")

"""Expanded attention under a mask: what a prompt runs on while its context is short.

Keys and values are expanded from the latents once for all queries; selection is a mask, so the arithmetic is
dense and pays while the context is short (model configuration decides where).
Shapes: T queries of one sequence, H heads, L keys, Q qk_head_dim, V v_head_dim.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_reference

_TILE_ROWS = 128  # queries a tile of the reference; its keys end where the tile's last query does


def masked_mha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    selected: Tensor | None,
    scale: float,
    *,
    backend: Backend,
) -> Tensor:
    """Attend to the visible keys, or to the selected ones among them.

    Args:
        q: [T, H, Q]; k: [L, H, Q]; v: [L, H, V]; one dtype.
        visible: [T] int64 ascending, how many of the first keys a query may see, at least 1.
        selected: [T, K] int32 indices of keys, -1 skips, or None for everything visible.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, V] in q's dtype; softmax in fp32.
    """
    require(q.shape[2] == k.shape[2], "masked_mha", f"query width {q.shape[2]}, key width {k.shape[2]}")
    require_reference(backend, "masked_mha")
    return masked_mha_reference(q, k, v, visible, selected, scale)


def masked_mha_reference(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, selected: Tensor | None, scale: float
) -> Tensor:
    out = torch.empty(*q.shape[:2], v.shape[2], dtype=q.dtype, device=q.device)
    keys = k.float().permute(1, 2, 0).contiguous()  # [H, Q, L]
    values = v.transpose(0, 1).contiguous()  # [H, L, V]
    queries = (q.float() * scale).transpose(0, 1)
    for start in range(0, q.shape[0], _TILE_ROWS):
        rows = slice(start, start + _TILE_ROWS)
        num_keys = int(visible[rows][-1])
        mask = _mask(visible[rows], None if selected is None else selected[rows], num_keys)
        weights = torch.baddbmm(mask, queries[:, rows], keys[..., :num_keys]).softmax(-1).to(q.dtype)
        # A row without any key is 0/0. It gets zeros; any other NaN stays to be seen.
        weights = weights.masked_fill_((mask == float("-inf")).all(-1)[:, None], 0.0)
        out[rows] = torch.bmm(weights, values[:, :num_keys]).transpose(0, 1)
    return out


def _mask(visible: Tensor, selected: Tensor | None, num_keys: int) -> Tensor:
    """[T, num_keys] float32: 0 where a query attends, -inf elsewhere."""
    if selected is None:
        hidden = torch.arange(num_keys, device=visible.device) >= visible.unsqueeze(1)
        return torch.zeros(hidden.shape, device=visible.device).masked_fill_(hidden, float("-inf"))
    # One column more than there are keys takes the skipped entries.
    mask = torch.full((len(visible), num_keys + 1), float("-inf"), device=visible.device)
    columns = selected.long().masked_fill(selected < 0, num_keys)
    return mask.scatter_(1, columns, 0.0)[:, :num_keys]

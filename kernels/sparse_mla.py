"""Absorbed multi-head latent attention over chosen slots.

All heads share one key a token, [c | k_pe], and its first part c is the value too:
    out[t, h] = sum_s softmax_s(scale * q[t, h] . latent[s]) * c[s]      s over the slots of row t
Shapes: T queries, H heads, K slots a query, C kv_lora_rank, R rotated channels.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_reference

_TILE_ELEMENTS = 1 << 21  # gathered numbers alive at once in the reference


def sparse_mla(
    q: Tensor,
    read_latents: Callable[[Tensor], Tensor],
    slots: Tensor,
    scale: float,
    kv_lora_rank: int,
    *,
    backend: Backend,
) -> Tensor:
    """Attend to chosen slots.

    Args:
        q: [T, H, C + R], queries in latent space: absorbed q_nope, then q_pe.
        read_latents: slots [N] int64 -> latents [N, C + R] of a page format.
        slots: [T, K] int64; -1 skips. A row of only -1 gives zeros.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] in q's dtype; softmax in fp32.
    """
    require(q.shape[0] == slots.shape[0], "sparse_mla", f"{q.shape[0]} queries, {slots.shape[0]} slot rows")
    require_reference(backend, "sparse_mla")
    return sparse_mla_reference(q, read_latents, slots, scale, kv_lora_rank)


def sparse_mla_reference(
    q: Tensor, read_latents: Callable[[Tensor], Tensor], slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    num_queries, num_heads, width = q.shape
    out = torch.empty(num_queries, num_heads, kv_lora_rank, dtype=q.dtype, device=q.device)
    tile = max(1, _TILE_ELEMENTS // max(1, slots.shape[1] * width))
    for start in range(0, num_queries, tile):
        rows = slice(start, start + tile)
        latents = read_latents(slots[rows].clamp_min(0).flatten()).to(q.dtype)
        latents = latents.unflatten(0, (-1, slots.shape[1]))
        skipped = slots[rows] < 0
        if skipped.any():  # those were read from slot 0, which is somebody's: 0 * NaN would still be NaN
            latents = latents.masked_fill(skipped.unsqueeze(-1), 0.0)
        scores = torch.bmm(q[rows].float(), latents.float().transpose(1, 2)) * scale
        weights = scores.masked_fill_(skipped.unsqueeze(1), float("-inf")).softmax(-1)
        # A row of only skipped slots is 0/0. It gets zeros; any other NaN stays to be seen.
        weights = weights.masked_fill_(skipped.all(-1)[:, None, None], 0.0)
        out[rows] = torch.bmm(weights.to(q.dtype), latents[..., :kv_lora_rank])
    return out

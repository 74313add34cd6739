"""Absorbed multi-head latent attention over everything visible: decode at short context, and dense decode.

The same arithmetic as `sparse_mla` with one set of keys for all rows of a sequence.
Shapes: T queries of one sequence, H heads, L keys, C kv_lora_rank, R rotated channels.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_reference


def dense_mla(
    q: Tensor, latents: Tensor, visible: Tensor, scale: float, kv_lora_rank: int, *, backend: Backend
) -> Tensor:
    """Attend to the first `visible[t]` keys.

    Args:
        q: [T, H, C + R], queries in latent space.
        latents: [L, C + R], one sequence's latents in order of position.
        visible: [T] int64, at least 1.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] in q's dtype; softmax in fp32.
    """
    require(q.shape[2] == latents.shape[1], "dense_mla", f"query width {q.shape[2]}, key {latents.shape[1]}")
    require_reference(backend, "dense_mla")
    return dense_mla_reference(q, latents, visible, scale, kv_lora_rank)


def dense_mla_reference(
    q: Tensor, latents: Tensor, visible: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    latents = latents.to(q.dtype)
    scores = (q.float() @ latents.float().t()) * scale
    hidden = torch.arange(latents.shape[0], device=q.device) >= visible[:, None, None]
    weights = scores.masked_fill_(hidden, float("-inf")).softmax(-1)
    return weights.to(q.dtype) @ latents[:, :kv_lora_rank]

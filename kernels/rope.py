"""Rotary position embedding in both pair layouts.

A pair (a, b) turns by its angle: (a cos - b sin, a sin + b cos). MLA pairs neighbours, (2i, 2i+1); the
lightning indexer pairs halves, (i, i + R/2). Using one for the other changes what the indexer selects in
about half of its places, so the layout has no default. Shapes: T tokens, H heads, R rotated channels.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool, backend: Backend) -> Tensor:
    """Rotate all channels of the last dimension.

    Args:
        x: [T, R] or [T, H, R], any float dtype.
        cos, sin: [T, R/2] float32.
        interleaved: True for MLA (pairs of neighbours), False for the indexer (pairs of halves).

    Returns:
        Same shape and dtype as x, channels in x's own order.
    """
    require(x.shape[-1] == 2 * cos.shape[-1], "apply_rope", f"{x.shape[-1]} channels, {cos.shape[-1]} angles")
    require_torch(backend, "apply_rope")
    return apply_rope_reference(x, cos, sin, interleaved=interleaved)


def apply_rope_reference(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    if x.dim() == 3:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, dim=-1)
    turned = a * cos - b * sin, a * sin + b * cos
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out.to(x.dtype)

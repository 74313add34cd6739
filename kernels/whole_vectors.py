"""Element-wise functions whose bits do not depend on an element's place in its tensor.

torch computes whole vectors with one implementation of exp and what is left at the end, up to 31 numbers,
with another that rounds differently; and where several threads share a tensor, ends lie in its middle.
Functions that IEEE defines (sums, products, quotients, roots) are the same in both and need none of this.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_VECTORS = 64  # numbers: a multiple of what one turn of torch's loops takes, 32 fp32 with AVX-512
_PIECE = 16384  # numbers: fewer than the 32,768 from which on torch uses several threads


def in_whole_vectors(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of every element of x, any shape, computed in whole vectors by one thread."""
    if x.numel() <= _PIECE and x.numel() % _VECTORS == 0:
        return function(x.contiguous())
    flat = F.pad(x.flatten(), (0, -x.numel() % _VECTORS))
    return torch.cat([function(piece) for piece in flat.split(_PIECE)])[: x.numel()].view(x.shape)

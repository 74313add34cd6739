"""silu(gate) * up, taken in fp32 and cast once. Shapes: T tokens, I inner width."""

import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.whole_vectors import in_whole_vectors


def swiglu(gate_up: Tensor, *, backend: Backend) -> Tensor:
    """Combine the two halves of a fused projection.

    Args:
        gate_up: [T, 2 I], gate rows first.

    Returns:
        [T, I] in gate_up's dtype.
    """
    require(gate_up.shape[-1] % 2 == 0, "swiglu", f"width {gate_up.shape[-1]} is odd")
    require_torch(backend, "swiglu")
    return swiglu_reference(gate_up) if backend == "reference" else swiglu_deterministic(gate_up)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return F.silu(gate).mul_(up).to(gate_up.dtype)


def swiglu_deterministic(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return in_whole_vectors(F.silu, gate).mul_(up).to(gate_up.dtype)

"""RMSNorm, alone and with the residual sum before it.

y = x / sqrt(mean(x^2) + eps) * w, all in fp32, cast once at the end (DeepSeek's order: the weight multiplies
before the cast). Shapes: T tokens, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: Backend) -> Tensor:
    """Normalise the last dimension.

    Args:
        x: [T, D], any float dtype.
        weight: [D] float32.

    Returns:
        [T, D] in x's dtype.
    """
    require(weight.dtype == torch.float32, "rms_norm", f"weight must be float32, not {weight.dtype}")
    if backend == "triton":
        return _fused(x, None, weight, eps, backend)[0]
    require_torch(backend, "rms_norm")
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Add the residual stream and normalise the fp32 sum.

    Args:
        x: [T, D], what a block adds to the residual stream.
        residual: [T, D], same dtype.
        weight: [D] float32.

    Returns:
        The normalised sum and the new residual, both [T, D] in residual's dtype.
    """
    require(x.shape == residual.shape, "add_rms_norm", f"x {x.shape} and residual {residual.shape} differ")
    if backend == "triton":
        return _fused(x, residual, weight, eps, backend)
    require_torch(backend, "add_rms_norm")
    return add_rms_norm_reference(x, residual, weight, eps)


def _fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, backend: Backend
) -> tuple[Tensor, Tensor]:
    # Imported where it runs: Triton takes 60 MiB, which workers without a GPU spare.
    from kernels.norm_quantize import add_rms_norm_quantize

    rows = add_rms_norm_quantize(x, residual, weight, eps, quantize=False, keep_normed=True, backend=backend)
    assert rows.normed is not None
    return rows.normed, rows.residual


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), weight.shape, weight, eps).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    return F.rms_norm(total, weight.shape, weight, eps).to(residual.dtype), total.to(residual.dtype)

"""The Hadamard rotation of index queries and keys, which spreads outliers before they are quantised.

v -> v H_n / sqrt(n), H the Sylvester-ordered matrix of +-1. It is orthogonal, so without quantisation it
changes no index score; queries and cached keys must make the same choice. Shapes: D channels, a power of two.
"""

import math
from functools import lru_cache

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.linear import linear


def hadamard(x: Tensor, *, backend: Backend) -> Tensor:
    """Rotate the last dimension.

    Args:
        x: [..., D], any float dtype, D a power of two.

    Returns:
        Same shape and dtype as x; computed in fp32.
    """
    dim = x.shape[-1]
    require(dim & (dim - 1) == 0, "hadamard", f"{dim} channels are not a power of two")
    require_torch(backend, "hadamard")
    return hadamard_reference(x) if backend == "reference" else hadamard_deterministic(x)


def hadamard_reference(x: Tensor) -> Tensor:
    return (x.float() @ hadamard_matrix(x.shape[-1], x.device)).to(x.dtype)


def hadamard_deterministic(x: Tensor) -> Tensor:
    matrix = hadamard_matrix(x.shape[-1], x.device)
    rows = linear(x.float().flatten(0, -2), matrix, backend="deterministic")
    return rows.view(x.shape).to(x.dtype)


@lru_cache(maxsize=8)
def hadamard_matrix(dim: int, device: torch.device) -> Tensor:
    """H_dim / sqrt(dim), [dim, dim] float32; symmetric, so the side does not matter."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < dim:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return (matrix / math.sqrt(dim)).to(device)

"""What the tests of the fused kernels share: the interpreter they run in, and how alike two results are."""

from collections.abc import Callable
from types import ModuleType

import torch
import triton.experimental.gluon  # noqa: F401  (looks for Triton's own functions, so before they are replaced)
import triton.language as tl
from torch import Tensor

import kernels.jit

GPU = torch.device("cuda")


def interpret(interpreted: Callable[..., None], *modules: ModuleType) -> None:
    """Replace the kernels of these modules and what all of them are made of."""
    interpreted(tl, tl.standard, kernels.jit, *modules)


def assert_alike(actual: Tensor, expected: Tensor, *, differing: float = 0.0) -> None:
    """Equal but for a share of last places: approximations of exp and rsqrt, and the order of sums."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not actual.numel():
        return
    actual, expected = actual.float(), expected.float()
    assert torch.isfinite(actual).all()
    assert (actual != expected).float().mean() <= differing
    assert (actual - expected).abs().max() <= 0.07 * expected.abs().max()

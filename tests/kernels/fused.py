"""What the tests of the fused kernels share: how alike two results are."""

import torch
from torch import Tensor

GPU = torch.device("cuda")


def assert_alike(actual: Tensor, expected: Tensor, *, differing: float = 0.0) -> None:
    """Equal but for a share of last places: approximations of exp and rsqrt, and the order of sums."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if not actual.numel():
        return
    actual, expected = actual.float(), expected.float()
    assert torch.isfinite(actual).all()
    assert (actual != expected).float().mean() <= differing
    # The greatest e4m3 numbers, 416 and 448, differ by a fourteenth.
    assert (actual - expected).abs().max() <= expected.abs().max() / 14

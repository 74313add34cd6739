"""Whether rows come out the same whoever runs beside them: the promise of the deterministic backend."""

from collections.abc import Callable

import torch
from torch import Tensor


def same_alone_and_among_others(compute: Callable[[Tensor], Tensor], num_rows: int) -> bool:
    """Compare rows computed together, alone, in runs of several lengths and shuffled, bit by bit.

    Args:
        compute: indices [n] of rows to results [n, ...].
    """
    everyone = torch.arange(num_rows)
    expected = compute(everyone)
    parts = [torch.cat([compute(part) for part in everyone.split(size)]) for size in (1, 2, 7, 67)]
    shuffled = torch.randperm(num_rows, generator=torch.Generator().manual_seed(1))
    return all(torch.equal(part, expected) for part in parts) and torch.equal(
        compute(shuffled), expected[shuffled]
    )

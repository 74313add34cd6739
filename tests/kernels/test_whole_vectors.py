from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.whole_vectors import in_whole_vectors


@pytest.mark.parametrize("function", [torch.sigmoid, F.silu])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_number_has_one_result_wherever_it_stands(
    function: Callable[[Tensor], Tensor], num_threads: int, generator: torch.Generator
) -> None:
    """At the start of a long tensor, at the end of a short one, and where threads meet."""
    x = torch.randn(100_003, generator=generator)
    torch.set_num_threads(num_threads)  # the module's fixture puts it back
    together = in_whole_vectors(function, x)
    torch.testing.assert_close(together, function(x), rtol=1e-6, atol=1e-7)
    for size in (1, 31, 41, 5_000):
        parts = [in_whole_vectors(function, part) for part in x[:20_000].split(size)]
        assert torch.equal(torch.cat(parts), together[:20_000])
    shifted = in_whole_vectors(function, x[17:])
    assert torch.equal(shifted, together[17:])


def test_shapes_are_kept(generator: torch.Generator) -> None:
    x = torch.randn(6, 5, generator=generator)
    assert torch.equal(in_whole_vectors(torch.neg, x.t()), -x.t())
    assert in_whole_vectors(torch.neg, x[:0]).shape == (0, 5)

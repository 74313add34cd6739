import math

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.dense_mla import dense_mla
from kernels.sparse_mla import sparse_mla

RANK, ROPE = 6, 2
WIDTH = RANK + ROPE


def attend_slowly(q: Tensor, latents: Tensor, visible: list[int], scale: float) -> Tensor:
    out = torch.zeros(q.shape[0], q.shape[1], RANK, dtype=torch.float64)
    for t, num_keys in enumerate(visible):
        for h in range(q.shape[1]):
            scores = [
                scale * math.fsum((q[t, h].double() * latents[s].double()).tolist()) for s in range(num_keys)
            ]
            exps = [math.exp(score - max(scores)) for score in scores]
            for s in range(num_keys):
                out[t, h] += exps[s] / math.fsum(exps) * latents[s, :RANK].double()
    return out


def attend(q: Tensor, latents: Tensor, visible: list[int], scale: float = 0.3) -> Tensor:
    return dense_mla(q, latents, torch.tensor(visible, dtype=torch.int64), scale, RANK, backend="reference")


def test_two_keys_worked_out_by_hand() -> None:
    """Scores 0 and ln 3, so weights 1/4 and 3/4; a third key is not visible."""
    latents = torch.zeros(3, WIDTH)
    latents[0, 1], latents[1, 1], latents[1, RANK + 1], latents[2] = 4.0, 8.0, 2.0, 1e6
    q = torch.zeros(1, 1, WIDTH)
    q[0, 0, RANK + 1] = math.log(3)
    out = attend(q, latents, [2], scale=0.5)
    assert out[0, 0].tolist() == pytest.approx([0.0, 0.25 * 4 + 0.75 * 8] + [0.0] * (RANK - 2))


@pytest.mark.parametrize("visible", [[1], [9], [1, 2, 3], [9, 9], [4, 1, 9, 8]])
def test_random_queries_against_a_slow_one(visible: list[int], generator: torch.Generator) -> None:
    q = torch.randn(len(visible), 3, WIDTH, generator=generator)
    latents = torch.randn(9, WIDTH, generator=generator)
    # float32 sums of at most 9 numbers near 1
    torch.testing.assert_close(
        attend(q, latents, visible).double(), attend_slowly(q, latents, visible, 0.3), atol=2e-6, rtol=0
    )


def test_the_first_key_alone_is_its_own_value(generator: torch.Generator) -> None:
    q, latents = torch.randn(1, 3, WIDTH, generator=generator), torch.randn(9, WIDTH, generator=generator)
    assert torch.equal(attend(q, latents, [1])[0], latents[0, :RANK].expand(3, -1))


def test_equals_sparse_attention_over_the_same_keys(generator: torch.Generator) -> None:
    q, latents = torch.randn(3, 2, WIDTH, generator=generator), torch.randn(9, WIDTH, generator=generator)
    slots = torch.arange(9).expand(3, -1).masked_fill(torch.arange(9) >= torch.tensor([[2], [9], [5]]), -1)
    sparse = sparse_mla(q, lambda wanted: latents[wanted], slots, 0.3, RANK, backend="reference")
    torch.testing.assert_close(attend(q, latents, [2, 9, 5]), sparse, atol=2e-6, rtol=0)


def test_inputs_are_left_as_they_were(generator: torch.Generator) -> None:
    q, latents = torch.randn(2, 2, WIDTH, generator=generator), torch.randn(4, WIDTH, generator=generator)
    before = q.clone(), latents.clone()
    attend(q, latents, [1, 3], scale=1.0)
    assert torch.equal(q, before[0])
    assert torch.equal(latents, before[1])


def test_bfloat16(generator: torch.Generator) -> None:
    q = torch.randn(4, 3, WIDTH, generator=generator).bfloat16()
    latents = torch.randn(9, WIDTH, generator=generator).bfloat16().float()
    out = attend(q, latents, [9, 5, 1, 7])
    assert out.dtype == torch.bfloat16
    # Scores up to 4 and weights up to 1 are rounded to 2^-8 of themselves, values near 1 to 3 are exact.
    torch.testing.assert_close(out.double(), attend_slowly(q, latents, [9, 5, 1, 7], 0.3), atol=0.03, rtol=0)


def test_no_queries() -> None:
    assert attend(torch.zeros(0, 3, WIDTH), torch.zeros(5, WIDTH), []).shape == (0, 3, RANK)


def test_refusals() -> None:
    q, visible = torch.zeros(1, 1, WIDTH), torch.tensor([1])
    with pytest.raises(UnsupportedKernel, match=r"^dense_mla: query width 8, key 7$"):
        dense_mla(q, torch.zeros(2, 7), visible, 1.0, RANK, backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^dense_mla: "):
        dense_mla(q, torch.zeros(2, 8), visible, 1.0, RANK, backend="triton")

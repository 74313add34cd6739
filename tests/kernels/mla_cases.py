"""Random cases for the attention kernels over latents, and attention done slowly in float64."""

import torch
from torch import Tensor

from kernels.latent_pages import pack_latents_reference, unpack_latents_reference

RANK, ROPE = 128, 32  # the demo's


def latent_pages(
    num_pages: int, fp8: bool, generator: torch.Generator, rank: int = RANK, rope: int = ROPE
) -> Tensor:
    """Pages of 64 tokens with numbers of many sizes; full pages in float32, on bf16's grid."""
    latents = torch.randn(num_pages * 64, rank + rope, generator=generator)
    latents *= 2.0 ** torch.randint(-3, 2, (num_pages * 64, 1), generator=generator)
    latents = latents.bfloat16().float()
    if not fp8:
        return latents.unflatten(0, (num_pages, 64))
    return pack_latents_reference(latents[:, :rank], latents[:, rank:]).unflatten(0, (num_pages, 64))


def widened(pages: Tensor, rank: int = RANK) -> Tensor:
    """[slots, C + R] float64."""
    rows = pages.flatten(0, 1)
    return (unpack_latents_reference(rows, rank) if rows.dtype == torch.uint8 else rows).double()


def attend_exactly(q: Tensor, latents: Tensor, chosen: Tensor, scale: float, rank: int = RANK) -> Tensor:
    """[H, C] float64 of one query [H, C + R] over chosen rows of latents; zeros where there are none."""
    if len(chosen) == 0:
        return torch.zeros(q.shape[0], rank, dtype=torch.float64, device=q.device)
    keys = latents[chosen.long()]
    return (q.double() @ keys.t() * scale).softmax(-1) @ keys[:, :rank]

"""Absorbed multi-head latent attention over chosen slots.

All heads share one key a token, [c | k_pe], and its first part c is the value too:
    out[t, h] = sum_s softmax_s(scale * q[t, h] . latent[s]) * c[s]      s over the slots of row t
Shapes: T queries, H heads, K slots a query, C kv_lora_rank, R rotated channels.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend, require, require_torch

_TILE_ELEMENTS = 1 << 21  # gathered numbers alive at once in the reference
_BATCHES = (8, 1)  # queries of a batched product in the deterministic form
_ALIGNED = 32  # its widths are filled up to a multiple of this, so that every query's part begins at 64 bytes
_HEADS = 4  # its heads to a multiple of this: products of fewer rows take other routes


def sparse_mla(
    q: Tensor,
    read_latents: Callable[[Tensor], Tensor],
    slots: Tensor,
    scale: float,
    kv_lora_rank: int,
    *,
    backend: Backend,
) -> Tensor:
    """Attend to chosen slots.

    Args:
        q: [T, H, C + R], queries in latent space: absorbed q_nope, then q_pe.
        read_latents: slots [N] int64 -> latents [N, C + R] of a page format.
        slots: [T, K] int64; -1 skips. A row of only -1 gives zeros.
        scale: multiplies the scores before the softmax.

    Returns:
        [T, H, C] in q's dtype; softmax in fp32.
    """
    require(q.shape[0] == slots.shape[0], "sparse_mla", f"{q.shape[0]} queries, {slots.shape[0]} slot rows")
    require_torch(backend, "sparse_mla")
    form = sparse_mla_reference if backend == "reference" else sparse_mla_deterministic
    return form(q, read_latents, slots, scale, kv_lora_rank)


def sparse_mla_reference(
    q: Tensor, read_latents: Callable[[Tensor], Tensor], slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    num_queries, num_heads, width = q.shape
    out = torch.empty(num_queries, num_heads, kv_lora_rank, dtype=q.dtype, device=q.device)
    tile = max(1, _TILE_ELEMENTS // max(1, slots.shape[1] * width))
    for start in range(0, num_queries, tile):
        rows = slice(start, start + tile)
        latents, skipped = _gather(read_latents, slots[rows], q.dtype)
        out[rows] = _attend(q[rows], latents, skipped, scale, kv_lora_rank)
    return out


def sparse_mla_deterministic(
    q: Tensor, read_latents: Callable[[Tensor], Tensor], slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    num_queries, num_heads, width = q.shape
    out = torch.empty(num_queries, num_heads, kv_lora_rank, dtype=q.dtype, device=q.device)
    missing, value_width = -width % _ALIGNED, kv_lora_rank + -kv_lora_rank % _ALIGNED
    q = F.pad(q, (0, missing, 0, -num_heads % _HEADS))
    slots = F.pad(slots, (0, -slots.shape[1] % _ALIGNED), value=-1)
    start = 0
    for batch in _BATCHES:
        while num_queries - start >= batch:
            rows = slice(start, start + batch)
            latents, skipped = _gather(read_latents, slots[rows], q.dtype)
            latents = F.pad(latents, (0, missing))
            result = _attend(q[rows].clone(), latents, skipped, scale, value_width)
            out[rows] = result[:, :num_heads, :kv_lora_rank]
            start += batch
    return out


def _gather(
    read_latents: Callable[[Tensor], Tensor], slots: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Latents [T, K, C + R] of [T, K] slots, and [T, K] bool: which are skipped."""
    latents = read_latents(slots.clamp_min(0).flatten()).to(dtype).unflatten(0, (-1, slots.shape[1]))
    skipped = slots < 0
    if skipped.any():  # those were read from slot 0, which is somebody's: 0 * NaN would still be NaN
        latents = latents.masked_fill(skipped.unsqueeze(-1), 0.0)
    return latents, skipped


def _attend(q: Tensor, latents: Tensor, skipped: Tensor, scale: float, value_width: int) -> Tensor:
    """[T, H, value_width]: the first channels of the latents are the values."""
    scores = torch.bmm(q.float(), latents.float().transpose(1, 2)) * scale
    weights = scores.masked_fill_(skipped.unsqueeze(1), float("-inf")).softmax(-1)
    # A row of only skipped slots is 0/0. It gets zeros; any other NaN stays to be seen.
    weights = weights.masked_fill_(skipped.all(-1)[:, None, None], 0.0)
    return torch.bmm(weights.to(q.dtype), latents[..., :value_width])


@lru_cache(maxsize=32)
def require_stable_queries(
    num_heads: int, width: int, num_slots: int, kv_lora_rank: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raise `UnsupportedKernel` where the deterministic form does not keep its promise on this machine.

    Once the scores are rounding alone, made large, and once what the values add up to, as in `linear`.
    """
    generator = torch.Generator(device).manual_seed(0)
    num_queries = _BATCHES[0]

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def keeps(q: Tensor, latents: Tensor, scale: float) -> bool:
        slots = torch.arange(len(latents), device=device).expand(num_queries, -1)

        def attend(q: Tensor) -> Tensor:
            return sparse_mla_deterministic(q, latents.__getitem__, slots[: len(q)], scale, kv_lora_rank)

        together = attend(q)
        alone = torch.cat([attend(row) for row in q.split(1)])
        return torch.equal(alone, together) and torch.equal(attend(q.roll(3, 0)), together.roll(3, 0))

    q, latents = random(num_queries, num_heads, width // 2), random(num_slots, width // 2)
    values = random(num_slots // 2, width)
    require(
        keeps(F.pad(torch.cat([q, -q], 2), (0, width % 2)), F.pad(latents.repeat(1, 2), (0, width % 2)), 1e5)
        and keeps(q.new_zeros(num_queries, num_heads, width), torch.cat([values, -values]), 1.0),
        "sparse_mla",
        f"'deterministic' cannot be had here: with {num_heads} heads of {width} in {dtype} the bits of a "
        "query change with its place or its neighbours in this machine's matrix library",
    )

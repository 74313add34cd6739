"""What attention caches for a token, written into pages and read back.

The fp8 record (656 bytes at full size: 512 + 16 + 128), interleaved token by token:
    kv_lora_rank e4m3 values of the normalised latent c | one fp32 scale for each 128 of them | k_pe in bf16
A token's slot is page * page_size + offset. Shapes: P pages, T tokens, C kv_lora_rank, R rotated channels.
"""

import math

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.fp8_quant import FP8, dequantize_reference, quantize_reference

LATENT_GROUP = 128  # channels of the latent that share a scale


def record_bytes(kv_lora_rank: int, rope_dim: int) -> int:
    """Bytes of one token's fp8 record; 656 at full size."""
    return kv_lora_rank + 4 * math.ceil(kv_lora_rank / LATENT_GROUP) + 2 * rope_dim


def write_latents_fp8(pages: Tensor, slots: Tensor, c: Tensor, k_pe: Tensor, *, backend: Backend) -> None:
    """Quantise and store.

    Args:
        pages: [P, page_size, record_bytes] uint8.
        slots: [T] int64, distinct.
        c: [T, C], the latent after its norm; k_pe: [T, R], after RoPE.
    """
    expected = record_bytes(c.shape[-1], k_pe.shape[-1])
    require(pages.shape[-1] == expected, "write_latents_fp8", f"{pages.shape[-1]} bytes, not {expected}")
    require_torch(backend, "write_latents_fp8")
    pages.view(-1, expected)[slots] = pack_latents_reference(c, k_pe)


def read_latents_fp8(pages: Tensor, slots: Tensor, kv_lora_rank: int, *, backend: Backend) -> Tensor:
    """Gather and widen.

    Args:
        pages: [P, page_size, record_bytes] uint8.
        slots: [N] int64.

    Returns:
        [N, C + R] float32: the latent, then k_pe.
    """
    require_torch(backend, "read_latents_fp8")
    return unpack_latents_reference(pages.view(-1, pages.shape[-1])[slots], kv_lora_rank)


def pack_latents_reference(c: Tensor, k_pe: Tensor) -> Tensor:
    values, scales = quantize_reference(c, LATENT_GROUP)
    parts = values, scales, k_pe.to(torch.bfloat16)
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=-1)


def unpack_latents_reference(records: Tensor, kv_lora_rank: int) -> Tensor:
    num_scales = math.ceil(kv_lora_rank / LATENT_GROUP)
    rope_bytes = records.shape[-1] - kv_lora_rank - 4 * num_scales
    # Cloned, because a slice of one record counts as contiguous and may begin where no fp32 can.
    values, scales, k_pe = (
        part.clone(memory_format=torch.contiguous_format)
        for part in records.split([kv_lora_rank, 4 * num_scales, rope_bytes], dim=-1)
    )
    c = dequantize_reference(values.view(FP8), scales.view(torch.float32), LATENT_GROUP)
    return torch.cat([c, k_pe.view(torch.bfloat16).float()], dim=-1)

"""The indexer's keys, written into pages and read back.

A page of 64 tokens is planar: first the e4m3 values of all its tokens, token by token, then their fp32
scales (8,192 + 256 bytes at full size). Shapes: P pages, T tokens, D index_head_dim.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, require, require_torch
from kernels.fp8_quant import FP8


def write_index_keys_fp8(
    pages: Tensor, slots: Tensor, keys: Tensor, scales: Tensor, page_size: int, *, backend: Backend
) -> None:
    """Store quantised keys.

    Args:
        pages: [P, page_size * (D + 4)] uint8.
        slots: [T] int64, distinct.
        keys: [T, D] e4m3; scales: [T] float32.
    """
    expected = page_size * (keys.shape[-1] + 4)
    require(pages.shape[-1] == expected, "write_index_keys_fp8", f"{pages.shape[-1]} bytes, not {expected}")
    require_torch(backend, "write_index_keys_fp8")
    values, scale_plane = planes(pages, page_size)
    page, offset = slots // page_size, slots % page_size
    values[page, offset] = keys.view(torch.uint8)
    scale_plane[page, offset] = scales.unsqueeze(-1).view(torch.uint8)


def read_index_keys_fp8(
    pages: Tensor, page_ids: Tensor, page_size: int, *, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Gather whole pages of one sequence.

    Args:
        pages: [P, page_size * (D + 4)] uint8.
        page_ids: [N] int64, the pages of the sequence in order.

    Returns:
        keys [N * page_size, D] e4m3 and scales [N * page_size] float32.
    """
    require_torch(backend, "read_index_keys_fp8")
    values, scale_plane = planes(pages[page_ids], page_size)
    keys = values.flatten(0, 1).contiguous().view(FP8)
    return keys, scale_plane.flatten(0, 1).contiguous().view(torch.float32).squeeze(-1)


def planes(pages: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Views of the value plane [P, page_size, D] and the scale plane [P, page_size, 4], both uint8."""
    values, scales = pages.split([pages.shape[-1] - 4 * page_size, 4 * page_size], dim=-1)
    return values.unflatten(-1, (page_size, -1)), scales.unflatten(-1, (page_size, 4))

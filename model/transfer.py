"""Numbers between the host and a device, without either of them waiting.

A copy from or to pageable memory makes the host wait for everything that the device still has to do. Pinned
memory does not; who needs numbers from a device says when (`ToHost.wait`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """[N] of dtype from host numbers."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def take(tensor: Tensor, rows: Sequence[int]) -> Tensor:
    """[N, ..] of the given rows; a view where they follow one another."""
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        return tensor[rows[0] : rows[0] + len(rows)]
    return tensor.index_select(0, to_device(rows, torch.int64, tensor.device))


def put(tensor: Tensor, rows: Sequence[int], values: Tensor) -> None:
    """Write values [N, ..] to the given rows."""
    if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
        tensor[rows[0] : rows[0] + len(rows)] = values
    else:
        tensor.index_copy_(0, to_device(rows, torch.int64, tensor.device), values)


class ToHost:
    """A tensor on its way to the host, from where its device stands now."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        """The tensor, on the host."""
        if self._arrived:
            self._arrived.synchronize()
        return self._tensor

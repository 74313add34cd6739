"""What launchers ask about the device they launch on. Answers never change, so they are kept."""

from functools import lru_cache

import torch

_SHARED_BYTES = 228 * 1024  # of a Hopper processor
_APART = 2048  # of these with each program: 1 KiB is CUDA's own, the rest for barriers and alignment


@lru_cache(maxsize=16)
def num_sms(device: torch.device) -> int:
    """Streaming multiprocessors of a device; an H100's where there is none (the interpreter)."""
    if device.type != "cuda":
        return 132
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """Whether kernels for NVIDIA Hopper alone run here."""
    if device.type != "cuda" or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device)[0] == 9


def shared_bytes(programs: int) -> int:
    """Shared memory that each program can fill where so many share a Hopper processor."""
    return _SHARED_BYTES // programs - _APART

"""Memory of a GPU that another process may map, through CUDA's driver.

Not out of torch's pool: a handle names the whole allocation, so it has to be one of its own.
"""

import ctypes
import weakref
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workers.transport.carrier import CarrierUnavailable

HANDLE_BYTES = 64
_GRANULE = 2 << 20  # smaller allocations share a block, and a handle would let the peer see all of it
_LAZY_PEER_ACCESS = 1
_STREAM_ORDER, _BESIDE_COMPUTE = 1, 1

Array = np.ndarray[tuple[int], np.dtype[np.uint64]]


class CudaError(RuntimeError):
    """A call of CUDA's driver failed.

    Args:
        call: its name.
        status: what it returned.
    """

    def __init__(self, call: str, status: int) -> None:
        super().__init__(call, status)
        self.call, self.status = call, status

    def __str__(self) -> str:
        return f"{self.call} returned {self.status}"


class _Handle(ctypes.Structure):
    _fields_ = (("data", ctypes.c_char * HANDLE_BYTES),)


class _CopyAttributes(ctypes.Structure):
    """CUmemcpyAttributes of CUDA 12.8; the hints are for managed memory."""

    _fields_ = (("order", ctypes.c_int), ("hints", ctypes.c_int * 4), ("flags", ctypes.c_uint))


class DeviceBytes:
    """Bytes of a GPU that can be given to other processes. They are freed with the last tensor on them.

    Args:
        num_bytes: how many; more are taken, in steps of 2 MiB.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        size = max(1, -(-num_bytes // _GRANULE)) * _GRANULE
        address = ctypes.c_uint64()
        call(device, "cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._address = address.value
        weakref.finalize(self, _free, device, self._address).atexit = False
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (self._address, False),
            "version": 3,
        }


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that `handle_of` can name to other processes; as `torch.zeros` otherwise.

    Raises:
        CudaError: there is no memory left.
        CarrierUnavailable: there is no GPU.
    """
    memory = DeviceBytes(prod(shape) * dtype.itemsize, device)
    tensor = torch.as_tensor(memory, device=device).zero_()
    torch.cuda.current_stream(device).synchronize()  # before somebody else writes there
    return tensor.view(dtype).view(shape)


def handle_of(tensor: Tensor) -> Tensor:
    """uint8 [64] on the host: with it another process of this host can map the tensor's memory.

    Raises:
        ValueError: the tensor does not begin an allocation.
    """
    base, size = ctypes.c_uint64(), ctypes.c_size_t()
    address = ctypes.c_uint64(tensor.data_ptr())
    call(tensor.device, "cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), address)
    if base.value != tensor.data_ptr():
        raise ValueError("only memory of its own can be shared: make the tensor with shared_zeros")
    handle = _Handle()
    call(tensor.device, "cuIpcGetMemHandle", ctypes.byref(handle), address)
    return torch.frombuffer(bytearray(bytes(handle)), dtype=torch.uint8)


class PeerMemory:
    """Another process's memory as our GPU sees it, from `address` on, until `close`.

    Args:
        handle: uint8 [64] of `handle_of` there.

    Raises:
        CudaError: it cannot be mapped (another host, no path between the GPUs, the peer is gone).
    """

    def __init__(self, handle: Tensor, device: torch.device) -> None:
        if handle.dtype != torch.uint8 or handle.shape != (HANDLE_BYTES,):
            raise ValueError(f"a handle is uint8 [{HANDLE_BYTES}], not {handle.dtype} {tuple(handle.shape)}")
        address = ctypes.c_uint64()
        theirs = _Handle.from_buffer_copy(bytes(handle.tolist()))
        flags = ctypes.c_uint(_LAZY_PEER_ACCESS)
        call(device, "cuIpcOpenMemHandle_v2", ctypes.byref(address), theirs, flags)
        self.address = address.value
        self._closing = weakref.finalize(self, _unmap, device, self.address)
        self._closing.atexit = False

    def close(self) -> None:
        """Unmap it; our streams must be idle. May be called twice."""
        self._closing()


def copy(target: int, source: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
    """Copy between addresses in stream order, by a copy engine where another GPU takes part."""
    call(
        stream.device,
        "cuMemcpyAsync",
        ctypes.c_uint64(target),
        ctypes.c_uint64(source),
        ctypes.c_size_t(num_bytes),
        ctypes.c_void_p(stream.cuda_stream),
    )


def copy_many(targets: Array, sources: Array, sizes: Array, stream: torch.cuda.Stream) -> None:
    """As many copies as there are addresses, in no order among themselves, by one call: a copy alone takes
    the host 10 us.

    Args:
        targets, sources, sizes: uint64 [n], contiguous; the last in bytes, none 0.
        stream: not the default one.
    """
    if not len(sizes):
        return
    attributes = _CopyAttributes(order=_STREAM_ORDER, flags=_BESIDE_COMPUTE)
    first, failed = ctypes.c_size_t(0), ctypes.c_size_t()
    call(
        stream.device,
        "cuMemcpyBatchAsync",
        *(ctypes.c_void_p(array.ctypes.data) for array in (targets, sources, sizes)),
        ctypes.c_size_t(len(sizes)),
        ctypes.byref(attributes),
        ctypes.byref(first),
        ctypes.c_size_t(1),
        ctypes.byref(failed),
        ctypes.c_void_p(stream.cuda_stream),
    )


def call(device: torch.device, name: str, *arguments: Any) -> None:
    """Call the driver with torch's context of a device current in this thread."""
    driver = _driver()
    driver.cuCtxSetCurrent(_context(device.index or 0))
    if status := getattr(driver, name)(*arguments):
        raise CudaError(name, status)


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CarrierUnavailable("CUDA's driver", "this machine has no NVIDIA GPU") from error


@lru_cache(maxsize=16)
def _context(ordinal: int) -> ctypes.c_void_p:
    """The context that torch uses too; kept for the life of the process."""
    torch.cuda.init()
    context = ctypes.c_void_p()
    if status := _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal):
        raise CudaError("cuDevicePrimaryCtxRetain", status)
    return context


def _unmap(device: torch.device, address: int) -> None:
    call(device, "cuIpcCloseMemHandle", ctypes.c_uint64(address))


def _free(device: torch.device, address: int) -> None:
    call(device, "cuMemFree_v2", ctypes.c_uint64(address))

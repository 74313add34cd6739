"""What moves tensors between two GPUs in stream order, whichever way they are connected.

A carrier belongs to a pair of processes, one GPU each. Every call below but `abort`, `check` and `close` puts
work on the current CUDA stream and returns at once, so a whole step may be captured in a CUDA graph: one
replay posts the same as the next, and a wait takes its message away.

    ours                                peer's
      post_send(slot, tensors)  ---->     post_wait(slot, parcel) -> the same tensors, read in place
      post_wait(slot, parcel)   <----     post_send(slot, tensors)

A slot is a place for one message in each direction. Who answers a slot's message has read it, so the answer
is the leave to send the next: nothing else guards a slot from being overwritten. What is sent needs no
acknowledgement, and none should be read out of a send that is complete: the peer may be dead.

    CarrierFailed       the peer is gone, silent for too long, or we were told to stop: throw the step away
    CarrierUnavailable  this machine or installation lacks what a carrier is made of
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from workers.transport.protocol import Deadline

ALIGNMENT = 128  # bytes; each tensor of a message starts at a multiple
_POLL_SECONDS = 20e-6


class Failure(IntEnum):
    """Why a carrier failed; what a device writes where the host can read it."""

    NONE = 0
    ABORTED = 1  # by our own host
    TIMEOUT = 2  # the peer's message did not come within the deadline


class CarrierFailed(Exception):
    """Messages of this carrier did not arrive; whatever was computed since is worth nothing.

    Args:
        peer: its name.
        reason: in words.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason

    def __str__(self) -> str:
        return f"carrier to {self.peer}: {self.reason}"


class CarrierUnavailable(Exception):
    """A carrier cannot be had here at all.

    Args:
        what: is missing.
        cure: what to do about it, or why there is nothing to do.
    """

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(what, cure)
        self.what, self.cure = what, cure

    def __str__(self) -> str:
        return f"{self.what} is missing: {self.cure}"


@dataclass(frozen=True)
class Parcel:
    """The tensors of one message: shape and dtype of each, known to both ends before it is sent."""

    tensors: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Parcel":
        return cls(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor starts in a slot, and where the last one ends, in bytes."""
        offsets = [0]
        for shape, dtype in self.tensors:
            size = prod(shape) * dtype.itemsize
            offsets.append(offsets[-1] + -(-size // ALIGNMENT) * ALIGNMENT)
        return tuple(offsets)

    @property
    def num_bytes(self) -> int:
        return self.offsets[-1]

    @property
    def end(self) -> int:
        """Where the last byte of all ends, without what fills it up."""
        sizes = [prod(shape) * dtype.itemsize for shape, dtype in self.tensors]
        return max((at + size for at, size in zip(self.offsets, sizes, strict=False) if size), default=0)

    def laid_out_at(self, tensors: Sequence[Tensor]) -> int | None:
        """The address from which tensors lie as they will in a slot, as `views` of one buffer do, if any."""
        if not all(tensor.is_contiguous() for tensor in tensors):
            return None
        starts = {
            tensor.data_ptr() - offset
            for tensor, offset in zip(tensors, self.offsets, strict=False)
            if tensor.numel()
        }
        return starts.pop() if len(starts) == 1 else None

    def views(self, mailbox: Tensor) -> tuple[Tensor, ...]:
        """The tensors in a mailbox, uint8 [num_bytes or more], without copying."""
        return tuple(
            mailbox[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, (shape, dtype) in zip(self.offsets, self.tensors, strict=False)
        )


class Carrier(Protocol):
    """One end of a pair. `epoch` names the pairing: what an older peer still writes is not taken for news."""

    peer: str
    epoch: int

    def post_send(self, slot: int, tensors: Sequence[Tensor]) -> None:
        """Send contiguous tensors of our GPU after the work before; then they may be reused."""
        ...

    def post_wait(self, slot: int, parcel: Parcel) -> tuple[Tensor, ...]:
        """Hold the stream until the slot's next message is there; its tensors, which lie in our mailbox.

        They may be read until an answer in the same slot has been posted. After a failure the stream goes on
        and they mean nothing; `check` tells.
        """
        ...

    def check(self) -> None:
        """Ask, without waiting, whether everything has arrived so far; call it before using a step's results.

        Raises:
            CarrierFailed: it has not.
        """
        ...

    def abort(self, reason: str) -> None:
        """Let every wait end, now and later, from any thread. The carrier is good for `close` only."""
        ...

    def close(self) -> None:
        """Give memory and mappings back. Our streams must be idle."""
        ...


def await_step(event: torch.cuda.Event, carriers: Iterable[Carrier], deadline: Deadline) -> None:
    """Wait for what was posted before an event; the one wait of a host for its peers.

    Raises:
        CarrierFailed: a carrier failed, or the deadline is over and all of them were aborted. Our streams may
            still be draining.
    """
    carriers = list(carriers)
    is_done = False
    while not is_done:
        is_done = event.query()
        if not is_done and deadline.is_over:
            for carrier in carriers:
                carrier.abort("the step did not end in time")
        for carrier in carriers:
            carrier.check()
        if not is_done:
            time.sleep(_POLL_SECONDS)

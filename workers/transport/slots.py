"""The places for messages: what one end offers to the other, and where they lie in memory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.mailbox import MAX_FLAGS
from workers.transport.carrier import ALIGNMENT

_FLAG_BYTES = 4 * MAX_FLAGS


@dataclass(frozen=True)
class SlotPlan:
    """How many slots there are, and how large a message may be.

    One more than these is there for greetings, with room for `ALIGNMENT * 4` bytes.
    """

    num_slots: int
    slot_bytes: int

    def __post_init__(self) -> None:
        if self.num_slots < 1 or self.slot_bytes < 1:
            raise ValueError(f"{self.num_slots} slots of {self.slot_bytes} bytes hold nothing")

    @property
    def greeting(self) -> int:
        """The slot of greetings."""
        return self.num_slots

    @property
    def num_bytes(self) -> int:
        """Of all slots and then the flags of each."""
        return self.flags_offset(self.num_slots + 1)

    def slot_offset(self, slot: int) -> int:
        return slot * -(-self.slot_bytes // ALIGNMENT) * ALIGNMENT

    def flags_offset(self, slot: int) -> int:
        return self.slot_offset(self.greeting) + 4 * ALIGNMENT + slot * _FLAG_BYTES

    def check(self, slot: int, num_bytes: int) -> None:
        """Raises ValueError for a slot there is not, or a message too large for it."""
        room = self.slot_bytes if slot < self.greeting else 4 * ALIGNMENT
        if not 0 <= slot <= self.greeting or num_bytes > room:
            raise ValueError(
                f"slot {slot} of {self.num_slots} has no room for {num_bytes} bytes, only {room}"
            )

    def slot(self, memory: Tensor, slot: int) -> Tensor:
        """A slot in memory, uint8 [num_bytes]."""
        start = self.slot_offset(slot)
        return memory[start : start + (self.slot_bytes if slot < self.greeting else 4 * ALIGNMENT)]

    def flags(self, memory: Tensor, slot: int) -> Tensor:
        """Its flags, int32 [MAX_FLAGS]."""
        start = self.flags_offset(slot)
        return memory[start : start + _FLAG_BYTES].view(torch.int32)

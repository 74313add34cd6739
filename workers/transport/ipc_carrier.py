"""Between processes of one host: mailboxes in each GPU's memory that the peer maps and writes.

A message is one kernel of ours that writes it into the peer's mailbox and one of theirs that waits for it;
what comes is read where it lies. This is the fastest way while the GPU has room; for hops beside products
that fill it see `copy_carrier.py`. A wait ends by its message, by `abort`, or by its deadline; after a
failure later waits end at once, and nothing that follows is announced to the peer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.mailbox import num_flags, send_to_mailbox, wait_for_mailbox
from workers.transport.carrier import CarrierFailed, Failure, Parcel
from workers.transport.cuda_memory import PeerMemory, handle_of, shared_zeros
from workers.transport.slots import SlotPlan

MAX_EPOCH = 2**31 - 1


class Inbox:
    """Our slots and flags, in memory that the peer can map: make it first, then tell the peer its handle."""

    def __init__(self, plan: SlotPlan, device: torch.device) -> None:
        self.plan, self.device = plan, device
        self.memory = shared_zeros((plan.num_bytes,), torch.uint8, device)
        self.handle = handle_of(self.memory)


class IpcCarrier:
    """A `Carrier` by kernels. See there for what its methods promise.

    Args:
        peer: its name.
        epoch: 1 to MAX_EPOCH; the same at both ends, higher than that of any pairing before.
        inbox: ours.
        outbox, plan: the peer's inbox as we see it.
        timeout: seconds that a wait on the device may last.
    """

    def __init__(
        self, peer: str, epoch: int, inbox: Inbox, outbox: PeerMemory, plan: SlotPlan, *, timeout: float
    ) -> None:
        if not 0 < epoch <= MAX_EPOCH:
            raise ValueError(f"epoch {epoch} is not within 1 and {MAX_EPOCH}")
        self.peer, self.epoch = peer, epoch
        self._inbox, self._outbox, self._plan, self._timeout = inbox, outbox, plan, timeout
        self._failed = torch.zeros(1, dtype=torch.int32, device=inbox.device)
        self._words = torch.zeros(2, dtype=torch.int32, pin_memory=True)  # to and from kernels
        self._asked, self._noted = self._words.numpy()[:1], self._words.numpy()[1:]
        self._reason = ""

    def post_send(self, slot: int, tensors: Sequence[Tensor]) -> None:
        parcel = Parcel.of(tensors)
        self._plan.check(slot, parcel.num_bytes)
        self._write(self._outbox.address, self._plan, slot, parcel, tensors)

    def post_wait(self, slot: int, parcel: Parcel) -> tuple[Tensor, ...]:
        plan, memory = self._inbox.plan, self._inbox.memory
        plan.check(slot, parcel.num_bytes)
        wait_for_mailbox(
            plan.flags(memory, slot),
            self._num_flags(parcel),
            self._failed,
            self._words,
            int(self._timeout * 1e9),
            self.epoch,
        )
        return parcel.views(plan.slot(memory, slot))

    def check(self) -> None:
        if self._reason:
            raise CarrierFailed(self.peer, self._reason)
        if self._noted[0] != Failure.NONE:
            raise CarrierFailed(self.peer, f"nothing came within {self._timeout} s")

    def abort(self, reason: str) -> None:
        self._reason = self._reason or reason
        self._asked[0] = Failure.ABORTED

    def close(self) -> None:
        self._outbox.close()

    def warm_up(self) -> None:
        """Load the kernels by a message to ourselves, before the peer's greeting is awaited."""
        slot, note = self._inbox.plan.greeting, torch.zeros(4, dtype=torch.int32, device=self._inbox.device)
        parcel = Parcel.of([note])
        self._write(self._inbox.memory.data_ptr(), self._inbox.plan, slot, parcel, [note])
        self.post_wait(slot, parcel)
        torch.cuda.current_stream(self._inbox.device).synchronize()

    def _write(
        self, address: int, plan: SlotPlan, slot: int, parcel: Parcel, tensors: Sequence[Tensor]
    ) -> None:
        """Write a message into a slot of the memory at an address, and raise its flags."""
        send_to_mailbox(
            tensors,
            parcel.offsets[:-1],
            address + plan.slot_offset(slot),
            address + plan.flags_offset(slot),
            self._num_flags(parcel),
            self._failed,
            self.epoch,
        )

    def _num_flags(self, parcel: Parcel) -> int:
        return num_flags(parcel.num_bytes)

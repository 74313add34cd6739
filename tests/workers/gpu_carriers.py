"""A carrier between two threads and a runner without a GPU, for the tests of experts on other GPUs."""

import queue
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workers.gpu_experts import Step
from workers.transport.carrier import CarrierFailed, Parcel
from workers.transport.protocol import Deadline

Mail = queue.Queue[tuple[Tensor, ...]]


@dataclass
class ThreadCarrier:
    """As `Carrier`: what is sent is copied into the peer's queue, and who waits blocks his thread.

    A slot that is overwritten before it was read is an error, as only its answer is the leave to send again.
    """

    peer: str
    inbox: dict[int, Mail]
    outbox: dict[int, Mail]
    wait_seconds: float
    epoch: int = 1
    failure: str = ""
    is_closed: bool = False
    sent: list[Parcel] = field(default_factory=list)

    def post_send(self, slot: int, tensors: Sequence[Tensor]) -> None:
        assert all(tensor.is_contiguous() for tensor in tensors)
        if self.failure:
            return
        assert self.outbox[slot].empty(), f"slot {slot} has not been read"
        self.sent.append(Parcel.of(tensors))
        mailbox = torch.zeros(self.sent[-1].num_bytes, dtype=torch.uint8)
        for place, tensor in zip(self.sent[-1].views(mailbox), tensors, strict=True):
            place.copy_(tensor)
        self.outbox[slot].put(self.sent[-1].views(mailbox))

    def post_wait(self, slot: int, parcel: Parcel) -> tuple[Tensor, ...]:
        deadline = Deadline.after(self.wait_seconds)
        while not self.failure:
            try:
                found = self.inbox[slot].get(timeout=0.005)
            except queue.Empty:
                if deadline.is_over:
                    self.failure = "no message in time"
                continue
            assert Parcel.of(found) == parcel
            return found
        return parcel.views(torch.zeros(parcel.num_bytes, dtype=torch.uint8))

    def check(self) -> None:
        if self.failure:
            raise CarrierFailed(self.peer, self.failure)

    def abort(self, reason: str) -> None:
        self.failure = self.failure or reason

    def close(self) -> None:
        self.is_closed = True


def carrier_pair(
    names: tuple[str, str], num_slots: int, wait_seconds: float = 20.0
) -> tuple[ThreadCarrier, ThreadCarrier]:
    """The ends of the first and of the second."""
    there: dict[int, Mail] = {slot: queue.Queue() for slot in range(num_slots)}
    back: dict[int, Mail] = {slot: queue.Queue() for slot in range(num_slots)}
    return (
        ThreadCarrier(names[1], back, there, wait_seconds),
        ThreadCarrier(names[0], there, back, wait_seconds),
    )


class Over:
    """As an event that has come."""

    def query(self) -> bool:
        return True


@dataclass
class DirectRunner:
    """Does a step at once; a captured one is the step itself, and is counted."""

    num_captured: int = 0

    def launch(self, step: Step) -> Over:
        step()
        return Over()

    def capture(self, step: Step) -> Step:
        self.num_captured += 1
        return step

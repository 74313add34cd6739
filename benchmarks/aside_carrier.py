"""A carrier whose messages leave by a stream of their own, beside what the GPU computes next.

For the end that has something else to do until it is answered: attention, with other micro-batches. There
every message is answered in its slot, and the wait for the answer is what brings the streams together again,
so a step can be captured as with any other carrier. Measured, it gains nothing with mailboxes, whose sends
are short, and makes copies as good as these: so it is an experiment and no part of the transport.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from workers.transport.carrier import Carrier, Parcel


class AsideCarrier:
    """As the `Carrier` it is made of, which it owns. What is sent must not change before the answer."""

    def __init__(self, inner: Carrier, device: torch.device) -> None:
        self.peer, self.epoch = inner.peer, inner.epoch
        self._inner = inner
        self._stream = torch.cuda.Stream(device, priority=-1)  # few programs, and somebody waits for them
        # By slot: the end of the send, and what was sent, as its memory is in use until then.
        self._leaving: dict[int, tuple[torch.cuda.Event, Sequence[Tensor]]] = {}

    def post_send(self, slot: int, tensors: Sequence[Tensor]) -> None:
        """As `Carrier.post_send`, but a peer that does not answer in the slot is never heard of again."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            self._inner.post_send(slot, tensors)
            self._leaving[slot] = (self._stream.record_event(), tensors)

    def post_wait(self, slot: int, parcel: Parcel) -> tuple[Tensor, ...]:
        """As `Carrier.post_wait`."""
        if slot in self._leaving:
            sent, _ = self._leaving.pop(slot)
            torch.cuda.current_stream(self._stream.device).wait_event(sent)
        return self._inner.post_wait(slot, parcel)

    def check(self) -> None:
        self._inner.check()

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def close(self) -> None:
        self._inner.close()

"""Between processes of one host, beside products that fill the GPU: messages go by a copy engine.

Only the flag takes a kernel, of a single warp that fits beside whatever runs. Each tensor is a copy of its
own unless they lie as they will in the slot: make them as `Parcel.views` of one buffer where that can be had.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.mailbox import raise_flag
from workers.transport.carrier import Parcel
from workers.transport.cuda_memory import copy
from workers.transport.ipc_carrier import IpcCarrier
from workers.transport.slots import SlotPlan


class CopyCarrier(IpcCarrier):
    """An `IpcCarrier` whose messages are copies with one flag."""

    def _write(
        self, address: int, plan: SlotPlan, slot: int, parcel: Parcel, tensors: Sequence[Tensor]
    ) -> None:
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError("a message's tensors are contiguous")
        start, stream = address + plan.slot_offset(slot), torch.cuda.current_stream(self._inbox.device)
        pieces = [
            (offset, tensor.data_ptr(), tensor.nbytes)
            for offset, tensor in zip(parcel.offsets, tensors, strict=False)
            if tensor.nbytes
        ]
        if (base := parcel.laid_out_at(tensors)) is not None:
            pieces = [(0, base, parcel.end)]
        for offset, source, num_bytes in pieces:
            copy(start + offset, source, num_bytes, stream)
        raise_flag(address + plan.flags_offset(slot), self._failed, self.epoch)

    def _num_flags(self, parcel: Parcel) -> int:
        return 1

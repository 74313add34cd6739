"""Between hosts, or GPUs without a path between their memories: NCCL through CuPy, a communicator a pair.

A message is one send and one receive of all its tensors; unless they lie as they will in the slot, a kernel
brings them together first. NCCL waits for ever and knows nothing of a peer that died: whatever may block the
host runs in a thread of its own behind a deadline, and what hangs on the GPU ends by `abort`, which itself
does not return before the CUDA graphs that hold the communicator's calls have been reset.

Whoever starts the process puts `ENVIRONMENT` into its environment: NCCL reads it when it is loaded, and
launching a captured step then takes 11 us and not 190. Captured and other calls of one communicator must not
be in flight together.
"""

import threading
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor

from kernels.mailbox import MAX_FLAGS, num_flags, send_to_mailbox
from workers.transport.carrier import CarrierFailed, CarrierUnavailable, Parcel
from workers.transport.protocol import Deadline, DeadlineExceeded
from workers.transport.slots import SlotPlan

T = TypeVar("T")

ENVIRONMENT = {"NCCL_GRAPH_MIXING_SUPPORT": "0"}
UNIQUE_ID_BYTES = 128
_CLOSE_SECONDS = 10.0


def unique_id() -> Tensor:
    """uint8 [128]: what the two ends of a communicator have in common. One end makes it.

    Raises:
        CarrierUnavailable: CuPy is not installed.
    """
    return torch.frombuffer(bytearray(_nccl().get_unique_id()), dtype=torch.uint8)


class NcclCarrier:
    """A `Carrier` by NCCL. See there for what its methods promise.

    There is no deadline on the device: who waits for a step does it by `await_step`.

    Args:
        peer: its name.
        epoch: of the pairing; a communicator is of one pairing alone.
        common: the `unique_id` of the pair.
        is_first: of the two ends, who made it.
        plan: the largest messages, in both directions.
        deadline: for meeting the peer.

    Raises:
        CarrierUnavailable: CuPy is not installed.
        DeadlineExceeded: the peer did not come; the thread that waits for it stays until the process ends.
        CarrierFailed: NCCL does not connect.
    """

    def __init__(
        self,
        peer: str,
        epoch: int,
        common: Tensor,
        *,
        is_first: bool,
        plan: SlotPlan,
        device: torch.device,
        deadline: Deadline,
    ) -> None:
        if common.dtype != torch.uint8 or common.shape != (UNIQUE_ID_BYTES,):
            raise ValueError(f"a unique id is uint8 [128], not {common.dtype} {tuple(common.shape)}")
        self.peer, self.epoch, self._plan, self._device = peer, epoch, plan, device
        self._nccl = _nccl()
        # ncclRemoteError and ncclInProgress are not in CuPy's table of errors.
        self._errors: tuple[type[Exception], ...] = (self._nccl.NcclError, KeyError)
        self._other = int(is_first)  # its rank
        self._inbox, self._outbox = (
            torch.zeros(plan.num_bytes, dtype=torch.uint8, device=device) for _ in range(2)
        )
        self._flags = torch.zeros(MAX_FLAGS, dtype=torch.int32, device=device)  # of packing, read by nobody
        self._never_failed = torch.zeros(1, dtype=torch.int32, device=device)
        self._reason = ""
        self._aborting: threading.Thread | None = None
        self._lock = threading.Lock()
        rank, name = 1 - self._other, bytes(common.tolist())

        def meet() -> Any:
            with torch.cuda.device(device):
                return self._nccl.NcclCommunicator(2, name, rank)

        try:
            self._communicator = within(deadline, f"meeting {peer} in NCCL", meet)
        except self._errors as error:
            hint = "is each end on a GPU of its own?"
            raise CarrierFailed(peer, f"NCCL does not connect, {hint} {error!r}") from error

    def post_send(self, slot: int, tensors: Sequence[Tensor]) -> None:
        parcel = Parcel.of(tensors)
        self._plan.check(slot, parcel.num_bytes)
        source = parcel.laid_out_at(tensors) or self._pack(slot, parcel, tensors)
        self._post(self._communicator.send, source, parcel)

    def post_wait(self, slot: int, parcel: Parcel) -> tuple[Tensor, ...]:
        self._plan.check(slot, parcel.num_bytes)
        mailbox = self._plan.slot(self._inbox, slot)
        self._post(self._communicator.recv, mailbox.data_ptr(), parcel)
        return parcel.views(mailbox)

    def check(self) -> None:
        if self._reason:
            raise CarrierFailed(self.peer, self._reason)
        try:
            self._communicator.check_async_error()
        except self._errors as error:
            raise CarrierFailed(self.peer, repr(error)) from error

    def abort(self, reason: str) -> None:
        with self._lock:
            if self._aborting:
                return
            self._reason = reason
            self._aborting = threading.Thread(target=self._abort, name=f"abort {self.peer}", daemon=True)
            self._aborting.start()

    def close(self) -> None:
        """Give memory and mappings back. Our streams must be idle, and after `abort` our graphs reset.

        Raises:
            DeadlineExceeded: NCCL holds on to something.
        """
        if self._aborting is None:
            deadline = Deadline.after(_CLOSE_SECONDS)
            within(deadline, "closing NCCL", self._communicator.destroy)
            return
        self._aborting.join(_CLOSE_SECONDS)
        if self._aborting.is_alive():
            raise DeadlineExceeded("aborting NCCL")

    def _abort(self) -> None:
        try:
            self._communicator.abort()
        except self._errors:  # it was failing already
            return

    def _pack(self, slot: int, parcel: Parcel, tensors: Sequence[Tensor]) -> int:
        """Bring the tensors together in a slot of our own; its address."""
        staged = self._plan.slot(self._outbox, slot)
        send_to_mailbox(
            tensors,
            parcel.offsets[:-1],
            staged.data_ptr(),
            self._flags.data_ptr(),
            num_flags(parcel.num_bytes),
            self._never_failed,
            epoch=1,
        )
        return staged.data_ptr()

    def _post(self, call: Callable[..., None], address: int, parcel: Parcel) -> None:
        """Post a send or a receive; what NCCL refuses once it was aborted is told by `check`."""
        if self._reason:
            return
        stream = torch.cuda.current_stream(self._device).cuda_stream
        try:
            call(address, parcel.end, self._nccl.NCCL_UINT8, self._other, stream)
        except self._errors as error:
            self._reason = self._reason or repr(error)


def within(deadline: Deadline, what: str, work: Callable[[], T]) -> T:
    """What work gives, done in a thread that is left behind when the deadline is over.

    Raises:
        DeadlineExceeded: it was; and whatever the work raises.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(deadline.left())
    if errors:
        raise errors[0]
    if not results:
        raise DeadlineExceeded(what)
    return results[0]


def _nccl() -> Any:
    try:
        return import_module("cupy.cuda.nccl")
    except ImportError as error:
        raise CarrierUnavailable("CuPy with NCCL", "pip install 'eightfold[gpu]'") from error

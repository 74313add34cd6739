"""Two GPUs become a pair over a connection that their processes have already.

    both   PAIR    what each offers: its slots and how to write there (handle, or NCCL's unique id)
    both   READY   it has mapped the other's memory and loaded its kernels
    then   a greeting through the carrier, to and fro, and its content is compared

The connection stays: its end is the first that is heard of a peer's death, before any deadline on a device
and before Ray. `keep_watch` is what its thread then does. Open it after CUDA is in use at both ends: Linux
closes the descriptors of a killed process last ones first, and those of a GPU take tens of milliseconds.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from workers.transport.carrier import Carrier, CarrierFailed, Parcel, await_step
from workers.transport.config import CarrierKind
from workers.transport.copy_carrier import CopyCarrier
from workers.transport.cuda_memory import HANDLE_BYTES, PeerMemory, handle_of
from workers.transport.ipc_carrier import Inbox, IpcCarrier
from workers.transport.message import MalformedMessage, Message
from workers.transport.nccl_carrier import UNIQUE_ID_BYTES, NcclCarrier, unique_id, within
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, PeerLost, Received
from workers.transport.slots import SlotPlan

_CODES: dict[CarrierKind, int] = {"ipc": 1, "copy": 2, "nccl": 3}  # they travel: never renumber
_KEY_BYTES: dict[CarrierKind, tuple[int, ...]] = {
    "ipc": (HANDLE_BYTES,),
    "copy": (HANDLE_BYTES,),
    "nccl": (0, UNIQUE_ID_BYTES),
}
_HELLO = Parcel((((8,), torch.int64), ((3,), torch.int32)))  # two tensors that want to be brought together
_LISTEN_SECONDS = 0.1


class Kind(IntEnum):
    """Kinds of message."""

    PAIR = 48
    READY = 49
    POOLS = 50


@dataclass(frozen=True)
class Offer:
    """What one end tells the other.

    Attributes:
        kind: of the carrier; both want the same.
        plan: the slots that can be written.
        key: uint8, the inbox's handle, or NCCL's unique id; empty from who takes the other's id.
    """

    kind: CarrierKind
    plan: SlotPlan
    key: Tensor

    def pack(self) -> tuple[Tensor, ...]:
        return torch.tensor([_CODES[self.kind], self.plan.num_slots, self.plan.slot_bytes]), self.key

    @classmethod
    def unpack(cls, tensors: tuple[Tensor, ...]) -> "Offer":
        """Raises MalformedMessage for what no peer of ours sends."""
        if len(tensors) != 2:
            raise MalformedMessage(f"an offer of {len(tensors)} tensors")
        numbers, key = tensors
        if numbers.dtype != torch.int64 or numbers.shape != (3,):
            raise MalformedMessage(f"an offer with numbers {numbers.dtype} {tuple(numbers.shape)}")
        code, num_slots, slot_bytes = numbers.tolist()
        kind = next((kind for kind, number in _CODES.items() if number == code), None)
        if kind is None or num_slots < 1 or slot_bytes < 1:
            raise MalformedMessage(f"an offer of kind {code}, {num_slots} slots of {slot_bytes} bytes")
        if key.dtype != torch.uint8 or key.ndim != 1 or len(key) not in _KEY_BYTES[kind]:
            raise MalformedMessage(f"an offer of {kind} with a key {key.dtype} {tuple(key.shape)}")
        return cls(kind, SlotPlan(num_slots, slot_bytes), key)


def pair(
    endpoint: Endpoint,
    peer: str,
    kind: CarrierKind,
    epoch: int,
    plan: SlotPlan,
    device: torch.device,
    *,
    timeout: float,
    deadline: Deadline,
) -> Carrier:
    """Make the carrier to a connected peer, who does the same; when it returns, both directions have worked.

    Args:
        kind: the same at both ends.
        epoch: names this pairing at both ends; higher than that of any before.
        plan: the slots that the peer may write; nccl: the same at both ends.
        timeout: seconds that a wait on the device may last (ipc, copy).
        deadline: for all of it.

    Raises:
        CarrierFailed: the peer is gone, wants another pairing, or what arrived is not what was sent.
        CarrierUnavailable: the kind cannot be had here.
        CudaError: there is no memory left, or the peer's cannot be mapped.
        DeadlineExceeded, MalformedMessage.
    """
    talk = _Talk(endpoint, peer, epoch, deadline)
    is_first = endpoint.address.name < peer
    carrier: Carrier
    if kind == "nccl":
        ours = Offer(kind, plan, unique_id() if is_first else torch.empty(0, dtype=torch.uint8))
        theirs = _agree(talk, ours)
        common = ours.key if is_first else theirs.key
        carrier = NcclCarrier(
            peer, epoch, common, is_first=is_first, plan=plan, device=device, deadline=deadline
        )
    else:
        inbox = Inbox(plan, device)
        theirs = _agree(talk, Offer(kind, plan, inbox.handle))
        made = IpcCarrier if kind == "ipc" else CopyCarrier
        outbox = PeerMemory(theirs.key, device)
        carrier = made(peer, epoch, inbox, outbox, theirs.plan, timeout=timeout)
        carrier.warm_up()
    try:
        talk.exchange(Kind.READY)
        _greet(carrier, plan.greeting, theirs.plan.greeting, device, is_first=is_first, deadline=deadline)
    except BaseException as error:
        carrier.abort(str(error))  # nobody else will: let no wait of it stay behind on the device
        raise
    return carrier


def map_pools(
    endpoint: Endpoint, peer: str, epoch: int, pools: Sequence[Tensor], deadline: Deadline
) -> list[PeerMemory]:
    """Let each other write pages: after `pair`, both ends call it.

    Args:
        pools: [pages, ...] each, from `shared_zeros`; as many at both ends and their pages as large.

    Returns:
        The peer's pools.

    Raises:
        CarrierFailed: the peer is gone, or its pages are others.
        CudaError: its memory cannot be mapped.
        DeadlineExceeded, MalformedMessage.
    """
    talk = _Talk(endpoint, peer, epoch, deadline)
    sizes = torch.tensor([pool[0].nbytes for pool in pools])
    handles = torch.stack([handle_of(pool) for pool in pools])
    theirs = talk.exchange(Kind.POOLS, (sizes, handles))
    if len(theirs) != 2 or theirs[1].shape != handles.shape or theirs[1].dtype != torch.uint8:
        raise MalformedMessage("handles of pools")
    if not torch.equal(theirs[0], sizes):
        raise CarrierFailed(peer, "its pages are of another size")
    return [PeerMemory(handle, pool.device) for handle, pool in zip(theirs[1], pools, strict=True)]


def keep_watch(
    endpoint: Endpoint,
    carriers: Mapping[str, Carrier],
    stop: threading.Event,
    deliver: Callable[[Received], None],
) -> None:
    """Abort the carrier of a peer whose connection ends, deliver what else comes; until told to stop, or all
    these peers are gone.

    The endpoint belongs to the thread that runs this.
    """
    watched = set(carriers)
    while watched and not stop.is_set():
        try:
            event = endpoint.receive(Deadline.after(_LISTEN_SECONDS))
        except DeadlineExceeded:
            continue
        if isinstance(event, Received):
            deliver(event)
        elif event.peer in watched:
            watched.remove(event.peer)
            carriers[event.peer].abort(str(event))


_KINDS = frozenset(Kind)


def _agree(talk: "_Talk", ours: Offer) -> Offer:
    """Offer, and hear what the peer offers; it must go together."""
    theirs = Offer.unpack(talk.exchange(Kind.PAIR, ours.pack()))
    if theirs.kind != ours.kind or (ours.kind == "nccl" and theirs.plan != ours.plan):
        raise CarrierFailed(talk.peer, f"it offers {theirs.kind} with {theirs.plan}")
    return theirs


class _Talk:
    """The messages of one pairing."""

    def __init__(self, endpoint: Endpoint, peer: str, epoch: int, deadline: Deadline) -> None:
        self._endpoint, self.peer, self._epoch, self._deadline = endpoint, peer, epoch, deadline

    def exchange(self, kind: Kind, tensors: tuple[Tensor, ...] = ()) -> tuple[Tensor, ...]:
        """Tell the peer and hear the same of it."""
        try:
            self._endpoint.send(self.peer, Message(kind, tensors, epoch=self._epoch), self._deadline)
        except PeerLost as error:
            raise CarrierFailed(self.peer, str(error)) from error
        return self._hear(kind).tensors

    def _hear(self, kind: Kind) -> Message:
        """The next message of our epoch; what an earlier attempt left behind is passed over."""
        while True:
            event = self._endpoint.receive(self._deadline, self.peer)
            if isinstance(event, PeerLost):
                raise CarrierFailed(self.peer, str(event))
            message = event.message
            if message.kind in _KINDS and message.epoch < self._epoch:
                continue
            if message.kind != kind or message.epoch != self._epoch:
                raise CarrierFailed(
                    self.peer,
                    f"it sent a message of kind {message.kind}, epoch {message.epoch}, "
                    f"not {kind.name} of epoch {self._epoch}",
                )
            return message


def _greet(
    carrier: Carrier,
    our_slot: int,
    their_slot: int,
    device: torch.device,
    *,
    is_first: bool,
    deadline: Deadline,
) -> None:
    """Send each other a greeting, one after the other, and compare what arrived with what was sent."""
    hello = [torch.full(shape, carrier.epoch, dtype=dtype, device=device) for shape, dtype in _HELLO.tensors]
    heard: list[Tensor] = []

    def post() -> torch.cuda.Event:
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device), torch.cuda.stream(stream):
            if is_first:
                carrier.post_send(their_slot, hello)
            heard.extend(carrier.post_wait(our_slot, _HELLO))
            if not is_first:
                carrier.post_send(their_slot, hello)
            event = torch.cuda.Event()
            event.record(stream)
        return event

    event = within(deadline, f"greeting {carrier.peer}", post)  # NCCL connects, and may block
    await_step(event, [carrier], deadline)
    if not all(bool((tensor == carrier.epoch).all()) for tensor in heard):
        raise CarrierFailed(carrier.peer, "its greeting was garbled")

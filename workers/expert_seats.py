"""The experts' side of rows that go from GPU to GPU: a seat for every attention GPU that joins.

    attention (`expert_ways.py`)                   experts
      JOIN   slots, most rows, epoch  ---------->    a seat: endpoint, carrier, stream and thread of its own
      <-----------------  SEAT  where it is          or REFUSED: another epoch, too many rows
      joins it; both pair their GPUs
      STEP   what comes next          ---------->    launched whole (`gpu_experts.py`)

A seat ends with its peer, with a plan that cannot be run, or when a step does not end; nobody else's does.

What it takes on the experts' GPU: its slots have room for the largest pass. At full width a row is 7.5 KB on
its way there and 14 KB back. Chunks of 2,048 rows in two micro-batches take 31 MB by ipc or copy, where only
rows lie here, and 118 MB by nccl, which keeps an inbox and an outbox of the larger kind; a communicator takes
582 MB more (measured, NCCL 2.28). For the 56 attention GPUs of 64 that is 1.7 GB, or 39 GB by nccl; on each
of those GPUs the ways to 8 expert actors take 0.5 GB, or 5.6 GB.
"""

import logging
import queue
import threading
import time
from typing import Protocol

import torch

from kernels.backend import Backend
from model.checkpoint import Checkpoint, routed_experts
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts
from model.moe import experts_of
from model.random_weights import RandomCheckpoint
from workers.gpu_experts import (
    STEP,
    BadPlan,
    ExpertStepper,
    Runner,
    StepPlan,
    rows_parcel,
    slots_for,
    sums_parcel,
)
from workers.placement import ExpertPlacement, PlacementError
from workers.transport.carrier import Carrier, CarrierFailed
from workers.transport.config import WayConfig
from workers.transport.message import MalformedMessage, Message, TransportError
from workers.transport.protocol import Deadline, DeadlineExceeded, Endpoint, Received
from workers.transport.slots import SlotPlan
from workers.ways import Way
from workers.wire import Join, Kind, Refused, WayAddress, pack, unpack

_log = logging.getLogger(__name__)

_POLL_SECONDS = 0.05
_REPLY_SECONDS = 1.0
_CLOSE_SECONDS = 10.0
# Of a wait on the device, and of a whole step: an attention GPU compiles kernels in the middle of its first
# steps, and who is dead is heard of before.
_STEP_SECONDS = 60.0
_MOST_SEATS = 120  # the main endpoint knows so many peers
_MOST_ROWS, _MOST_SLOTS = 16384, 3
# Streams that share one of the driver's queues wait for each other's waits. Read when a process begins to use
# CUDA; 32 is the most there can be, 8 what there is without.
ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
_MOST_PLANS = 64  # told and not launched


def load_fused_experts(
    checkpoint: Checkpoint | RandomCheckpoint, groups: range, backend: Backend, device: str
) -> FusedExperts:
    """Read some groups' experts of every layer as they are stored, and nothing else of the checkpoint."""
    wanted = routed_experts(experts_of(checkpoint.config, groups))
    weights = checkpoint.load(wanted, dtype=torch.bfloat16, device=device, widen=False)
    return FusedExperts(checkpoint.config, weights, groups, backend)


class MakeRunner(Protocol):
    """Makes a seat's stream."""

    def __call__(self, *, is_urgent: bool) -> Runner: ...


class ExpertSeat(Way):
    """One attention GPU's seat. A thread talks to its host, another one launches its steps."""

    what = "seat at the experts"

    def __init__(
        self,
        config: WayConfig,
        number: int,
        model_config: ModelConfig,
        experts: FusedExperts,
        join: Join,
        make_runner: MakeRunner,
    ) -> None:
        super().__init__(config, number, experts.device, _STEP_SECONDS)
        self.address = WayAddress(self._endpoint.address, number)
        self.num_answered = 0
        self._model_config, self._experts, self._join = model_config, experts, join
        self._make_runner = make_runner
        self._plans: queue.Queue[StepPlan] = queue.Queue(_MOST_PLANS)
        self._stepper: ExpertStepper | None = None
        self._launcher = threading.Thread(target=self._launch, name=f"{self.name} steps", daemon=True)
        self.start()

    def _find(self, deadline: Deadline) -> tuple[str, int, SlotPlan]:
        peer = self._wait_for_peer(deadline)
        if self._device.type == "cuda":
            with torch.inference_mode():
                self._experts.warm_up(self._join.max_rows)
        config, rows = self._model_config, self._join.max_rows
        incoming, outgoing = rows_parcel(config, rows), sums_parcel(config, self._experts.groups, rows)
        return peer, self.address.epoch, slots_for(self._kind, self._join.num_slots, incoming, outgoing)

    def _begin(self, carrier: Carrier) -> None:
        self._stepper = ExpertStepper(
            self._model_config,
            self._experts,
            carrier,
            self._make_runner(is_urgent=self._join.is_urgent),
            max_rows=self._join.max_rows,
            num_slots=self._join.num_slots,
            step_seconds=_STEP_SECONDS,
        )
        self._launcher.start()

    def _deliver(self, received: Received) -> None:
        try:
            if received.message.kind != STEP or received.message.epoch != self.address.epoch:
                raise MalformedMessage(f"kind {received.message.kind}, epoch {received.message.epoch}")
            self._plans.put_nowait(StepPlan.of(received.message))
        except (MalformedMessage, queue.Full) as error:
            self._give_up(f"{received.peer.name} sent what it should not: {error!r}")

    def _launch(self) -> None:
        """Run plans as they come."""
        assert self._stepper
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        try:
            while not self._failed.is_set():
                try:
                    plan = self._plans.get(timeout=_POLL_SECONDS)
                except queue.Empty:
                    self._stepper.tend()
                    continue
                self._stepper.run(plan)
                self.num_answered += 1
        except (BadPlan, CarrierFailed) as error:
            self._give_up(str(error))
        except BaseException as error:
            _log.exception("%s: a step failed", self.name)
            self.abort(type(error).__name__)

    def _give_back(self) -> None:
        if self._stepper is None:
            super()._give_back()
            return
        self._launcher.join()  # its waits have ended
        is_closed = False
        while not is_closed:
            try:
                self._stepper.close("the seat ends")
                is_closed = True
            except DeadlineExceeded as error:  # memory that is in use is kept
                _log.warning("%s: %s", self.name, error)
        self._stepper = self._carrier = None


class ExpertHost:
    """Gives seats to attention GPUs, for the groups that are held here.

    `adopt` may be called from another thread while `serve` runs.
    """

    def __init__(
        self,
        name: str,
        config: ModelConfig,
        experts: FusedExperts,
        placement: ExpertPlacement,
        ways: WayConfig,
        make_runner: MakeRunner,
    ) -> None:
        """`make_runner` makes each seat a stream of its own."""
        self._name, self._config, self._experts, self._ways = name, config, experts, ways
        self._make_runner = make_runner
        self._seats: list[ExpertSeat] = []
        self._number = self._answered_before = 0
        self.num_refused = 0
        self.num_late = 0  # nothing is: a peer that does not wait has left
        self.adopt(placement)

    @property
    def num_answered(self) -> int:
        """Steps that were launched."""
        return self._answered_before + sum(seat.num_answered for seat in self._seats)

    def adopt(self, placement: ExpertPlacement) -> None:
        """Give seats for a new epoch. Those of the old one stay until their peers leave them.

        Raises:
            PlacementError: it asks for other groups than are held here; the old epoch stays.
        """
        share = placement.share_of(self._name)
        if share is None or share.groups != self._experts.groups:
            asked = share.groups if share else None
            raise PlacementError(f"{self._name} holds {self._experts.groups}, the placement asks for {asked}")
        self._epoch = placement.epoch

    def serve(self, endpoint: Endpoint, stop: threading.Event) -> None:
        """Give seats until told to stop; then all of them end."""
        while not stop.is_set():
            try:
                event = endpoint.receive(Deadline.after(_POLL_SECONDS))
            except DeadlineExceeded:
                pass
            else:
                if isinstance(event, Received):
                    self._take(endpoint, event)
            self._sweep()
        for seat in self._seats:
            seat.close("the experts end")
        end = time.monotonic() + _CLOSE_SECONDS
        for seat in self._seats:
            if not seat.join(max(0.0, end - time.monotonic())):
                _log.warning("%s does not end", seat.name)

    def _take(self, endpoint: Endpoint, received: Received) -> None:
        peer = received.peer.name
        try:
            if received.message.kind != Kind.JOIN:
                raise MalformedMessage(f"kind {received.message.kind}")
            reply = self._seat(unpack(Join, received.message))
        except MalformedMessage as error:
            _log.error("%s sent what it should not: %s", peer, error)
            self.num_refused += 1
            endpoint.disconnect(peer)
            return
        try:
            endpoint.send(peer, reply, Deadline.after(_REPLY_SECONDS))
        except TransportError as error:  # the seat waits for nobody, and ends by its deadline
            _log.warning("%s: %s", peer, error)

    def _seat(self, join: Join) -> Message:
        """A seat, or why there is none."""
        problem = ""
        if join.epoch != self._epoch:
            problem = f"its placement has epoch {self._epoch}, ours {join.epoch}"
        elif not (0 < join.num_slots <= _MOST_SLOTS and 0 < join.max_rows <= _MOST_ROWS):
            most = f"at most {_MOST_SLOTS} of {_MOST_ROWS} fit"
            problem = f"{join.num_slots} micro-batches of {join.max_rows} rows were asked for; {most}"
        elif len(self._seats) >= _MOST_SEATS:
            problem = f"all {_MOST_SEATS} seats are taken"
        if problem:
            self.num_refused += 1
            return pack(Kind.REFUSED, Refused(problem))
        self._number += 1
        seat = ExpertSeat(self._ways, self._number, self._config, self._experts, join, self._make_runner)
        self._seats.append(seat)
        return pack(Kind.SEAT, seat.address)

    def _sweep(self) -> None:
        """Let go of seats that have failed."""
        for seat in [seat for seat in self._seats if seat.has_failed]:
            seat.close("it has failed")
            self._seats.remove(seat)
            self._answered_before += seat.num_answered

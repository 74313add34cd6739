"""The experts' end between two GPUs: it answers the rows that one attention GPU sends, layer after layer.

    attention's end (`gpu_dispatch.py`)        ours
    host    tell a StepPlan        ---->       run(plan)    launches the whole step:
    stream  post_send(slot, rows)  ---->       post_wait    list the rows, two grouped products, their sums
            post_wait(slot, sums)  <----       post_send

A step is every MoE layer of the plan, and in each every micro-batch; the number of a micro-batch is the slot
of its messages. No device is asked anything meanwhile, so a plan that comes again is launched as one CUDA
graph. Each attention GPU has an `ExpertStepper` with a carrier and a stream of its own, driven by the thread
of its seat (`expert_seats.py`). A carrier that fails takes its stepper with it: close it, and pair anew under
another epoch.

Shapes: T rows of a micro-batch, D width, k experts a row.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from kernels.fp8_quant import FP8
from kernels.group_tree import blocks_of
from kernels.quantize_rows import GROUP
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts, Quantized
from workers.transport.carrier import Carrier, Parcel, await_step
from workers.transport.config import CarrierKind
from workers.transport.message import MalformedMessage, Message
from workers.transport.protocol import Deadline, DeadlineExceeded
from workers.transport.slots import SlotPlan

Step = Callable[[], None]
"""Puts all work of a step on the current stream."""

STEP = 64  # kind of the message that tells a plan
_DRAIN_POLL_SECONDS = 0.001
_MOST_LAYERS = 256
_MOST_GRAPHS = 512  # each keeps its launches in memory: a bucket of rows takes one, the MTP layer's another
_MOST_QUEUED = 8  # steps launched and not over: a pass of the model, those of its drafts, the next one


class BadPlan(Exception):
    """An attention GPU announced a step that cannot be run here: the two sides differ in model or version.

    Args:
        peer: its name.
        problem: the first thing that is wrong.
    """

    def __init__(self, peer: str, problem: str) -> None:
        super().__init__(peer, problem)
        self.peer, self.problem = peer, problem

    def __str__(self) -> str:
        return f"plan of {self.peer}: {self.problem}"


@dataclass(frozen=True)
class StepPlan:
    """What an attention GPU is about to send; its host says so before it launches the step.

    Attributes:
        rows: of each micro-batch, at least one.
        layers: the MoE layers in order. The MTP layer's pass is a plan of its own.
        captured: the same plan will come again, with the same addresses: keep a CUDA graph of it.
    """

    rows: tuple[int, ...]
    layers: tuple[int, ...]
    captured: bool = False

    def message(self, epoch: int) -> Message:
        """How it travels, for carriers of that epoch."""
        numbers = (torch.tensor(self.rows, dtype=torch.int32), torch.tensor(self.layers, dtype=torch.int32))
        return Message(STEP, numbers, epoch, step=self.captured)

    @classmethod
    def of(cls, message: Message) -> "StepPlan":
        """What was told. Whether it can be run is the stepper's question.

        Raises:
            MalformedMessage: no peer of ours sends this.
        """
        if [(tensor.dtype, tensor.ndim) for tensor in message.tensors] != [(torch.int32, 1)] * 2:
            raise MalformedMessage("a plan that is not two lists of int32")
        rows, layers = (tuple(tensor.tolist()) for tensor in message.tensors)
        return cls(rows, layers, bool(message.step))


def rows_parcel(config: ModelConfig, num_rows: int) -> Parcel:
    """Rows on their way to experts: values [T, D] e4m3 and their scales, group by group, [D / 128, T rounded
    up to 4] float32; experts [T, k] int32, ascending in a row; weights [T, k] float32."""
    width, k = config.hidden_size, config.num_experts_per_tok
    return Parcel(
        (
            ((num_rows, width), FP8),
            ((width // GROUP, -(-num_rows // 4) * 4), torch.float32),
            ((num_rows, k), torch.int32),
            ((num_rows, k), torch.float32),
        )
    )


def sums_parcel(config: ModelConfig, groups: range, num_rows: int) -> Parcel:
    """What comes back: [T, D] bf16 for each block of the tree that the groups make."""
    return Parcel((((num_rows, config.hidden_size), torch.bfloat16),) * len(blocks_of(groups)))


def slots_for(kind: CarrierKind, num_slots: int, incoming: Parcel, outgoing: Parcel) -> SlotPlan:
    """Slots for what a peer sends; of nccl those of both ends are alike."""
    room = max(incoming.num_bytes, outgoing.num_bytes) if kind == "nccl" else incoming.num_bytes
    return SlotPlan(num_slots, room)


def pack_rows(x: Quantized, experts: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
    """The tensors of a `rows_parcel`, without copying."""
    values, scales = x
    width, stored = scales.shape[1], scales.stride(1)  # group by group, with a few rows more than there are
    return values, scales.as_strided((width, stored), (stored, 1)), experts, weights


def unpack_rows(tensors: tuple[Tensor, ...]) -> tuple[Quantized, Tensor, Tensor]:
    """The reverse of `pack_rows`."""
    values, scales, experts, weights = tensors
    return (values, scales.t()[: len(values)]), experts, weights


class Runner(Protocol):
    """Where a stepper's work goes."""

    def launch(self, step: Step) -> torch.cuda.Event:
        """Queue a step's work, or what `capture` made of it; the event of its end."""
        ...

    def capture(self, step: Step) -> Step:
        """Record a step without doing it; it has been launched before."""
        ...


class StreamRunner:
    """A CUDA stream of its own, whose graphs share one pool of memory, as they run one after another.

    Args:
        capturing: held while a graph is captured, by all runners of a process that have threads of their own.
        is_urgent: its kernels go before those of others.
    """

    def __init__(
        self,
        device: torch.device,
        capturing: AbstractContextManager[object] | None = None,
        *,
        is_urgent: bool = False,
    ) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1 if is_urgent else 0)
        self._capturing = capturing or threading.Lock()
        self._keeper = torch.cuda.CUDAGraph()  # a pool ends with the last graph that uses it
        self._record(self._keeper, lambda: torch.zeros(1, device=device))

    def launch(self, step: Step) -> torch.cuda.Event:
        """As `Runner.launch`."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            step()
            end = torch.cuda.Event()
            end.record()
        return end

    def capture(self, step: Step) -> Step:
        """As `Runner.capture`; the stream need not be idle."""
        graph = torch.cuda.CUDAGraph()
        self._record(graph, step, beside=self._keeper)
        return graph.replay

    def _record(
        self,
        graph: torch.cuda.CUDAGraph,
        work: Callable[[], object],
        *,
        beside: torch.cuda.CUDAGraph | None = None,
    ) -> None:
        with self._capturing, torch.cuda.stream(self._stream):
            # Not `torch.cuda.graph`: it would wait for the whole device, where others are at work. Relaxed:
            # what other threads do meanwhile is not ours to forbid.
            pool = beside.pool() if beside else None
            graph.capture_begin(pool=pool, capture_error_mode="relaxed")
            try:
                work()
            finally:
                graph.capture_end()


class ExpertStepper:
    """Answers the steps of one attention GPU. Owns the carrier to it."""

    def __init__(
        self,
        config: ModelConfig,
        experts: FusedExperts,
        carrier: Carrier,
        runner: Runner,
        *,
        max_rows: int,
        num_slots: int,
        step_seconds: float,
    ) -> None:
        """
        Args:
            max_rows, num_slots: most rows of a micro-batch, and most of those; the carrier has room for them.
            step_seconds: how long is waited for a launched step before its carrier is aborted.
        """
        self._config, self._experts, self._carrier, self._runner = config, experts, carrier, runner
        self._max_rows, self._num_slots, self._step_seconds = max_rows, num_slots, step_seconds
        self._graphs: dict[StepPlan, Step] = {}
        self._ends: deque[tuple[torch.cuda.Event, Deadline]] = deque()  # of the steps that are launched

    def run(self, plan: StepPlan) -> None:
        """Launch a step. Its rows may come at any time from now on.

        A plan's first step is launched operation by operation, so that every kernel is loaded before a graph
        is captured of it.

        Raises:
            BadPlan: nothing was launched.
            CarrierFailed: an earlier step did not come to its end; this one is not launched.
        """
        self._check(plan)
        self._wait(_MOST_QUEUED - 1)
        self._carrier.check()
        if graph := self._graphs.get(plan):
            self._launch(graph)
            return
        step = partial(self._answer_all, plan)
        self._launch(step)
        if plan.captured:
            self._graphs[plan] = self._runner.capture(step)

    def tend(self) -> None:
        """Look after launched steps while nothing new comes; waits for nothing.

        Raises:
            CarrierFailed: one did not come to its end in time, or not all messages came.
        """
        while self._ends and self._ends[0][0].query():
            self._ends.popleft()
        if self._ends and self._ends[0][1].is_over:
            self._carrier.abort("a step did not end in time")
        self._carrier.check()

    def finish(self) -> None:
        """Until all launched steps are over.

        Raises:
            CarrierFailed: they are not, or not all messages came.
        """
        self._wait(0)
        self._carrier.check()

    def close(self, reason: str) -> None:
        """End, whatever is under way; the carrier goes too.

        Raises:
            DeadlineExceeded: the stream does not come to rest, and memory that the peer may write is not
                given back.
        """
        self._carrier.abort(reason)
        self._graphs.clear()  # first: a communicator that is in a graph does not let itself be aborted
        deadline = Deadline.after(self._step_seconds)
        while self._ends:
            if self._ends[0][0].query():
                self._ends.popleft()
            elif deadline.is_over:
                raise DeadlineExceeded(f"draining the stream of {self._carrier.peer}")
            else:
                time.sleep(_DRAIN_POLL_SECONDS)
        self._carrier.close()

    def _check(self, plan: StepPlan) -> None:
        if not 0 < len(plan.rows) <= self._num_slots:
            raise BadPlan(self._carrier.peer, f"{len(plan.rows)} micro-batches, 1 to {self._num_slots} fit")
        for num_rows in plan.rows:
            if not 0 < num_rows <= self._max_rows:
                raise BadPlan(self._carrier.peer, f"{num_rows} rows, 1 to {self._max_rows} fit")
        if len(plan.layers) > _MOST_LAYERS:
            raise BadPlan(self._carrier.peer, f"{len(plan.layers)} layers, at most {_MOST_LAYERS} fit")
        for layer in plan.layers:
            if not self._experts.holds(layer):
                raise BadPlan(self._carrier.peer, f"layer {layer} has no experts here")
        if plan.captured and plan not in self._graphs and len(self._graphs) >= _MOST_GRAPHS:
            raise BadPlan(self._carrier.peer, f"{_MOST_GRAPHS} other plans have been captured")

    def _launch(self, step: Step) -> None:
        self._ends.append((self._runner.launch(step), Deadline.after(self._step_seconds)))

    def _wait(self, at_most: int) -> None:
        """Until no more than so many launched steps are not over."""
        while len(self._ends) > at_most:
            event, deadline = self._ends[0]
            await_step(event, (self._carrier,), deadline)
            self._ends.popleft()

    @torch.inference_mode()
    def _answer_all(self, plan: StepPlan) -> None:
        for layer in plan.layers:
            for slot, num_rows in enumerate(plan.rows):
                self._answer(layer, slot, num_rows)

    def _answer(self, layer: int, slot: int, num_rows: int) -> None:
        """Wait for a micro-batch's rows, compute, send."""
        rows = self._carrier.post_wait(slot, rows_parcel(self._config, num_rows))
        x, experts, weights = unpack_rows(rows)
        plan = self._experts.list_rows(experts, weights)
        self._carrier.post_send(slot, self._experts.block_sums(layer, x, plan))

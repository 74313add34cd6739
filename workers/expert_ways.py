"""The attention's side of rows that go from GPU to GPU: ways to all experts of a placement.

`PairedExperts` pairs with every expert actor (`expert_seats.py`), tells them of each pass before it is
launched, and pairs anew, under the next placement, when one of them is gone. A pass under way then is thrown
away: its requests fail, and are run again by whoever asked.

    prepare     carriers to all experts of the newest placement, or WorkerLost in bounded time
    announce    a pass is launched within it: recorded, replayed, or operation by operation
    check       all answers have come, or WorkerLost
"""

import logging
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.list_rows import RoutedRows
from model.config import ModelConfig
from model.fused.feed_forward import Quantized
from model.moe import DispatchPlan, PendingSum
from workers.dispatch import DispatchStats, PlacementSource, WorkerLost
from workers.engine import EngineConfig
from workers.gpu_dispatch import CarrierExperts, ExpertPeer
from workers.gpu_experts import StepPlan, rows_parcel, slots_for, sums_parcel
from workers.local import ModelOptions, open_checkpoint
from workers.placement import ExpertPlacement, ExpertShare
from workers.transport.carrier import Carrier, CarrierFailed
from workers.transport.config import WayConfig
from workers.transport.message import TransportError
from workers.transport.protocol import Deadline, DeadlineExceeded, PeerLost
from workers.transport.slots import SlotPlan
from workers.ways import Way
from workers.wire import Join, Kind, Refused, WayAddress, pack, unpack

_log = logging.getLogger(__name__)

_LISTEN_SECONDS = 0.1
_TELL_SECONDS = 2.0  # for an expert that does not read; plans are small and read at once
_POLL_SECONDS = 0.002
_RETRY_SECONDS = 0.5  # after a pairing that failed
_STEP_LAYERS = 4  # of the time that a layer has, for all of a pass


class RowsWay(Way):
    """A way to one expert actor's seat. The engine's thread tells it plans; its own one listens."""

    what = "way for rows"

    def __init__(
        self,
        config: WayConfig,
        number: int,
        model_config: ModelConfig,
        share: ExpertShare,
        join: Join,
        device: torch.device,
        wait_seconds: float,
        is_overdue: Callable[[], bool],
    ) -> None:
        """`is_overdue` is asked again and again: whether a pass does not end."""
        super().__init__(config, number, device, wait_seconds)
        self.share, self._join, self._model_config = share, join, model_config
        self._is_overdue = is_overdue
        self._talking = threading.Lock()  # an endpoint is one thread's at a time
        self.start()

    @property
    def peer(self) -> ExpertPeer:
        """As `CarrierExperts` knows it; it is open."""
        assert self._carrier
        return ExpertPeer(self._carrier, self.share.groups, self.tell)

    @property
    def failure(self) -> str | None:
        """Why it is of no use any more."""
        try:
            self.check()
        except CarrierFailed as error:
            return error.reason
        return None

    def tell(self, plan: StepPlan) -> None:
        """Announce a step.

        Raises:
            CarrierFailed: the peer will not hear of it.
        """
        self.check()
        carrier = self._carrier
        assert carrier
        try:
            with self._talking:
                self._endpoint.send(carrier.peer, plan.message(carrier.epoch), Deadline.after(_TELL_SECONDS))
        except TransportError as error:
            self.abort(str(error))
            raise CarrierFailed(carrier.peer, str(error)) from error

    def _find(self, deadline: Deadline) -> tuple[str, int, SlotPlan]:
        expert = self.share.address
        self._endpoint.connect(expert, deadline)
        self._endpoint.send(expert.name, pack(Kind.JOIN, self._join), deadline)
        answer = self._endpoint.receive(deadline, expert.name)
        if isinstance(answer, PeerLost):
            raise CarrierFailed(expert.name, answer.reason)
        self._endpoint.disconnect(expert.name)
        if answer.message.kind == Kind.REFUSED:
            raise CarrierFailed(expert.name, unpack(Refused, answer.message).reason)
        seat = unpack(WayAddress, answer.message)
        peer = self._endpoint.connect(seat.address, deadline)
        config, rows = self._model_config, self._join.max_rows
        incoming, outgoing = sums_parcel(config, self.share.groups, rows), rows_parcel(config, rows)
        return peer.name, seat.epoch, slots_for(self._kind, self._join.num_slots, incoming, outgoing)

    def _watch(self, carrier: Carrier) -> None:
        """As `keep_watch`, beside the thread that tells plans, and of passes too."""
        poller = select.poll()
        poller.register(self._endpoint.fileno(), select.POLLIN)
        while not self._failed.is_set():
            if self._is_overdue():
                self.abort("a pass did not end in time")
            with self._talking:
                self._hear(carrier.peer)
            poller.poll(_LISTEN_SECONDS * 1000)

    def _part_from_peer(self) -> None:
        with self._talking:
            super()._part_from_peer()

    def _hear(self, peer: str) -> None:
        """What has come: an expert says nothing, but that it is gone."""
        try:
            while not self._failed.is_set():
                event = self._endpoint.receive(Deadline.after(0))
                if isinstance(event, PeerLost) and event.peer == peer:
                    self.abort(str(event))
        except DeadlineExceeded:
            return


@dataclass(frozen=True)
class _Pass:
    """The newest pass: when it is over on the device, and when it should be."""

    end: torch.cuda.Event
    deadline: Deadline


class PairedExperts:
    """The routed experts of a fused model, on the GPUs that a placement names.

    It is the model's `QuantizedExperts` and its `ExpertSteps`. All calls belong to the engine's thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: PlacementSource,
        ways: WayConfig,
        *,
        max_rows: int,
        num_slots: int,
        device: torch.device,
        backend: Backend,
        layer_seconds: float,
        is_urgent: bool = True,
    ) -> None:
        """
        Args:
            max_rows, num_slots: of the largest micro-batch, and how many of them are at the experts at once.
            layer_seconds: what a layer may take, and how long a step waits for experts that are away.
            is_urgent: whether users wait for each token, so that experts serve us first.
        """
        self._config, self._source, self._way_config = config, source, ways
        self._max_rows, self._num_slots, self._device = max_rows, num_slots, device
        self._backend, self._layer_seconds, self._is_urgent = backend, layer_seconds, is_urgent
        with_experts = [layer for layer in range(config.num_cached_layers) if not config.is_dense(layer)]
        self._layers = tuple(layer for layer in with_experts if layer < config.num_hidden_layers)
        self._draft_layers = tuple(layer for layer in with_experts if layer >= config.num_hidden_layers)
        self._ways: list[RowsWay] = []
        self._number = 0
        self._placement: ExpertPlacement | None = None  # that the ways are of
        self._experts: CarrierExperts | None = None  # over the ways, once all are open
        self._last: _Pass | None = None
        self._forget: list[Callable[[], None]] = []
        self.stats = DispatchStats()

    # As `QuantizedExperts`

    @property
    def listed(self) -> range:
        """As `QuantizedExperts.listed`: the experts' side lists its rows itself."""
        return range(self._config.n_routed_experts)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """As `Experts.submit`."""
        return self._paired().submit(layer, x, plan)

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        """As `QuantizedExperts.submit_quantized`."""
        return self._paired().submit_quantized(layer, x, plan, shared)

    # As `ExpertSteps`

    def on_parting(self, forget: Callable[[], None]) -> None:
        """As `ExpertSteps.on_parting`."""
        self._forget.append(forget)

    @property
    def is_current(self) -> bool:
        """As `ExpertSteps.is_current`."""
        return self._experts is not None and not self._problem()

    def meet(self, deadline: Deadline) -> None:
        """Pair with all experts, before rows wait for it.

        Raises:
            WorkerLost: one of them cannot be had in time; the first step tries again.
        """
        while not self.is_current:
            if not self._ways:
                self._begin_to_pair()
            elif problem := self._problem():
                if self._experts is None:  # nor would it be better at once
                    time.sleep(min(_RETRY_SECONDS, deadline.left()))
                self._part(problem[1])
                if deadline.is_over:
                    raise WorkerLost(*problem)
            elif (lacking := next((way for way in self._ways if not way.is_open), None)) is None:
                self._experts = CarrierExperts(
                    self._config,
                    [way.peer for way in self._ways],
                    num_slots=self._num_slots,
                    backend=self._backend,
                )
            elif deadline.is_over:
                raise WorkerLost(lacking.share.peer, "it is not paired yet")
            else:
                time.sleep(_POLL_SECONDS)

    def prepare(self) -> None:
        """As `ExpertSteps.prepare`; what it cannot wait for goes on by itself.

        Raises:
            WorkerLost: experts are away.
        """
        if not self.is_current:
            self.meet(Deadline.after(self._layer_seconds))

    @contextmanager
    def announce(self, rows: tuple[int, ...], *, is_draft: bool, captured: bool) -> Iterator[None]:
        """As `ExpertSteps.announce`.

        Raises:
            WorkerLost: an expert is gone.
        """
        layers = self._draft_layers if is_draft else self._layers
        try:
            if layers:
                self._paired().announce(StepPlan(rows, layers, captured))
            yield
        except CarrierFailed as error:
            problem = self._problem(of_placement=False) or (error.peer, error.reason)
            self._abort(str(error))
            raise WorkerLost(*problem) from error
        except BaseException as error:
            self._abort(f"a pass was given up: {type(error).__name__}")
            raise
        self._count(sum(rows), len(layers))
        if self._device.type == "cuda":
            end = torch.cuda.Event()
            end.record()
            self._last = _Pass(end, Deadline.after(_STEP_LAYERS * self._layer_seconds))

    def check(self, landed: Callable[[], None]) -> None:
        """As `ExpertSteps.check`.

        Raises:
            WorkerLost: an expert did not answer.
        """
        landed()
        if problem := self._problem(of_placement=False):
            self._abort(problem[1])
            raise WorkerLost(*problem)

    def close(self) -> None:
        """Part from all experts. What was recorded is gone."""
        self._part("the attention ends")

    def _paired(self) -> CarrierExperts:
        if self._experts is None:
            raise CarrierFailed("the experts", "they are not paired")
        return self._experts

    def _problem(self, *, of_placement: bool = True) -> tuple[str, str] | None:
        """Whom the ways do not lead to any more, and why; None while they are good or opening."""
        newest = self._source.current()
        # A step under way goes on under the placement it began with, as long as its experts live.
        if of_placement and self._placement and self._placement.epoch != newest.epoch:
            return "the experts", f"there is a placement of epoch {newest.epoch}"
        return next(((way.share.peer, way.failure) for way in self._ways if way.failure), None)

    def _begin_to_pair(self) -> None:
        """With all at once, as a step that one of them has lost is lost for all."""
        placement = self._placement = self._source.current()
        join = Join(self._num_slots, self._max_rows, placement.epoch, self._is_urgent)
        for share in placement.shares:
            self._number += 1
            self._ways.append(
                RowsWay(
                    self._way_config,
                    self._number,
                    self._config,
                    share,
                    join,
                    self._device,
                    self._layer_seconds,
                    self._is_overdue,
                )
            )

    def _part(self, reason: str) -> None:
        """Leave all experts. Memory goes back when nothing holds its addresses and the stream is idle."""
        self._abort(reason)
        if self._experts and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()  # all waits have ended
        for forget in self._forget:
            forget()
        for way in self._ways:
            way.close(reason)
        self._ways, self._experts, self._last = [], None, None

    def _abort(self, reason: str) -> None:
        for way in self._ways:
            way.abort(reason)

    def _is_overdue(self) -> bool:
        last = self._last
        return last is not None and last.deadline.is_over and not last.end.query()

    def _count(self, num_rows: int, num_layers: int) -> None:
        """Every expert actor gets every row."""
        self.stats.layers += num_layers
        self.stats.tokens += num_rows * num_layers
        self.stats.copies_to.update({way.share.peer: num_rows * num_layers for way in self._ways})


def paired_experts(
    directory: Path,
    options: ModelOptions,
    engine: EngineConfig,
    source: PlacementSource,
    ways: WayConfig,
    layer_seconds: float,
    *,
    is_urgent: bool = True,
) -> PairedExperts:
    """For the model of a directory, and passes of an engine."""
    config = open_checkpoint(directory, options).config
    return PairedExperts(
        config,
        source,
        ways,
        max_rows=engine.most_rows(config),
        num_slots=engine.micro_batches,
        device=torch.device(options.device, 0),
        backend=options.kernels,
        layer_seconds=layer_seconds,
        is_urgent=is_urgent,
    )

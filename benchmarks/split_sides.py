"""The two GPUs of `benchmarks/split.py`: each runs the same list of measurements, one of them as attention.

Side 0 is the attention GPU of a split, side 1 has all experts; colocated, each has half of the sequences and
half of the experts. What both must know they know from the case; a barrier stands before every measurement.

Shapes: T rows of a micro-batch, D width, k experts a row.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from benchmarks.colocated import ColocatedExperts, Member
from benchmarks.split_layers import LAYER, Layers, Nowhere, Part, Settings
from benchmarks.split_report import Case, Row
from kernels.dispatch_plan import dispatch_plan
from kernels.quantize_rows import quantize_rows
from model.config import ModelConfig
from model.fused.feed_forward import Quantized
from workers.gpu_dispatch import CarrierExperts, ExpertPeer
from workers.gpu_experts import ExpertStepper, Runner, Step, StepPlan, pack_rows, rows_parcel, sums_parcel
from workers.transport.carrier import Carrier
from workers.transport.message import Message

MOST_MICRO_BATCHES = 3
STEP_SECONDS = 30.0  # a first step compiles its kernels
_BARRIER, _FIGURES = 100, 101  # kinds of message


class Wire(Protocol):
    """What the two hosts say to each other."""

    def tell(self, message: Message) -> None: ...

    def hear(self) -> Message: ...


class TimedRunner(Runner, Protocol):
    """A `Runner` that also times."""

    def finish(self) -> None:
        """Until all is over."""
        ...

    def stamp(self) -> Callable[[], float]:
        """A point after what was launched; called when all is over, microseconds since the first."""
        ...


class Side:
    """One GPU."""

    def __init__(
        self,
        rank: int,
        config: ModelConfig,
        settings: Settings,
        wire: Wire,
        carriers: Mapping[str, Carrier],
        runner: TimedRunner,
    ) -> None:
        self._rank, self._config, self._settings = rank, config, settings
        self._wire, self._carriers, self._runner = wire, carriers, runner
        self.layers = Layers(config, settings)
        half = config.n_group // 2
        halves = (range(half), range(half, config.n_group))
        everything = range(config.n_group)
        self._all = self.layers.experts(everything) if rank == 1 else None
        other = [Member(next(iter(carriers.values())), halves[1 - rank])]
        own = self.layers.experts(halves[rank])
        self._colocated = ColocatedExperts(
            config, own, other, num_slots=MOST_MICRO_BATCHES, backend=settings.backend
        )
        if rank == 0:
            self._split = {
                kind: CarrierExperts(
                    config,
                    [ExpertPeer(carrier, everything, self._tell(carrier))],
                    num_slots=MOST_MICRO_BATCHES,
                    backend=settings.backend,
                )
                for kind, carrier in carriers.items()
            }

    def _tell(self, carrier: Carrier) -> Callable[[StepPlan], None]:
        return lambda plan: self._wire.tell(plan.message(carrier.epoch))

    def rows(
        self, case: Case, kinds: Sequence[str], micro_batches: Sequence[int], colocated: Sequence[int]
    ) -> Iterator[Row]:
        """All measurements of a case; side 1 yields nothing."""
        for m in colocated:
            us = self._colocated_step(case, m)
            if self._rank == 0:
                yield Row(case, "colocated", m, us)
        alone = {m: self._alone(case, m) for m in micro_batches}
        for kind in kinds:
            for m in micro_batches:
                trip = self._round_trip(kind, -(-case.batch // m))
                us = self._split_step(kind, case, m)
                if self._rank == 0:
                    yield Row(case, kind, m, us, *alone[m], trip)

    def barrier(self, go: bool = True) -> bool:
        """Both are here; whether side 0 wants to go on."""
        if self._rank == 0:
            self._wire.tell(Message(_BARRIER, step=go))
            self._wire.hear()
            return go
        message = self._wire.hear()
        self._wire.tell(message)
        return bool(message.step)

    def _alone(self, case: Case, m: int) -> tuple[float, float]:
        """Microseconds a layer of the attention's work, and of the experts', each on its own GPU."""
        self.barrier()
        if self._rank == 0:
            self.layers.switch.inner = Nowhere(self.layers.switch.listed)
            parts = self.layers.parts(range(case.batch), case.context, m)
            attention = self._timed(partial(self.layers.run, parts))
            return attention, float(self._wire.hear().tensors[0])
        rows = [-(-case.batch // m)] * m
        experts = self._timed(partial(self._answer_nobody, [self._arrived(count) for count in rows]))
        self._wire.tell(Message(_FIGURES, (torch.tensor(experts),)))
        return 0.0, experts

    def _arrived(self, num_rows: int) -> tuple[Quantized, Tensor, Tensor]:
        """Rows with experts as an even gate chooses them."""
        config, device, backend = self._config, self._settings.device, self._settings.backend
        x = torch.randn(num_rows, config.hidden_size, device=device).to(torch.bfloat16)
        plan = dispatch_plan(
            torch.randn(num_rows, config.n_routed_experts, device=device),
            torch.zeros(config.n_routed_experts, device=device),
            num_groups=config.n_group,
            topk_group=config.topk_group,
            k=config.num_experts_per_tok,
            normalize=True,
            scale=config.routed_scaling_factor,
            first_expert=0,
            num_experts=config.n_routed_experts,
            backend=backend,
        )
        return quantize_rows(x, backend=backend), plan.experts, plan.weights

    @torch.inference_mode()
    def _answer_nobody(self, arrived: Sequence[tuple[Quantized, Tensor, Tensor]]) -> None:
        assert self._all
        for _ in range(self._settings.depth):
            for x, experts, weights in arrived:
                self._all.block_sums(LAYER, x, self._all.list_rows(experts, weights))

    def _round_trip(self, kind: str, num_rows: int) -> float:
        """Microseconds of rows there and sums back, with nothing between; on side 0."""
        self.barrier()
        config, carrier = self._config, self._carriers[kind]
        rows = rows_parcel(config, num_rows)
        sums = sums_parcel(config, range(config.n_group), num_rows)
        there = pack_rows(*self._arrived(num_rows))
        back = [torch.zeros(s, dtype=d, device=self._settings.device) for s, d in sums.tensors]

        def run() -> None:
            for _ in range(self._settings.depth):
                if self._rank == 0:
                    carrier.post_send(0, there)
                    carrier.post_wait(0, sums)
                else:
                    carrier.post_wait(0, rows)
                    carrier.post_send(0, back)

        us = self._timed(run)
        carrier.check()
        return us

    def _split_step(self, kind: str, case: Case, m: int) -> float:
        """Microseconds a layer with attention on side 0 and experts on side 1."""
        self.barrier()
        if self._rank == 1:
            stepper = self._stepper(kind)
            for _ in range(2 + self._settings.replays):
                stepper.run(StepPlan.of(self._wire.hear()))
            stepper.finish()
            return 0.0
        experts = self.layers.switch.inner = self._split[kind]
        parts = self.layers.parts(range(case.batch), case.context, m)
        plan = StepPlan(
            tuple(part.inputs.num_rows for part in parts), (LAYER,) * self._settings.depth, captured=True
        )
        us = self._timed(partial(self.layers.run, parts), before=partial(experts.announce, plan))
        experts.check()
        return us

    def _stepper(self, kind: str) -> ExpertStepper:
        assert self._all
        return ExpertStepper(
            self._config,
            self._all,
            self._carriers[kind],
            self._runner,
            max_rows=self._settings.max_rows,
            num_slots=MOST_MICRO_BATCHES,
            step_seconds=STEP_SECONDS,
        )

    def _colocated_step(self, case: Case, m: int) -> float:
        """Microseconds a layer with half of the sequences and of the experts on either side."""
        self.barrier()
        self.layers.switch.inner = self._colocated
        parts = self.layers.parts(self._own_half(case), case.context, m)
        return self._timed(partial(self.layers.run, parts))

    def _own_half(self, case: Case) -> range:
        half = case.batch // 2
        return range(half) if self._rank == 0 else range(half, 2 * half)

    def _timed(self, step: Step, before: Callable[[], None] = lambda: None) -> float:
        """Microseconds a layer: a step once as it is, once as a graph, and then `replays` times."""
        before()
        self._runner.launch(step)
        self._runner.finish()
        graph = self._runner.capture(step)
        before()
        self._runner.launch(graph)
        start = self._runner.stamp()
        for _ in range(self._settings.replays):
            before()
            self._runner.launch(graph)
        stop = self._runner.stamp()
        self._runner.finish()
        return (stop() - start()) / (self._settings.replays * self._settings.depth)

    def outputs(
        self, case: Case, kinds: Sequence[str], m: int, depth: int, *, colocated: bool
    ) -> dict[str, Tensor]:
        """On side 0: what the last layer adds to its half of the sequences, each way."""
        found: dict[str, Tensor] = {}
        for kind in kinds:
            self.barrier()
            self._split_outputs(case, kind, m, depth, found)
        self.barrier()
        own = self.layers.parts(self._own_half(case), case.context, m)
        if colocated:
            self.layers.switch.inner = self._colocated
            found["colocated"], found["colocated as a graph"] = self._twice(own, depth)
        if self._rank == 1:
            return {}
        self.layers.switch.inner = self._all = self._all or self.layers.experts(range(self._config.n_group))
        found["one process"], _ = self._twice(own, depth)
        return found

    def _split_outputs(self, case: Case, kind: str, m: int, depth: int, found: dict[str, Tensor]) -> None:
        if self._rank == 1:
            stepper = self._stepper(kind)
            for _ in range(2):
                stepper.run(StepPlan.of(self._wire.hear()))
            stepper.finish()
            return
        self.layers.switch.inner = experts = self._split[kind]
        parts = self.layers.parts(range(case.batch // 2), case.context, m)
        plan = StepPlan(tuple(part.inputs.num_rows for part in parts), (LAYER,) * depth, captured=True)
        both = self._twice(parts, depth, before=partial(experts.announce, plan))
        experts.check()
        found[kind], found[f"{kind} as a graph"] = both

    def _twice(
        self, parts: Sequence[Part], depth: int, before: Callable[[], None] = lambda: None
    ) -> tuple[Tensor, Tensor]:
        """A step as it is, and as a graph."""
        out: list[Tensor] = []

        def step() -> None:
            out.append(self.layers.run(parts, depth))

        before()
        self._runner.launch(step)
        self._runner.finish()
        eager = out[-1].clone()
        graph = self._runner.capture(step)
        before()
        self._runner.launch(graph)
        self._runner.finish()
        return eager, out[-1].clone()

"""Watches a model from the outside while an engine runs it; the model and the engine do not know.

`Recorder` stands at three seams that exist anyway: the decoder's passes (with a `Trace`), whoever computes
the routed experts, and the objects of the layers, for the time each takes. What recording costs is taken out
of the times. They are wall times of the host: with a device that runs behind it, times of submission.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor

from kernels.gate_topk import gate_topk
from model.checkpoint import Checkpoint, Weights, routed_experts
from model.config import ModelConfig
from model.decoder import DTYPES, Decoder, Layer, MicroBatch, Trace
from model.inputs import ForwardInputs
from model.layout import TensorSpec
from model.moe import DispatchPlan, Experts, LocalExperts, PendingSum
from model.pages import PageCache
from workers.local import LocalModel, ModelOptions


class Clock:
    """Seconds, less those that recording took."""

    def __init__(self) -> None:
        self._taken_out = 0.0

    def now(self) -> float:
        return time.perf_counter() - self._taken_out

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Recording happens in here."""
        started = time.perf_counter()
        yield
        self._taken_out += time.perf_counter() - started


@dataclass(frozen=True)
class Routed:
    """One MoE layer's rows: experts and weights, and the experts without the limit on groups; [T, k] each."""

    experts: Tensor
    weights: Tensor
    unrestricted: Tensor


@dataclass
class Pass:
    """One run of the decoder (`forward`, `draft`) or of its head, between two times of the clock.

    `selected` [T, index_topk] and `routed` have an entry for each layer that ran, `layers` and `attention`
    the seconds of each decoder layer and of its attention.
    """

    kind: Literal["forward", "draft", "head"]
    begin: float
    end: float = 0.0
    start: int = 0
    token_ids: list[int] = field(default_factory=list)
    selected: list[Tensor] = field(default_factory=list)
    routed: list[Routed] = field(default_factory=list)
    layers: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)


class Gates:
    """The gates a second time, to ask what they would choose without the limit on groups."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        self._gates: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in range(config.num_cached_layers):
            if not config.is_dense(layer):
                prefix = f"model.layers.{layer}.mlp.gate"
                bias = weights.take(f"{prefix}.e_score_correction_bias")
                self._gates[layer] = weights.take(f"{prefix}.weight"), bias

    def experts(self, layer: int, x: Tensor, *, num_groups: int = 1, topk_group: int = 1) -> Tensor:
        """[T, k] experts of [T, D]; by default all of them are one group, which is no limit."""
        weight, bias = self._gates[layer]
        experts, _ = gate_topk(
            F.linear(x.float(), weight),
            bias,
            num_groups=num_groups,
            topk_group=topk_group,
            k=self._config.num_experts_per_tok,
            normalize=self._config.norm_topk_prob,
            scale=self._config.routed_scaling_factor,
            backend="reference",
        )
        return experts


class Recorder:
    """Writes down the passes of one engine's steps; `take` hands them over after each."""

    def __init__(self, gates: Gates) -> None:
        self.clock = Clock()
        self._gates = gates
        self._passes: list[Pass] = []

    def take(self) -> list[Pass]:
        """What ran since the last call, in order."""
        passes, self._passes = self._passes, []
        return passes

    @contextmanager
    def run(self, kind: Literal["forward", "draft", "head"]) -> Iterator[Pass]:
        """One pass is running."""
        self._passes.append(Pass(kind, self.clock.now()))
        yield self._passes[-1]
        self._passes[-1].end = self.clock.now()

    @contextmanager
    def timed(self, part: Literal["layers", "attention"]) -> Iterator[None]:
        """A layer of the running pass, or its attention, is running."""
        started = self.clock.now()
        yield
        getattr(self._passes[-1], part).append(self.clock.now() - started)

    def route(self, layer: int, x: Tensor, plan: DispatchPlan) -> None:
        """A layer of the running pass sends its rows [T, D] to experts."""
        with self.clock.stopped():
            routed = Routed(plan.experts, plan.weights, self._gates.experts(layer, x))
            self._passes[-1].routed.append(routed)


class WatchedExperts:
    """As `Experts`; the recorder sees each plan."""

    def __init__(self, experts: Experts, recorder: Recorder) -> None:
        self._experts, self._recorder = experts, recorder

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        self._recorder.route(layer, x, plan)
        return self._experts.submit(layer, x, plan)


class _Timed:
    """Anything with a `forward`, timed as a part of the running pass."""

    def __init__(self, inner: Any, part: Literal["layers", "attention"], recorder: Recorder) -> None:
        self._inner, self._part, self._recorder = inner, part, recorder

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with self._recorder.timed(self._part):
            return self._inner.forward(*args, **kwargs)


def _timed_layer(layer: Layer, recorder: Recorder) -> Layer:
    timed: Any = copy(layer)
    timed.attention = _Timed(timed.attention, "attention", recorder)
    return cast(Layer, _Timed(timed, "layers", recorder))


class WatchedDecoder(Decoder):
    """The same decoder, tensors and all; the recorder sees each pass."""

    def __init__(self, decoder: Decoder, recorder: Recorder) -> None:
        vars(self).update(vars(decoder))  # nothing is built a second time
        self._recorder = recorder
        self.layers = [_timed_layer(layer, recorder) for layer in decoder.layers]

    def forward_in_turn(self, batches: Sequence[MicroBatch], cache: PageCache) -> list[Tensor]:
        assert len(batches) == 1, "one request is traced at a time"
        trace = batches[0].trace or Trace()
        with self._recorder.run("forward") as run:
            hidden = super().forward_in_turn([replace(batches[0], trace=trace)], cache)
        self._note(run, batches[0].inputs, trace)
        return hidden

    def draft(
        self, inputs: ForwardInputs, hidden: Tensor, cache: PageCache, trace: Trace | None = None
    ) -> Tensor:
        trace = trace or Trace()
        with self._recorder.run("draft") as run:
            hidden = super().draft(inputs, hidden, cache, trace)
        self._note(run, inputs, trace)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        with self._recorder.run("head"):
            return super().logits(hidden)

    def _note(self, run: Pass, inputs: ForwardInputs, trace: Trace) -> None:
        with self._recorder.clock.stopped():
            assert len(inputs.segments) == 1, "one request is traced at a time"
            run.start = int(inputs.positions[0])
            run.token_ids = inputs.token_ids.tolist()
            run.selected = trace.selected


@dataclass(frozen=True)
class WatchedModel:
    """A model in this process, and who watches it."""

    local: LocalModel
    recorder: Recorder

    @classmethod
    def load(cls, directory: Path, options: ModelOptions, *, progress: bool = False) -> "WatchedModel":
        """Open, check and load, with every routed expert here.

        Raises:
            CheckpointError: before anything could run on a bad checkpoint.
        """
        checkpoint = Checkpoint.open(directory)
        config = checkpoint.config
        is_routed = routed_experts(range(config.n_routed_experts))

        def wanted(spec: TensorSpec) -> bool:
            return spec.part == "gate" or is_routed(spec)

        weights = checkpoint.load(wanted, dtype=DTYPES[options.dtype], progress=progress)
        recorder = Recorder(Gates(config, weights))
        experts = LocalExperts(config, weights, range(config.n_group), options.kernels)
        local = LocalModel(directory, options, experts=WatchedExperts(experts, recorder), progress=progress)
        return cls(local, recorder)

    def decoder(self) -> Decoder:
        """The model's decoder, watched."""
        return WatchedDecoder(self.local.decoder, self.recorder)

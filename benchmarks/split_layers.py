"""The layer of `benchmarks/split.py`: full width, random weights, run again and again as a step of a model.

It is run over its own output, always with the same residual stream, so that rows stay as different as they
began. Shapes: T rows of a micro-batch, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.layer import fill_pages
from kernels.backend import Backend
from kernels.list_rows import RoutedRows
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts, Quantized, QuantizedExperts
from model.fused.layer import FusedLayer
from model.inputs import PAGE_SIZE, ForwardInputs, Segment
from model.moe import DispatchPlan, Done, PendingSum
from model.pages import PageCache
from model.random_weights import random_weights
from model.rope import rope_angles, rope_frequencies

LAYER = 3  # the first with experts


@dataclass(frozen=True)
class Settings:
    """How it is run: layers a step, steps timed, and on what."""

    depth: int
    replays: int
    max_rows: int
    num_pages: int
    device: torch.device
    backend: Backend


@dataclass(frozen=True)
class Part:
    """A micro-batch."""

    inputs: ForwardInputs
    residual: Tensor
    angles: tuple[Tensor, Tensor]


class Switch:
    """The experts of the layer: one after another of those that are compared."""

    def __init__(self, config: ModelConfig) -> None:
        self.listed = range(config.n_routed_experts)
        self.inner: QuantizedExperts = Nowhere(self.listed)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        raise NotImplementedError("a fused layer sends what is quantised")

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        return self.inner.submit_quantized(layer, x, plan, shared)


@dataclass(frozen=True)
class Nowhere:
    """No routed experts at all: what attention takes by itself, gate and shared expert included."""

    listed: range

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        return Done(shared())


class Layers:
    """One layer with random weights, run again and again."""

    def __init__(self, config: ModelConfig, settings: Settings) -> None:
        self.config, self._settings = config, settings
        device, backend = settings.device, settings.backend
        self.switch = Switch(config)
        weights = random_weights(config, lambda spec: spec.layer == LAYER and spec.expert < 0, device=device)
        self._layer = FusedLayer(config, weights, LAYER, self.switch, "sparse", backend)
        self._frequencies = rope_frequencies(config).to(device)
        one = config.model_copy(update={"num_hidden_layers": 1, "num_nextn_predict_layers": 0})
        cache = PageCache(one, settings.num_pages, "fp8", torch.bfloat16, backend=backend, device=device)
        self._pages = cache.layers[0]
        fill_pages(self._pages, config)

    def experts(self, groups: range) -> FusedExperts:
        """The same values whoever draws them."""
        config, size = self.config, self.config.group_size
        held = range(groups.start * size, groups.stop * size)
        weights = random_weights(
            config, lambda spec: spec.layer == LAYER and spec.expert in held, device=self._settings.device
        )
        return FusedExperts(config, weights, groups, self._settings.backend, [LAYER])

    def parts(self, batch: range, context: int, micro_batches: int) -> list[Part]:
        """Sequences of a numbered batch that decode, in micro-batches as equal as can be."""
        wide, device = -(-context // PAGE_SIZE), self._settings.device
        num_pages = self._settings.num_pages
        generator = torch.Generator(device).manual_seed(wide)
        order = torch.randperm(num_pages, generator=generator, device=device)
        order = order.repeat(-(-batch.stop * wide // num_pages))[: batch.stop * wide].view(-1, wide)
        width = self.config.hidden_size
        residual = torch.randn(batch.stop, width, generator=generator, device=device).to(torch.bfloat16)
        found = []
        for rows in torch.arange(batch.start, batch.stop).tensor_split(micro_batches):
            here = slice(int(rows[0]), int(rows[-1]) + 1)
            positions = torch.full((len(rows),), context - 1, device=device)
            inputs = ForwardInputs(
                token_ids=positions,
                positions=positions,
                slots=order[here, -1] * PAGE_SIZE + (context - 1) % PAGE_SIZE,
                page_table=order[here],
                segments=tuple(Segment(row, row + 1, context) for row in range(len(rows))),
            )
            angles = rope_angles(self._frequencies, positions)
            found.append(Part(inputs, residual[here].contiguous(), angles))
        return found

    @torch.inference_mode()
    def run(self, parts: Sequence[Part], depth: int | None = None) -> Tensor:
        """A step: each micro-batch's attention while the others are at the experts. [all T, D], the last
        layer's update."""
        updates: list[PendingSum] = [Done(part.residual) for part in parts]
        for _ in range(depth or self._settings.depth):
            for i, part in enumerate(parts):
                updates[i], _ = self._layer.forward(
                    updates[i], part.residual, part.inputs, part.angles, self._pages, None
                )
        return torch.cat([update.result() for update in updates])

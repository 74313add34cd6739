"""The model: embedding, decoder layers, head, and the multi-token-prediction module.

Reads from top to bottom like the paper. `forward` returns hidden states after the final norm; `logits` and
the MTP module both start from them.

A layer's update of the residual stream is taken by whoever adds it, the next layer's norm. So its rows may
be at the experts while another micro-batch goes through the attention of the same layer
(`Decoder.forward_in_turn`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.linear import linear, linear_fp32, stable
from kernels.norm import add_rms_norm, rms_norm
from model.attention import Attention, AttentionMode
from model.checkpoint import Weights
from model.config import ModelConfig
from model.inputs import ForwardInputs
from model.moe import Done, Experts, FeedForward, MoE, PendingSum
from model.pages import LayerPages, PageCache
from model.rope import rope_angles, rope_frequencies

DTypeName = Literal["float32", "bfloat16"]
DTYPES: dict[DTypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Trace:
    """What a forward pass chose, layer by layer, for those who want to look inside.

    `selected`: [T, index_topk] int32 positions, -1 padded; `routed`: [T, k] int64 experts of the MoE layers.
    """

    selected: list[Tensor] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)


class DecoderLayer:
    """h += attention(norm(h)); h += feed_forward(norm(h))."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        experts: Experts,
        mode: AttentionMode,
        backend: Backend,
    ) -> None:
        prefix = f"model.layers.{layer}"
        self._eps, self._backend = config.rms_norm_eps, backend
        self._input_norm = weights.take(f"{prefix}.input_layernorm.weight")
        self._post_norm = weights.take(f"{prefix}.post_attention_layernorm.weight")
        self.attention = Attention(config, weights, f"{prefix}.self_attn", mode, backend)
        self._dense = FeedForward(weights, f"{prefix}.mlp", backend) if config.is_dense(layer) else None
        self._moe = None if self._dense else MoE(config, weights, layer, experts, backend)

    def forward(
        self,
        update: PendingSum | None,
        residual: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        trace: Trace | None,
    ) -> tuple[PendingSum, Tensor]:
        """One layer, up to where its rows are at the experts.

        Args:
            update: [T, D], what the previous layer adds to the residual stream and has not added yet.
            residual: [T, D].

        Returns:
            This layer's last update and the residual stream before it: the sum is the next norm's to make.
        """
        if update is None:
            x = rms_norm(residual, self._input_norm, self._eps, backend=self._backend)
        else:
            x, residual = add_rms_norm(
                update.result(), residual, self._input_norm, self._eps, backend=self._backend
            )
        attended = self.attention.forward(x, inputs, angles, pages, trace.selected if trace else None)
        x, residual = add_rms_norm(attended, residual, self._post_norm, self._eps, backend=self._backend)
        if self._dense:
            return Done(self._dense.forward(x)), residual
        assert self._moe
        return self._moe.submit(x, trace.routed if trace else None), residual


class Layer(Protocol):
    """What a decoder's layers are: `DecoderLayer`, or `model.fused.layer.FusedLayer`."""

    def forward(
        self,
        update: PendingSum | None,
        residual: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        trace: Trace | None,
    ) -> tuple[PendingSum, Tensor]:
        """As `DecoderLayer.forward`."""
        ...


LayerClass = Callable[[ModelConfig, Weights, int, Experts, AttentionMode, Backend], Layer]


class MTP:
    """The multi-token-prediction module: drafts the token after the next one.

    For position i, with the main model's hidden state h_i (after its final norm) and token t_{i+1}:
    u = eh_proj([enorm(embed(t_{i+1})), hnorm(h_i)]), one decoder layer with pages of its own,
    shared_head.norm, head. Its own output in place of h_i, and its draft in place of t_{i+1}, draft one
    token further.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        experts: Experts,
        mode: AttentionMode,
        backend: Backend,
        layer_class: LayerClass,
    ) -> None:
        layer = config.num_hidden_layers
        prefix = f"model.layers.{layer}"
        self._eps, self._backend = config.rms_norm_eps, backend
        self._enorm = weights.take(f"{prefix}.enorm.weight")
        self._hnorm = weights.take(f"{prefix}.hnorm.weight")
        self._eh_proj = stable(weights.take(f"{prefix}.eh_proj.weight"), backend=backend)
        self._layer = layer_class(config, weights, layer, experts, mode, backend)
        self._norm = weights.take(f"{prefix}.shared_head.norm.weight")

    def forward(
        self,
        embedded: Tensor,
        hidden: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        trace: Trace | None,
    ) -> Tensor:
        """[T, D] after shared_head.norm, from the next tokens' embeddings and h, both [T, D]."""
        embedded = rms_norm(embedded, self._enorm, self._eps, backend=self._backend)
        hidden = rms_norm(hidden, self._hnorm, self._eps, backend=self._backend)
        residual = linear(torch.cat([embedded, hidden], dim=-1), self._eh_proj, backend=self._backend)
        update, residual = self._layer.forward(None, residual, inputs, angles, pages, trace)
        return add_rms_norm(update.result(), residual, self._norm, self._eps, backend=self._backend)[0]


@dataclass(frozen=True)
class MicroBatch:
    """Some of a step's sequences, which go through the layers together.

    `on_layer` is told the number of each layer whose pages hold their rows; these may be at the experts then.
    """

    inputs: ForwardInputs
    trace: Trace | None = None
    on_layer: Callable[[int], None] | None = None


@dataclass
class _Flow:
    """A micro-batch between two layers: the residual stream [T, D], and what is to be added to it."""

    batch: MicroBatch
    angles: tuple[Tensor, Tensor]
    residual: Tensor
    update: PendingSum | None = None

    def through(self, number: int, layer: Layer, pages: LayerPages) -> None:
        batch = self.batch
        self.update, self.residual = layer.forward(
            self.update, self.residual, batch.inputs, self.angles, pages, batch.trace
        )
        if batch.on_layer:
            batch.on_layer(number)


class Decoder:
    """A DeepSeek-V3.2-class model without its routed experts, which `experts` computes."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        experts: Experts,
        *,
        mode: AttentionMode = "sparse",
        backend: Backend = "reference",
        layer_class: LayerClass = DecoderLayer,
    ) -> None:
        self.config, self._backend = config, backend
        self._embedding = weights.take("model.embed_tokens.weight")
        head = weights.take("lm_head.weight")
        self._head = head if backend == "triton" else stable(head.float(), backend=backend)
        self._norm = weights.take("model.norm.weight")
        self.layers = [
            layer_class(config, weights, layer, experts, mode, backend)
            for layer in range(config.num_hidden_layers)
        ]
        self._mtp = (
            MTP(config, weights, experts, mode, backend, layer_class)
            if config.num_nextn_predict_layers
            else None
        )
        self._frequencies = rope_frequencies(config).to(self._embedding.device)

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.device

    @property
    def backend(self) -> Backend:
        return self._backend

    @property
    def can_draft(self) -> bool:
        return self._mtp is not None

    def forward(
        self,
        inputs: ForwardInputs,
        cache: PageCache,
        trace: Trace | None = None,
        on_layer: Callable[[int], None] | None = None,
    ) -> Tensor:
        """Run the rows through every layer, filling their pages.

        Args:
            on_layer: as of a `MicroBatch`.

        Returns:
            [T, D] hidden states after the final norm.
        """
        return self.forward_in_turn([MicroBatch(inputs, trace, on_layer)], cache)[0]

    def forward_in_turn(self, batches: Sequence[MicroBatch], cache: PageCache) -> list[Tensor]:
        """As `forward` of several: each computes attention while the rows of the others are at the experts.

        Returns:
            For each micro-batch [T, D] hidden states after the final norm.
        """
        flows = [self._flow(batch) for batch in batches]
        try:
            for number, (layer, pages) in enumerate(zip(self.layers, cache.layers, strict=False)):
                for flow in flows:
                    flow.through(number, layer, pages)
            return [self._final_norm(flow) for flow in flows]
        except BaseException:
            for flow in flows:  # one has failed: nobody takes what the others have at the experts
                if flow.update is not None:
                    flow.update.drop()
            raise

    def _flow(self, batch: MicroBatch) -> _Flow:
        angles = rope_angles(self._frequencies, batch.inputs.positions)
        return _Flow(batch, angles, self._embedding[batch.inputs.token_ids])

    def _final_norm(self, flow: _Flow) -> Tensor:
        assert flow.update is not None
        update, eps = flow.update.result(), self.config.rms_norm_eps
        return add_rms_norm(update, flow.residual, self._norm, eps, backend=self._backend)[0]

    def draft(
        self, inputs: ForwardInputs, hidden: Tensor, cache: PageCache, trace: Trace | None = None
    ) -> Tensor:
        """Run the MTP module over rows whose next token is known, filling its pages.

        Args:
            inputs: row of position i carries token t_{i+1}.
            hidden: [T, D], h_i of `forward` (or this module's own output, to draft one token further).

        Returns:
            [T, D]; `logits` of it are those of token t_{i+2}.
        """
        assert self._mtp, "the checkpoint has no MTP module"
        angles = rope_angles(self._frequencies, inputs.positions)
        embedded = self._embedding[inputs.token_ids]
        return self._mtp.forward(embedded, hidden, inputs, angles, cache.layers[-1], trace)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, vocab] float32 from hidden states [R, D]; computed in fp32."""
        return linear_fp32(hidden, self._head, backend=self._backend)

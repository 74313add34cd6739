"""A decoder layer for GPUs: the arithmetic of `model.decoder.DecoderLayer`, cut where launches and memory
traffic are fewest. Every norm also quantises, every projection reads FP8, and what lies between two matrix
products is one kernel.

Weights stay e4m3 with their block scales; activations are quantised 1 x 128 before each FP8 product, as the
official kernels do, so numbers differ from the reference path's by that rounding. Shapes: T rows, D width.
"""

from collections.abc import Collection

from torch import Tensor

from kernels.backend import Backend
from kernels.norm_quantize import add_rms_norm_quantize
from model.attention import AttentionMode
from model.checkpoint import Weights
from model.config import ModelConfig
from model.decoder import Trace
from model.fused.attention import FusedAttention
from model.fused.feed_forward import FusedFeedForward, FusedMoE, Quantized
from model.fused.operations import ThirdParty, operations
from model.inputs import ForwardInputs
from model.moe import Done, Experts, PendingSum
from model.pages import LayerPages


class FusedLayer:
    """h += attention(norm(h)); h += feed_forward(norm(h)); as `DecoderLayer`, for FP8 checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        experts: Experts,
        mode: AttentionMode,
        backend: Backend,
        third_party: Collection[ThirdParty] = (),
    ) -> None:
        ops = operations(backend, third_party)
        prefix = f"model.layers.{layer}"
        self._eps, self._backend = config.rms_norm_eps, backend
        self._input_norm = weights.take(f"{prefix}.input_layernorm.weight")
        self._post_norm = weights.take(f"{prefix}.post_attention_layernorm.weight")
        self.attention = FusedAttention(config, weights, f"{prefix}.self_attn", mode, backend, ops)
        self._feed_forward = (
            FusedFeedForward(weights, f"{prefix}.mlp", backend, ops)
            if config.is_dense(layer)
            else FusedMoE(config, weights, layer, experts, backend, ops)
        )

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
        quantized, normed, residual = self.attend(update, residual, inputs, angles, pages, trace)
        if isinstance(self._feed_forward, FusedFeedForward):
            return Done(self._feed_forward.forward(quantized)), residual
        return self._feed_forward.submit(quantized, normed, trace.routed if trace else None), residual

    def attend(
        self,
        update: PendingSum | None,
        residual: Tensor,
        inputs: ForwardInputs,
        angles: tuple[Tensor, Tensor],
        pages: LayerPages,
        trace: Trace | None,
    ) -> tuple[Quantized, Tensor, Tensor]:
        """The attention half, from norm to norm.

        Returns:
            What the feed-forward half reads, quantised and as it is, and the residual stream, each [T, D].
        """
        x, before = (residual, None) if update is None else (update.result(), residual)
        quantized, normed, residual = self._norm(x, before, self._input_norm)
        chosen = trace.selected if trace else None
        attended = self.attention.forward(quantized, normed, inputs, angles, pages, chosen)
        return self._norm(attended, residual, self._post_norm)

    def _norm(self, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Quantized, Tensor, Tensor]:
        """The normalised rows, quantised and as they are, and the new residual stream."""
        rows = add_rms_norm_quantize(x, residual, weight, self._eps, keep_normed=True, backend=self._backend)
        assert rows.values is not None
        assert rows.scales is not None
        assert rows.normed is not None
        return (rows.values, rows.scales), rows.normed, rows.residual

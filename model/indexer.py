"""The lightning indexer: a small scorer that picks the index_topk tokens each query attends to.

Queries come from the normalised q latent, keys and head weights from the layer's normalised input; RoPE turns
the first channels in half-split pairs (MLA's is interleaved and last). Pages of format `fp8` score Hadamard
rotated e4m3 vectors, pages of format `full` the vectors as they are.
Shapes: T rows, H index heads, D index_head_dim, R qk_rope_head_dim.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import Backend
from kernels.index_logits import index_logits, require_stable_scores
from kernels.linear import linear_fp32, stable
from kernels.rope import apply_rope
from kernels.topk import topk
from model.checkpoint import Weights
from model.config import ModelConfig
from model.inputs import ForwardInputs
from model.pages import LayerPages

KEY_NORM_EPS = 1e-6  # whatever `rms_norm_eps` says, as in transformers
_TILE_SCORES = 1 << 26  # [rows, keys] fp32 scores alive at once: 256 MiB, at 128K tokens 512 rows


@dataclass(frozen=True)
class IndexQueries:
    """Encoded queries [T, H, D] and head weights [T, H] float32 with every constant and scale in them."""

    vectors: Tensor
    weights: Tensor


class Indexer:
    """One layer's indexer. Its wk and wq_b stand in the attention's fused projections."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, backend: Backend) -> None:
        self._config, self._backend = config, backend
        self._k_norm_weight = weights.take(f"{prefix}.k_norm.weight")
        self._k_norm_bias = weights.take(f"{prefix}.k_norm.bias")
        self._weights_proj = stable(weights.take(f"{prefix}.weights_proj.weight"), backend=backend)
        if backend == "deterministic":
            require_stable_scores(config.index_head_dim, self._weights_proj.device)

    def write_keys(
        self, k: Tensor, inputs: ForwardInputs, angles: tuple[Tensor, Tensor], pages: LayerPages
    ) -> None:
        """LayerNorm, rotate, encode and store the rows' keys [T, D]."""
        weight, bias = self._k_norm_weight, self._k_norm_bias
        normed = F.layer_norm(k.float(), k.shape[-1:], weight, bias, KEY_NORM_EPS).to(k.dtype)
        pages.write_index_keys(inputs.slots, *pages.encode_index(self._rotate(normed, angles)))

    def queries(self, x: Tensor, q: Tensor, angles: tuple[Tensor, Tensor], pages: LayerPages) -> IndexQueries:
        """Encode projected queries [T, H * D] and compute the head weights from x [T, D_hidden]."""
        config = self._config
        q = q.unflatten(-1, (config.index_n_heads, config.index_head_dim))
        vectors, scales = pages.encode_index(self._rotate(q, angles))
        constant = config.index_n_heads**-0.5 * config.index_head_dim**-0.5
        weights = linear_fp32(x, self._weights_proj, backend=self._backend) * constant
        return IndexQueries(vectors, weights if scales is None else weights * scales)

    def select(
        self, queries: IndexQueries, sequence: int, inputs: ForwardInputs, pages: LayerPages
    ) -> Tensor:
        """What one sequence's rows attend to: positions [rows, index_topk] int32, ascending, -1 padded."""
        segment = inputs.segments[sequence]
        keys, scales = pages.read_index_keys(inputs.pages_of(sequence))
        keys, scales = keys[: segment.kv_len], None if scales is None else scales[: segment.kv_len]
        tile = max(1, _TILE_SCORES // segment.kv_len)
        chosen = []
        for start in range(segment.start, segment.stop, tile):
            rows = slice(start, min(start + tile, segment.stop))
            scores = index_logits(
                queries.vectors[rows],
                keys,
                scales,
                queries.weights[rows],
                inputs.visible[rows],
                backend=self._backend,
            )
            chosen.append(topk(scores, self._config.index_topk, backend=self._backend))
        return chosen[0] if len(chosen) == 1 else torch.cat(chosen)

    def _rotate(self, vectors: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        rope, rest = vectors.split(
            [self._config.qk_rope_head_dim, vectors.shape[-1] - self._config.qk_rope_head_dim], dim=-1
        )
        turned = apply_rope(rope, *angles, interleaved=False, backend=self._backend)
        return torch.cat([turned, rest], dim=-1)

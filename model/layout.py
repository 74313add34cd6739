"""The tensors of a checkpoint: names, shapes, storage and whose they are, as one table.

Everything that needs to know what a checkpoint holds reads this table: the loader, the checks, the counts
of `eightfold inspect`, and random weights. Names and shapes are those of the official Hugging Face files.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from model.config import FP8_BLOCK, ModelConfig

Storage = Literal["matrix", "bf16", "norm", "fp32"]
"""matrix: e4m3 with block scales where the checkpoint is quantised, bf16 otherwise; bf16: never quantised;
norm: bf16 or fp32 (official checkpoints have had both); fp32: fp32 (bf16 is accepted and widened)."""

Part = Literal[
    "embedding",
    "attention",
    "indexer",
    "dense_ffn",
    "gate",
    "shared_expert",
    "expert",
    "eh_proj",
    "norm",
    "head",
]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a checkpoint of a given configuration must hold.

    `layer` is -1 outside the layers; `expert` is -1 for everything that is not one routed expert's.
    """

    name: str
    shape: tuple[int, ...]
    storage: Storage
    part: Part
    layer: int = -1
    expert: int = -1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def is_quantized(self, config: ModelConfig) -> bool:
        return self.storage == "matrix" and config.quantization_config is not None

    @property
    def scale_name(self) -> str:
        """The tensor of block multipliers beside a quantised matrix (despite its name: w = w8 * scale)."""
        return f"{self.name}_scale_inv"

    @property
    def scale_shape(self) -> tuple[int, ...]:
        return tuple(math.ceil(size / FP8_BLOCK) for size in self.shape)

    def num_bytes(self, config: ModelConfig) -> int:
        """Bytes in the official storage: e4m3 and scales, bf16, or fp32."""
        if self.is_quantized(config):
            return self.numel + 4 * math.prod(self.scale_shape)
        return self.numel * (4 if self.storage == "fp32" else 2)


def layout(config: ModelConfig) -> Iterator[TensorSpec]:
    """Every tensor of a checkpoint of this configuration, in the order of the model."""
    vocab, width = config.vocab_size, config.hidden_size
    yield TensorSpec("model.embed_tokens.weight", (vocab, width), "bf16", "embedding")
    for layer in range(config.num_hidden_layers):
        yield from _decoder_layer(config, layer)
    yield TensorSpec("model.norm.weight", (width,), "norm", "norm")
    yield TensorSpec("lm_head.weight", (vocab, width), "bf16", "head")
    if config.num_nextn_predict_layers:
        yield from _mtp_layer(config, config.num_hidden_layers)


def _decoder_layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    prefix = f"model.layers.{layer}"
    width = config.hidden_size
    yield TensorSpec(f"{prefix}.input_layernorm.weight", (width,), "norm", "norm", layer)
    yield from _attention(config, f"{prefix}.self_attn", layer)
    yield TensorSpec(f"{prefix}.post_attention_layernorm.weight", (width,), "norm", "norm", layer)
    if config.is_dense(layer):
        yield from _ffn(f"{prefix}.mlp", width, config.intermediate_size, "dense_ffn", layer)
    else:
        yield from _moe(config, f"{prefix}.mlp", layer)


def _attention(config: ModelConfig, prefix: str, layer: int) -> Iterator[TensorSpec]:
    heads, width = config.num_attention_heads, config.hidden_size
    shapes: dict[str, tuple[tuple[int, ...], Storage, Part]] = {
        "q_a_proj.weight": ((config.q_lora_rank, width), "matrix", "attention"),
        "q_a_layernorm.weight": ((config.q_lora_rank,), "norm", "attention"),
        "q_b_proj.weight": ((heads * config.qk_head_dim, config.q_lora_rank), "matrix", "attention"),
        "kv_a_proj_with_mqa.weight": ((config.latent_dim, width), "matrix", "attention"),
        "kv_a_layernorm.weight": ((config.kv_lora_rank,), "norm", "attention"),
        "kv_b_proj.weight": (
            (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
            "matrix",
            "attention",
        ),
        "o_proj.weight": ((width, heads * config.v_head_dim), "matrix", "attention"),
        "indexer.wq_b.weight": (
            (config.index_n_heads * config.index_head_dim, config.q_lora_rank),
            "matrix",
            "indexer",
        ),
        "indexer.wk.weight": ((config.index_head_dim, width), "matrix", "indexer"),
        "indexer.k_norm.weight": ((config.index_head_dim,), "fp32", "indexer"),
        "indexer.k_norm.bias": ((config.index_head_dim,), "fp32", "indexer"),
        "indexer.weights_proj.weight": ((config.index_n_heads, width), "bf16", "indexer"),
    }
    for name, (shape, storage, part) in shapes.items():
        yield TensorSpec(f"{prefix}.{name}", shape, storage, part, layer)


def _ffn(
    prefix: str, width: int, inner: int, part: Part, layer: int, expert: int = -1
) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.gate_proj.weight", (inner, width), "matrix", part, layer, expert)
    yield TensorSpec(f"{prefix}.up_proj.weight", (inner, width), "matrix", part, layer, expert)
    yield TensorSpec(f"{prefix}.down_proj.weight", (width, inner), "matrix", part, layer, expert)


def _moe(config: ModelConfig, prefix: str, layer: int) -> Iterator[TensorSpec]:
    width, inner = config.hidden_size, config.moe_intermediate_size
    experts = config.n_routed_experts
    yield TensorSpec(f"{prefix}.gate.weight", (experts, width), "bf16", "gate", layer)
    yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", (experts,), "fp32", "gate", layer)
    yield from _ffn(
        f"{prefix}.shared_experts", width, config.n_shared_experts * inner, "shared_expert", layer
    )
    for expert in range(experts):
        yield from _ffn(f"{prefix}.experts.{expert}", width, inner, "expert", layer, expert)


def _mtp_layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    """The MTP module: a decoder layer with an entrance and with copies of embedding and head."""
    prefix = f"model.layers.{layer}"
    vocab, width = config.vocab_size, config.hidden_size
    yield TensorSpec(f"{prefix}.embed_tokens.weight", (vocab, width), "bf16", "embedding", layer)
    yield TensorSpec(f"{prefix}.enorm.weight", (width,), "norm", "norm", layer)
    yield TensorSpec(f"{prefix}.hnorm.weight", (width,), "norm", "norm", layer)
    yield TensorSpec(f"{prefix}.eh_proj.weight", (width, 2 * width), "bf16", "eh_proj", layer)
    yield from _decoder_layer(config, layer)
    yield TensorSpec(f"{prefix}.shared_head.norm.weight", (width,), "norm", "norm", layer)
    yield TensorSpec(f"{prefix}.shared_head.head.weight", (vocab, width), "bf16", "head", layer)

"""What a checkpoint's `config.json` says of the model, under the checkpoint's own names."""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from model.errors import CheckpointError

CONFIG_FILE = "config.json"
FP8_BLOCK = 128  # rows and columns that share one weight scale, and channels that share one activation scale


class _Facts(BaseModel):
    """Frozen, strict about types; keys that the model's arithmetic does not use are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Yarn(_Facts):
    """YaRN's stretching of RoPE (https://arxiv.org/abs/2309.00071), as DeepSeek-V3 uses it.

    cos and sin carry no factor of their own here (the checkpoint's mscale equals its mscale_all_dim), so
    the model differs from plain RoPE in its frequencies and in the softmax scale only.
    """

    factor: float = Field(gt=0)
    original_max_position_embeddings: int = Field(gt=0)
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    @model_validator(mode="after")
    def _has_no_attention_factor(self) -> "Yarn":
        if self.mscale_all_dim and self.mscale != self.mscale_all_dim:
            raise ValueError(f"mscale {self.mscale} must equal mscale_all_dim {self.mscale_all_dim}")
        if not self.mscale_all_dim and self.mscale != 1.0:
            raise ValueError(f"mscale {self.mscale} without mscale_all_dim is not DeepSeek's YaRN")
        return self

    @property
    def attention_mscale(self) -> float:
        """What the softmax scale is multiplied by, squared: 0.1 * mscale * ln(factor) + 1."""
        if self.factor <= 1 or not self.mscale_all_dim:
            return 1.0
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0


class Quantization(_Facts):
    """How the matrices of the checkpoint are stored: e4m3 values and one fp32 multiplier a block."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[Literal[128], Literal[128]] = (FP8_BLOCK, FP8_BLOCK)
    scale_fmt: Literal["ue8m0"] | None = None


class ModelConfig(_Facts):
    """The shape of one DeepSeek-V3.2-class model. Names are those of the checkpoint."""

    model_type: Literal["deepseek_v32"]
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    first_k_dense_replace: int = Field(ge=0)
    num_attention_heads: int = Field(gt=0)
    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(gt=0)
    topk_group: int = Field(gt=0)
    routed_scaling_factor: float
    norm_topk_prob: bool = True
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    moe_layer_freq: Literal[1] = 1
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    q_lora_rank: int = Field(gt=0)
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, multiple_of=2)
    v_head_dim: int = Field(gt=0)
    index_n_heads: int = Field(gt=0)
    index_head_dim: int = Field(gt=0)
    index_topk: int = Field(gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    max_position_embeddings: int = Field(gt=0)
    rope_theta: float = Field(gt=0)
    yarn: Yarn | None = None
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    bos_token_id: int = 0
    eos_token_id: int = 1
    quantization_config: Quantization | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_rope_keys(cls, facts: dict[str, Any]) -> dict[str, Any]:
        """Accept `rope_theta` + `rope_scaling`, and the `rope_parameters` of transformers 5."""
        facts = dict(facts)
        rope = facts.pop("rope_parameters", None) or facts.pop("rope_scaling", None) or {}
        if "rope_theta" in rope:
            facts["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "yarn":
            facts["yarn"] = rope
        elif kind != "default":
            raise ValueError(f"rope type {kind!r} is neither 'default' nor 'yarn'")
        for key in ("rope_theta", "routed_scaling_factor"):
            if type(facts.get(key)) is int:
                facts[key] = float(facts[key])
        if facts.get("quantization_config"):
            quantization = dict(facts["quantization_config"])
            if isinstance(quantization.get("weight_block_size"), list):
                quantization["weight_block_size"] = tuple(quantization["weight_block_size"])
            facts["quantization_config"] = quantization
        return facts

    @model_validator(mode="after")
    def _is_consistent(self) -> "ModelConfig":
        def must(holds: bool, rule: str) -> None:
            if not holds:
                raise ValueError(rule)

        group_size = self.n_routed_experts // self.n_group
        must(self.n_routed_experts % self.n_group == 0, "n_routed_experts must be a multiple of n_group")
        must(group_size >= 2, "a group must hold at least 2 experts: its score is the sum of its best two")
        must(self.topk_group <= self.n_group, "topk_group must not exceed n_group")
        must(
            self.num_experts_per_tok <= self.topk_group * group_size,
            "num_experts_per_tok must not exceed the experts of topk_group groups",
        )
        must(
            self.first_k_dense_replace <= self.num_hidden_layers,
            "first_k_dense_replace must not exceed num_hidden_layers",
        )
        must(
            self.index_head_dim >= self.qk_rope_head_dim,
            "index_head_dim must hold qk_rope_head_dim rotated channels",
        )
        must(
            0 <= self.eos_token_id < self.vocab_size and 0 <= self.bos_token_id < self.vocab_size,
            "bos_token_id and eos_token_id must lie in the vocabulary",
        )
        return self

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` of a checkpoint.

        Raises:
            CheckpointError: no such file, not JSON, or a key that is missing or has no usable value.
        """
        try:
            facts = json.loads((directory / CONFIG_FILE).read_bytes())
        except FileNotFoundError:
            raise CheckpointError(CONFIG_FILE, "", "the model's configuration", "no such file") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(CONFIG_FILE, "", "JSON", str(error)) from None
        if not isinstance(facts, dict):
            raise CheckpointError(CONFIG_FILE, "", "a JSON object", type(facts).__name__)
        try:
            return cls.model_validate(facts)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            found = (
                f"{json.dumps(first['input'])[:60]}" if key and first["type"] != "missing" else "otherwise"
            )
            if first["type"] == "missing":
                found = "no such key"
            message = first["msg"].removeprefix("Value error, ")
            raise CheckpointError(CONFIG_FILE, key, message[:1].lower() + message[1:], found) from None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Width of what attention caches for a token: the latent and the shared rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def group_size(self) -> int:
        """Routed experts of one group; one group lives on one node."""
        return self.n_routed_experts // self.n_group

    @property
    def num_cached_layers(self) -> int:
        """Layers with pages: every decoder layer, and the MTP layer where there is one."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    @cached_property
    def softmax_scale(self) -> float:
        """qk_head_dim^-0.5, times YaRN's mscale squared; the absorbed form uses the same number."""
        mscale = self.yarn.attention_mscale if self.yarn else 1.0
        return float(self.qk_head_dim**-0.5 * mscale * mscale)

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's feed-forward part is one dense FFN; the MTP layer's never is."""
        return layer < self.first_k_dense_replace and layer < self.num_hidden_layers

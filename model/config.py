"""What a checkpoint's `config.json` says of the model, under the checkpoint's own names."""

import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from model.errors import CheckpointError

CONFIG_FILE = "config.json"
FP8_BLOCK = 128  # rows and columns that share one weight scale, and channels that share one activation scale

_RULE = "eightfold_rule"
_ROPE_KEYS = ("rope_parameters", "rope_scaling")  # of transformers 5, and of the official checkpoints

_Size = Annotated[int, Field(gt=0, lt=1 << 31)]
_Count = Annotated[int, Field(ge=0, lt=1 << 31)]
_Positive = Annotated[float, Field(gt=0)]


class _Facts(BaseModel):
    """Frozen, strict about types; keys that the model's arithmetic does not use are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True, allow_inf_nan=False)


def _broken(key: str, expected: str, found: Any) -> PydanticCustomError:
    """A rule that pydantic has no words for; `ModelConfig.load` names its key as it does for the others."""
    context = {"key": key, "expected": expected, "found": found}
    return PydanticCustomError(_RULE, "{key}: expected {expected}", context)


class Yarn(_Facts):
    """YaRN's stretching of RoPE (https://arxiv.org/abs/2309.00071), as DeepSeek-V3 uses it.

    cos and sin carry no factor of their own here (the checkpoint's mscale equals its mscale_all_dim), so
    the model differs from plain RoPE in its frequencies and in the softmax scale only. Without both of them
    the checkpoint means another arithmetic: a factor on cos and sin.
    """

    factor: _Positive
    original_max_position_embeddings: _Size
    beta_fast: _Positive = 32.0
    beta_slow: _Positive = 1.0
    mscale: _Positive
    mscale_all_dim: _Positive
    attention_factor: Annotated[float, Field(ge=1, le=1)] | None = None
    truncate: Literal[True] = True

    @model_validator(mode="after")
    def _is_consistent(self) -> "Yarn":
        if self.mscale != self.mscale_all_dim:
            raise _broken("mscale", f"the mscale_all_dim, {self.mscale_all_dim}", self.mscale)
        if self.beta_fast < self.beta_slow:
            raise _broken("beta_fast", f"at least the beta_slow, {self.beta_slow}", self.beta_fast)
        return self

    @property
    def attention_mscale(self) -> float:
        """What the softmax scale is multiplied by, squared: 0.1 * mscale * ln(factor) + 1."""
        if self.factor <= 1:
            return 1.0
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0


class Quantization(_Facts):
    """How the matrices of the checkpoint are stored: e4m3 values and one fp32 multiplier a block."""

    quant_method: Literal["fp8"]
    fmt: Literal["e4m3"] = "e4m3"
    activation_scheme: Literal["dynamic"] = "dynamic"
    weight_block_size: tuple[Literal[128], Literal[128]] = (128, 128)
    scale_fmt: Literal["ue8m0"] | None = None


class ModelConfig(_Facts):
    """The shape of one DeepSeek-V3.2-class model. Names are those of the checkpoint."""

    model_type: Literal["deepseek_v32"]
    vocab_size: _Size
    hidden_size: _Size
    intermediate_size: _Size
    moe_intermediate_size: _Size
    num_hidden_layers: _Size
    first_k_dense_replace: _Count
    num_attention_heads: _Size
    n_routed_experts: _Size
    n_shared_experts: _Size
    num_experts_per_tok: _Size
    n_group: _Size
    topk_group: _Size
    routed_scaling_factor: _Positive
    norm_topk_prob: bool = True
    scoring_func: Literal["sigmoid"] = "sigmoid"
    topk_method: Literal["noaux_tc"] = "noaux_tc"
    moe_layer_freq: Literal[1] = 1
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Literal[False] = False
    tie_word_embeddings: Literal[False] = False
    q_lora_rank: _Size
    kv_lora_rank: _Size
    qk_nope_head_dim: _Size
    qk_rope_head_dim: Annotated[_Size, Field(multiple_of=2)]
    v_head_dim: _Size
    index_n_heads: _Size
    index_head_dim: _Size
    index_topk: _Size
    indexer_rope_interleave: Literal[False] = False
    rms_norm_eps: _Positive = 1e-6
    max_position_embeddings: _Size
    rope_theta: Annotated[float, Field(gt=1)]
    yarn: Yarn | None = None
    num_nextn_predict_layers: int = Field(default=0, ge=0, le=1)
    bos_token_id: _Count = 0
    eos_token_id: _Count = 1
    quantization_config: Quantization | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_rope_keys(cls, facts: dict[str, Any]) -> dict[str, Any]:
        """Accept `rope_theta` + `rope_scaling`, and the `rope_parameters` of transformers 5."""
        facts = dict(facts)
        for key in (*_ROPE_KEYS, "quantization_config"):
            if not isinstance(facts.get(key), dict | None):
                raise _broken(key, "an object or null", facts[key])
        new, old = (facts.get(key) for key in _ROPE_KEYS)
        if new and old and new != old:
            raise _broken("rope_scaling", "the same as rope_parameters, or null", old)
        rope = new or old or {}
        if "rope_theta" in rope:
            if facts.get("rope_theta") not in (None, rope["rope_theta"]):
                expected = f"the one of {_rope_key(facts)}, {shown(rope['rope_theta'])}"
                raise _broken("rope_theta", expected, facts["rope_theta"])
            facts["rope_theta"] = rope["rope_theta"]
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "yarn":
            facts["yarn"] = rope
        elif kind != "default":
            name = "rope_type" if "rope_type" in rope else "type"
            raise _broken(f"{_rope_key(facts)}.{name}", "'default' or 'yarn'", kind)
        quantization = facts.get("quantization_config")
        if quantization and isinstance(quantization.get("weight_block_size"), list):
            blocks = tuple(quantization["weight_block_size"])
            facts["quantization_config"] = {**quantization, "weight_block_size": blocks}
        return facts

    @model_validator(mode="after")
    def _is_consistent(self) -> "ModelConfig":
        def must(holds: bool, key: str, expected: str, found: int) -> None:
            if not holds:
                raise _broken(key, expected, found)

        experts, groups, layers = self.n_routed_experts, self.n_group, self.num_hidden_layers
        must(experts % groups == 0, "n_routed_experts", f"a multiple of n_group, {groups}", experts)
        must(
            self.group_size >= 2,
            "n_routed_experts",
            f"at least 2 for each n_group, {2 * groups} (a group's score is the sum of its best two)",
            experts,
        )
        must(self.topk_group <= groups, "topk_group", f"at most n_group, {groups}", self.topk_group)
        reachable = self.topk_group * self.group_size
        chosen, dense = self.num_experts_per_tok, self.first_k_dense_replace
        must(
            chosen <= reachable,
            "num_experts_per_tok",
            f"at most the {reachable} experts of topk_group groups",
            chosen,
        )
        must(dense <= layers, "first_k_dense_replace", f"at most num_hidden_layers, {layers}", dense)
        must(
            self.index_head_dim >= self.qk_rope_head_dim,
            "index_head_dim",
            f"at least qk_rope_head_dim, {self.qk_rope_head_dim}",
            self.index_head_dim,
        )
        for key, token in (("bos_token_id", self.bos_token_id), ("eos_token_id", self.eos_token_id)):
            must(token < self.vocab_size, key, f"less than vocab_size, {self.vocab_size}", token)
        return self

    @classmethod
    def load(cls, directory: Path) -> "ModelConfig":
        """Read `config.json` of a checkpoint.

        Raises:
            CheckpointError: no such file, not JSON, or a key that is missing or has no usable value.
        """
        try:
            raw = (directory / CONFIG_FILE).read_bytes()
        except OSError as error:
            found = error.strerror or "an error"
            raise CheckpointError(CONFIG_FILE, "", "the model's configuration", found) from None
        facts = parse_json(CONFIG_FILE, raw)
        if not isinstance(facts, dict):
            raise CheckpointError(CONFIG_FILE, "", "a JSON object", type(facts).__name__)
        try:
            return cls.model_validate(facts)
        except ValidationError as error:
            raise _named(error.errors()[0], _rope_key(facts)) from None

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


def parse_json(file: str, raw: bytes) -> Any:
    """Parse one of a checkpoint's JSON files, in which no object may name a key twice.

    Raises:
        CheckpointError: not JSON, or a key that stands twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(file, shown(key).strip('"'), "each name once", "the name twice")
            result[key] = value
        return result

    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(file, "", "JSON", f"bytes that start {raw[:16]!r} ({error})") from None


def shown(value: Any) -> str:
    """A value out of a file, as it may stand in a message: one line, of printable ASCII, not long."""
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _rope_key(facts: dict[str, Any]) -> str:
    """The key under which this configuration describes its RoPE."""
    return next((key for key in _ROPE_KEYS if facts.get(key)), _ROPE_KEYS[-1])


def _named(error: ErrorDetails, rope_key: str) -> CheckpointError:
    """One error of pydantic's, in the checkpoint's words: which key, what is expected, what is found."""
    keys = [rope_key if part == "yarn" else str(part) for part in error["loc"]]
    if error["type"] == _RULE:
        context = error["ctx"]
        key = ".".join([*keys, context["key"]])
        return CheckpointError(CONFIG_FILE, key, context["expected"], shown(context["found"]))
    if error["type"] == "missing":
        return CheckpointError(CONFIG_FILE, ".".join(keys), "a value", "no such key")
    expected = error["msg"].removeprefix("Input should be ").removeprefix("Input should ")
    return CheckpointError(CONFIG_FILE, ".".join(keys), expected, shown(error["input"]))

"""Small random checkpoints in the official format, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cluster.demo import DEMO as DEMO
from cluster.demo import OFFICIAL_671B as OFFICIAL_671B
from model.config import FP8_BLOCK, ModelConfig
from model.layout import TensorSpec, layout

YARN = {
    "type": "yarn",
    "factor": 8,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def facts(**overrides: Any) -> dict[str, Any]:
    """A `config.json` of a model that runs in milliseconds; overrides replace or add keys."""
    return {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        "vocab_size": 320,
        "hidden_size": 96,
        "intermediate_size": 144,
        "moe_intermediate_size": 48,
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": 48,
        "kv_lora_rank": 40,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 16,
        "v_head_dim": 20,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 32,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
        **overrides,
    }


def fp8_facts(**overrides: Any) -> dict[str, Any]:
    """The same, with matrices stored in e4m3 blocks as the official checkpoints have them."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
        "scale_fmt": "ue8m0",
    }
    return facts(quantization_config=quantization, num_nextn_predict_layers=1, **overrides)


def random_tensors(config: ModelConfig, seed: int) -> dict[str, Tensor]:
    """Well-scaled random values for every tensor of the layout: float32, or e4m3 with scales."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for spec in layout(config):
        value = _random_tensor(spec, generator)
        if spec.is_quantized(config):
            tensors[spec.name] = (value * 256).clamp(-448, 448).to(torch.float8_e4m3fn)
            exponents = torch.randint(-9, -7, spec.scale_shape, generator=generator)
            tensors[spec.scale_name] = torch.exp2(exponents.float())
        else:
            tensors[spec.name] = value
    if config.num_nextn_predict_layers:
        mtp = f"model.layers.{config.num_hidden_layers}"
        tensors[f"{mtp}.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[f"{mtp}.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors


def _random_tensor(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    value = torch.randn(spec.shape, generator=generator)
    if spec.storage == "norm" or spec.name.endswith("k_norm.weight"):
        return 1 + 0.1 * value
    if len(spec.shape) == 1:
        return 0.1 * value
    return value if spec.part == "embedding" else value * spec.shape[1] ** -0.5


def write_tensors(directory: Path, tensors: dict[str, Tensor], num_shards: int = 2) -> None:
    """Write shards and their index."""
    names = list(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        held = names[shard::num_shards]
        save_file({name: tensors[name] for name in held}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(held, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def write_checkpoint(directory: Path, config_facts: dict[str, Any], seed: int = 0) -> Path:
    """A whole random checkpoint; returns its directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config_facts))
    write_tensors(directory, random_tensors(ModelConfig.model_validate(config_facts), seed))
    return directory

"""Weights that nobody trained: the storage of a checkpoint, and sizes that keep activations in range."""

import torch

from kernels.fp8_quant import dequantize_blocks
from model.config import FP8_BLOCK, ModelConfig
from model.layout import layout
from model.random_weights import random_weights
from tests.checkpoints import fp8_facts


def config() -> ModelConfig:
    return ModelConfig.model_validate(fp8_facts(hidden_size=256, q_lora_rank=128))


def test_every_tensor_as_the_loader_leaves_it() -> None:
    weights, expected = random_weights(config()), {}
    for spec in layout(config()):
        expected[spec.name] = spec.shape
        if spec.is_quantized(config()):
            expected[spec.scale_name] = spec.scale_shape
            assert weights[spec.name].dtype == torch.float8_e4m3fn
    assert {name: tuple(value.shape) for name, value in weights.items()} == expected
    assert weights["model.norm.weight"].dtype == torch.float32
    assert weights["model.embed_tokens.weight"].dtype == torch.bfloat16


def test_matrices_keep_the_size_of_what_passes_through() -> None:
    weights = random_weights(config())
    name = "model.layers.1.self_attn.q_a_proj.weight"
    matrix = dequantize_blocks(weights[name], weights[f"{name}_scale_inv"], FP8_BLOCK)
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    assert 0.5 < (x @ matrix.t()).std() < 2


def test_a_seed_is_a_model() -> None:
    first, again, other = (random_weights(config(), seed=seed)["lm_head.weight"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_only_what_is_wanted() -> None:
    wanted = random_weights(config(), lambda spec: spec.layer == 1 and spec.expert == 3)
    assert len(wanted) == 6
    assert all(".experts.3." in name for name in wanted)

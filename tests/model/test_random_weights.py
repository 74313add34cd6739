"""Weights that nobody trained: the storage of a checkpoint, and sizes that keep activations in range."""

import pytest
import torch

from kernels.fp8_quant import dequantize_blocks
from model.checkpoint import is_duplicate, routed_experts
from model.config import FP8_BLOCK, ModelConfig
from model.decoder import Decoder
from model.errors import CheckpointError
from model.layout import layout
from model.moe import LocalExperts
from model.random_weights import RandomCheckpoint, random_weights
from tests.checkpoints import DEMO, OFFICIAL_671B, fp8_facts
from tests.running import run


def config() -> ModelConfig:
    return ModelConfig.model_validate(fp8_facts(hidden_size=256, q_lora_rank=128))


def test_every_tensor_as_the_loader_leaves_it() -> None:
    weights, expected = random_weights(config()), {}
    for spec in layout(config()):
        if is_duplicate(config(), spec):
            continue
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


def test_a_part_has_the_values_it_has_in_the_whole() -> None:
    whole = random_weights(config())
    parts = [random_weights(config(), routed_experts(range(first, first + 4))) for first in (12, 4, 0, 8)]
    parts.append(random_weights(config(), lambda spec: spec.layer == 2 and spec.expert < 0))
    for part in parts:
        for name, value in part.items():
            assert torch.equal(value.view(torch.uint8), whole[name].view(torch.uint8)), name
    assert not torch.equal(
        whole["model.layers.1.mlp.experts.0.up_proj.weight"].view(torch.uint8),
        whole["model.layers.1.mlp.experts.1.up_proj.weight"].view(torch.uint8),
    )


def test_widened_it_is_the_same_model() -> None:
    stored, widened = random_weights(config()), random_weights(config(), dtype=torch.float32, widen=True)
    assert all(value.dtype == torch.float32 for value in widened.values())
    name = "model.layers.2.mlp.experts.3.down_proj.weight"
    expected = dequantize_blocks(stored[name], stored[f"{name}_scale_inv"], FP8_BLOCK)
    assert torch.equal(widened[name], expected)
    assert f"{name}_scale_inv" not in widened


@pytest.mark.parametrize(("layers", "dense"), [(None, 3), (61, 3), (5, 3), (2, 2)])
def test_fewer_layers_are_the_first_ones(layers: int | None, dense: int) -> None:
    found = RandomCheckpoint.open(OFFICIAL_671B, layers).config
    assert found.num_hidden_layers == (layers or 61)
    assert found.first_k_dense_replace == dense
    assert found.num_nextn_predict_layers == 1
    ModelConfig.model_validate(found.model_dump())  # its rules hold


@pytest.mark.parametrize("layers", [-1, 0, 62])
def test_layers_that_are_not_there_are_refused(layers: int) -> None:
    with pytest.raises(CheckpointError, match=f"layers: expected 1 to 61, .* found {layers}$"):
        RandomCheckpoint.open(OFFICIAL_671B, layers)


def test_the_digest_follows_what_the_values_follow() -> None:
    two = RandomCheckpoint.open(DEMO, 2)
    others = [
        RandomCheckpoint.open(DEMO, 3),
        RandomCheckpoint.open(OFFICIAL_671B, 2),
        RandomCheckpoint(two.config, 1),
    ]
    assert two.digest == RandomCheckpoint.open(DEMO, 2).digest
    assert len({each.digest for each in (two, *others)}) == 4
    assert len(two.digest) == 64


def test_every_layer_of_the_demo_runs_on_numbers() -> None:
    checkpoint = RandomCheckpoint.open(DEMO)
    weights, demo = checkpoint.load(dtype=torch.float32), checkpoint.config
    decoder = Decoder(demo, weights, LocalExperts(demo, weights, range(demo.n_group), "reference"))
    assert not weights
    logits = run(decoder, range(300)).logits
    assert logits.isfinite().all()
    assert 0.1 < logits.std() < 10

import json
from collections import Counter

import pytest
import torch

from model.config import ModelConfig
from model.layout import Part, TensorSpec, layout
from model.pages import cache_bytes_per_token
from tests.checkpoints import OFFICIAL_671B, facts, fp8_facts

OFFICIAL = json.loads((OFFICIAL_671B / "config.json").read_text())
CONFIG = ModelConfig.model_validate(OFFICIAL)
MTP_LAYER = 61

# Every tensor of the official files: name behind `model.layers.N.`, shape, and shape of the scales if e4m3.
ATTENTION: dict[str, tuple[list[int], list[int] | None]] = {
    "input_layernorm.weight": ([7168], None),
    "post_attention_layernorm.weight": ([7168], None),
    "self_attn.q_a_proj.weight": ([1536, 7168], [12, 56]),
    "self_attn.q_a_layernorm.weight": ([1536], None),
    "self_attn.q_b_proj.weight": ([24576, 1536], [192, 12]),
    "self_attn.kv_a_proj_with_mqa.weight": ([576, 7168], [5, 56]),
    "self_attn.kv_a_layernorm.weight": ([512], None),
    "self_attn.kv_b_proj.weight": ([32768, 512], [256, 4]),
    "self_attn.o_proj.weight": ([7168, 16384], [56, 128]),
    "self_attn.indexer.wq_b.weight": ([8192, 1536], [64, 12]),
    "self_attn.indexer.wk.weight": ([128, 7168], [1, 56]),
    "self_attn.indexer.k_norm.weight": ([128], None),
    "self_attn.indexer.k_norm.bias": ([128], None),
    "self_attn.indexer.weights_proj.weight": ([64, 7168], None),
}
DENSE: dict[str, tuple[list[int], list[int] | None]] = {
    "mlp.gate_proj.weight": ([18432, 7168], [144, 56]),
    "mlp.up_proj.weight": ([18432, 7168], [144, 56]),
    "mlp.down_proj.weight": ([7168, 18432], [56, 144]),
}
MOE: dict[str, tuple[list[int], list[int] | None]] = {
    "mlp.gate.weight": ([256, 7168], None),
    "mlp.gate.e_score_correction_bias": ([256], None),
    **{
        f"mlp.{expert}.{part}_proj.weight": (
            ([7168, 2048], [56, 16]) if part == "down" else ([2048, 7168], [16, 56])
        )
        for expert in ["shared_experts", *(f"experts.{e}" for e in range(256))]
        for part in ("gate", "up", "down")
    },
}
MTP: dict[str, tuple[list[int], list[int] | None]] = {
    "embed_tokens.weight": ([129280, 7168], None),
    "enorm.weight": ([7168], None),
    "hnorm.weight": ([7168], None),
    "eh_proj.weight": ([7168, 14336], None),
    "shared_head.norm.weight": ([7168], None),
    "shared_head.head.weight": ([129280, 7168], None),
}


@pytest.fixture(scope="module")
def specs() -> list[TensorSpec]:
    return list(layout(CONFIG))


def parameters(specs: list[TensorSpec]) -> int:
    return sum(spec.numel for spec in specs)


def num_bytes(specs: list[TensorSpec]) -> int:
    return sum(spec.num_bytes(CONFIG) for spec in specs)


def of_layer(specs: list[TensorSpec], layer: int, *parts: Part) -> list[TensorSpec]:
    return [spec for spec in specs if spec.layer == layer and (not parts or spec.part in parts)]


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (0, {**ATTENTION, **DENSE}),
        (2, {**ATTENTION, **DENSE}),
        (3, {**ATTENTION, **MOE}),
        (60, {**ATTENTION, **MOE}),
        (MTP_LAYER, {**MTP, **ATTENTION, **MOE}),
    ],
)
def test_tensors_of_a_layer(
    layer: int, expected: dict[str, tuple[list[int], list[int] | None]], specs: list[TensorSpec]
) -> None:
    prefix = f"model.layers.{layer}."
    found = {
        spec.name.removeprefix(prefix): (
            list(spec.shape),
            list(spec.scale_shape) if spec.is_quantized(CONFIG) else None,
        )
        for spec in of_layer(specs, layer)
    }
    assert found == expected
    assert all(spec.name.startswith(prefix) for spec in of_layer(specs, layer))


def test_tensors_outside_the_layers(specs: list[TensorSpec]) -> None:
    found = {spec.name: (spec.shape, spec.is_quantized(CONFIG)) for spec in of_layer(specs, -1)}
    assert found == {
        "model.embed_tokens.weight": ((129280, 7168), False),
        "model.norm.weight": ((7168,), False),
        "lm_head.weight": ((129280, 7168), False),
    }


def test_names_are_unique_and_layers_complete(specs: list[TensorSpec]) -> None:
    assert max(Counter(spec.name for spec in specs).values()) == 1
    assert {spec.layer for spec in specs} == set(range(-1, 62))
    assert Counter(spec.expert for spec in specs if spec.part == "expert") == dict.fromkeys(
        range(256), 59 * 3
    )
    assert all(spec.expert == -1 for spec in specs if spec.part != "expert")


def test_scales_stand_beside_their_matrix() -> None:
    spec = TensorSpec("a.weight", (576, 7168), "matrix", "attention")
    assert spec.scale_name == "a.weight_scale_inv"
    assert spec.scale_shape == (5, 56)


def test_parameters_of_the_official_model(specs: list[TensorSpec]) -> None:
    main = [spec for spec in specs if spec.layer < MTP_LAYER]
    mtp = of_layer(specs, MTP_LAYER)
    copies = [spec for spec in mtp if spec.part in ("embedding", "head")]
    assert parameters(main) == 671_877_944_064
    assert parameters(specs) == 685_355_329_792
    assert parameters(mtp) - parameters(copies) == 11_624_027_648


def test_parameters_of_parts(specs: list[TensorSpec]) -> None:
    matrices = [spec.numel for spec in of_layer(specs, 0, "attention") if len(spec.shape) == 2]
    assert matrices == [11_010_048, 37_748_736, 4_128_768, 16_777_216, 117_440_512]
    assert parameters(of_layer(specs, 0, "attention")) == 187_107_328
    assert parameters(of_layer(specs, 0, "indexer")) == 13_959_424
    assert parameters(of_layer(specs, 0, "dense_ffn")) == 396_361_728
    assert parameters(of_layer(specs, 0)) == 597_442_816
    assert parameters(of_layer(specs, 3, "gate")) == 1_835_008 + 256
    assert parameters(of_layer(specs, 3, "shared_expert")) == 44_040_192
    assert parameters([spec for spec in of_layer(specs, 3) if spec.expert == 255]) == 44_040_192
    assert parameters(of_layer(specs, 3, "expert")) == 11_274_289_152
    assert parameters(of_layer(specs, 3)) == 11_521_245_696
    assert parameters(of_layer(specs, -1, "embedding")) == 926_679_040
    assert parameters(of_layer(specs, -1, "head")) == 926_679_040


def test_parameters_of_v3_are_those_without_the_indexer(specs: list[TensorSpec]) -> None:
    main = [spec for spec in specs if spec.layer < MTP_LAYER and spec.part != "indexer"]
    assert parameters(main) == 671_026_419_200


def test_bytes_of_the_official_checkpoint(specs: list[TensorSpec]) -> None:
    """With scales. Parts that hold norms or fp32 are written as matrices plus those."""
    assert num_bytes(of_layer(specs, 0, "attention")) == 187_151_072 + 2 * 2048  # norms in bf16
    assert num_bytes(of_layer(specs, 0, "indexer")) == 14_421_216 + 4 * 2 * 128  # k_norm in fp32
    assert num_bytes(of_layer(specs, 0, "dense_ffn")) == 396_458_496
    assert num_bytes(of_layer(specs, 3, "shared_expert")) == 44_050_944
    assert num_bytes(of_layer(specs, 3, "expert")) == 11_277_041_664
    assert num_bytes(of_layer(specs, 3, "gate")) == 3_670_016 + 4 * 256
    assert num_bytes(of_layer(specs, -1, "embedding")) == 1_853_358_080
    main = num_bytes([spec for spec in specs if spec.layer < MTP_LAYER])
    assert round(main / 1e9, 1) == 674.0
    assert round(main / 2**30, 1) == 627.7
    copies = num_bytes(of_layer(specs, MTP_LAYER, "embedding", "head"))
    assert round((num_bytes(of_layer(specs, MTP_LAYER)) - copies) / 1e9, 1) == 11.7


def test_an_unquantised_checkpoint_is_all_two_bytes_but_for_fp32() -> None:
    config = ModelConfig.model_validate({**OFFICIAL, "quantization_config": None})
    specs = list(layout(config))
    fp32 = [spec for spec in specs if spec.storage == "fp32"]
    assert {spec.name.split(".", 3)[-1] for spec in fp32} == {
        "self_attn.indexer.k_norm.weight",
        "self_attn.indexer.k_norm.bias",
        "mlp.gate.e_score_correction_bias",
    }
    total = sum(spec.num_bytes(config) for spec in specs)
    assert total == 2 * parameters(specs) + 2 * parameters(fp32)


def test_no_mtp_layer_without_its_key() -> None:
    config = ModelConfig.model_validate({**OFFICIAL, "num_nextn_predict_layers": 0})
    assert max(spec.layer for spec in layout(config)) == 60
    assert parameters(list(layout(config))) == 671_877_944_064


def test_a_model_of_dense_layers_still_has_a_mtp_layer_of_experts() -> None:
    config = ModelConfig.model_validate(fp8_facts(first_k_dense_replace=3))
    experts = [spec for spec in layout(config) if spec.part == "expert"]
    assert {spec.layer for spec in experts} == {3}


def test_cache_bytes_of_a_token() -> None:
    """656 + 132 bytes a layer; 576 and 128 numbers in the format without quantisation."""
    main = ModelConfig.model_validate({**OFFICIAL, "num_nextn_predict_layers": 0})
    assert cache_bytes_per_token(CONFIG, "fp8", torch.bfloat16) == 48_856
    assert cache_bytes_per_token(main, "fp8", torch.bfloat16) == 48_068
    assert cache_bytes_per_token(CONFIG, "full", torch.bfloat16) == 71_424 + 62 * 2 * 128
    assert cache_bytes_per_token(main, "full", torch.float32) == 2 * (70_272 + 61 * 2 * 128)


def test_cache_bytes_of_a_small_model() -> None:
    """In each of 3 layers 40 + 4 bytes of latent, 32 of rotated key, and 32 + 4 of index key."""
    config = ModelConfig.model_validate(facts())
    assert cache_bytes_per_token(config, "fp8", torch.float32) == 3 * (76 + 36)
    assert cache_bytes_per_token(config, "full", torch.float32) == 3 * 4 * (56 + 32)

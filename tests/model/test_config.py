import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from model.config import ModelConfig, Yarn
from model.errors import CheckpointError
from model.rope import rope_angles, rope_frequencies
from tests.checkpoints import DEMO, OFFICIAL_671B, YARN, facts, fp8_facts

OFFICIAL = json.loads((OFFICIAL_671B / "config.json").read_text())
ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000,
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}


def without(facts: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in keys}


def refusal(directory: Path, config: Any) -> CheckpointError:
    (directory / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(CheckpointError) as caught:
        ModelConfig.load(directory)
    message = str(caught.value)
    assert message.splitlines() == [message]
    assert str(directory) not in message
    assert caught.value.file == "config.json"
    return caught.value


@pytest.fixture(scope="module")
def official() -> ModelConfig:
    return ModelConfig.model_validate(OFFICIAL)


# --- Good configurations ---------------------------------------------------------------------


def test_the_official_configuration(official: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(OFFICIAL))
    assert ModelConfig.load(tmp_path) == official
    assert (official.qk_head_dim, official.latent_dim, official.group_size) == (192, 576, 32)
    assert official.num_cached_layers == 62
    assert [official.is_dense(layer) for layer in (0, 2, 3, 60, 61)] == [True, True, False, False, False]
    assert official.quantization_config is not None
    assert official.quantization_config.weight_block_size == (128, 128)
    assert official.quantization_config.scale_fmt == "ue8m0"


def test_the_demo_and_the_small_test_model() -> None:
    assert ModelConfig.load(DEMO).yarn is None
    assert ModelConfig.model_validate(facts()).quantization_config is None
    assert ModelConfig.model_validate(fp8_facts()).num_cached_layers == 4


def test_old_and_new_rope_keys_give_equal_configurations(official: ModelConfig) -> None:
    new = {**without(OFFICIAL, "rope_theta", "rope_scaling"), "rope_parameters": ROPE}
    assert ModelConfig.model_validate(new) == official
    renamed = {**OFFICIAL, "rope_scaling": {**without(OFFICIAL["rope_scaling"], "type"), "rope_type": "yarn"}}
    assert ModelConfig.model_validate(renamed) == official
    repeated = {**OFFICIAL, "rope_scaling": ROPE, "rope_parameters": ROPE}
    assert ModelConfig.model_validate(repeated) == official


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 500000, "rope_scaling": {}},
        {"rope_parameters": {"rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default", "rope_theta": 500000}},
    ],
)
def test_plain_rope_under_all_its_keys(rope: dict[str, Any]) -> None:
    expected = ModelConfig.model_validate(facts(rope_theta=5e5))
    assert ModelConfig.model_validate({**without(facts(), "rope_theta", "rope_scaling"), **rope}) == expected
    assert expected.yarn is None


def test_keys_that_no_arithmetic_uses_are_ignored(official: ModelConfig) -> None:
    assert ModelConfig.model_validate({**OFFICIAL, "initializer_range": "any", "x": [1]}) == official


def test_configurations_are_frozen(official: ModelConfig) -> None:
    with pytest.raises(ValidationError):
        official.vocab_size = 1  # type: ignore[misc]


# --- YaRN ------------------------------------------------------------------------------------


def test_official_softmax_scale(official: ModelConfig) -> None:
    assert official.softmax_scale == pytest.approx(0.1352337789, abs=5e-11)
    mscale = 0.1 * math.log(40) + 1
    assert official.softmax_scale == pytest.approx(192**-0.5 * mscale * mscale, rel=1e-12)


def test_plain_softmax_scale() -> None:
    assert ModelConfig.model_validate(facts()).softmax_scale == pytest.approx(40**-0.5, rel=1e-12)
    shrunk = facts(rope_scaling={**YARN, "factor": 0.5, "mscale": 0.5, "mscale_all_dim": 0.5})
    assert ModelConfig.model_validate(shrunk).softmax_scale == pytest.approx(40**-0.5, rel=1e-12)


def test_mscale_weighs_the_logarithm() -> None:
    yarn = Yarn(factor=8.0, original_max_position_embeddings=64, mscale=0.5, mscale_all_dim=0.5)
    assert yarn.attention_mscale == pytest.approx(0.05 * math.log(8) + 1, rel=1e-12)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (0, 1.0),
        (10, 0.0562341),
        (11, 0.0390069),
        (16, 0.0055),
        (22, 1.778279e-4),
        (23, 3.33380e-5),
        (31, 3.33380e-6),
    ],
)
def test_official_frequencies(index: int, value: float, official: ModelConfig) -> None:
    frequencies = rope_frequencies(official)
    assert frequencies.shape == (32,)
    assert frequencies.dtype == torch.float32
    assert frequencies[index].item() == pytest.approx(value, rel=2e-6)


def test_official_frequencies_in_float64(official: ModelConfig) -> None:
    """Unscaled to pair 10, a fortieth from pair 23, linear between."""
    for i, found in enumerate(rope_frequencies(official).tolist()):
        base = 10000 ** (-2 * i / 64)
        ramp = min(max((i - 10) / 13, 0), 1)
        assert found == pytest.approx(base * (1 - ramp) + base / 40 * ramp, rel=1e-6)


def test_plain_frequencies() -> None:
    frequencies = rope_frequencies(ModelConfig.model_validate(facts()))
    assert frequencies.tolist() == pytest.approx([10000 ** (-i / 8) for i in range(8)], rel=1e-6)


def test_a_ramp_that_starts_before_the_first_pair() -> None:
    """An original context of 8 tokens: even the fastest pair turns less than twice in it."""
    short = {**YARN, "original_max_position_embeddings": 8}
    config = ModelConfig.model_validate(facts(rope_scaling=short))
    high = math.ceil(16 * math.log(8 / (2 * math.pi)) / (2 * math.log(10000)))
    assert high == 1
    expected = [1.0, *(10000 ** (-i / 8) / 8 for i in range(1, 8))]
    assert rope_frequencies(config).tolist() == pytest.approx(expected, rel=1e-6)


def test_angles_are_position_times_frequency(official: ModelConfig) -> None:
    frequencies = rope_frequencies(official)
    positions = torch.tensor([0, 1, 7, 4096])
    cos, sin = rope_angles(frequencies, positions)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (4, 32)
    for row, position in enumerate(positions.tolist()):
        for i, frequency in enumerate(frequencies.tolist()):
            # The angle is a float32 product: half an ulp of 4096 is 2.4e-4 radians.
            assert cos[row, i].item() == pytest.approx(math.cos(position * frequency), abs=3e-4)
            assert sin[row, i].item() == pytest.approx(math.sin(position * frequency), abs=3e-4)
    assert (cos[0] == 1).all()
    assert (sin[0] == 0).all()


# --- Refusals --------------------------------------------------------------------------------

POSITIVE = [
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "max_position_embeddings",
]


@pytest.mark.parametrize("key", [*POSITIVE, "first_k_dense_replace", "model_type", "routed_scaling_factor"])
def test_a_missing_key_is_named(key: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, without(OFFICIAL, key))
    assert (error.what, error.expected, error.found) == (key, "a value", "no such key")


@pytest.mark.parametrize("key", POSITIVE)
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "greater than 0"),
        (-8, "greater than 0"),
        (1 << 31, "less than 2147483648"),
        ("64", "a valid integer"),
        (64.0, "a valid integer"),
        (True, "a valid integer"),
        (None, "a valid integer"),
        ([64], "a valid integer"),
    ],
)
def test_a_size_of_no_use_is_named(key: str, value: Any, expected: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, {**OFFICIAL, key: value})
    assert (error.what, error.expected, error.found) == (key, expected, json.dumps(value))


@pytest.mark.parametrize(
    ("change", "key", "expected", "found"),
    [
        # Kinds of models that this is not
        ({"model_type": "deepseek_v3"}, "model_type", "'deepseek_v32'", '"deepseek_v3"'),
        ({"scoring_func": "softmax"}, "scoring_func", "'sigmoid'", '"softmax"'),
        ({"topk_method": "greedy"}, "topk_method", "'noaux_tc'", '"greedy"'),
        ({"hidden_act": "gelu"}, "hidden_act", "'silu'", '"gelu"'),
        ({"moe_layer_freq": 2}, "moe_layer_freq", "1", "2"),
        ({"attention_bias": True}, "attention_bias", "False", "true"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings", "False", "true"),
        ({"indexer_rope_interleave": True}, "indexer_rope_interleave", "False", "true"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers", "less than or equal to 1", "2"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers", "greater than or equal to 0", "-1"),
        # Numbers
        ({"first_k_dense_replace": -1}, "first_k_dense_replace", "greater than or equal to 0", "-1"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim", "a multiple of 2", "63"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor", "greater than 0", "0"),
        ({"routed_scaling_factor": math.nan}, "routed_scaling_factor", "a finite number", "NaN"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps", "a finite number", "Infinity"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps", "greater than 0", "-1e-06"),
        ({"rope_theta": 1}, "rope_theta", "greater than 1", "1"),
        ({"rope_theta": "10000"}, "rope_theta", "a valid number", '"10000"'),
        ({"norm_topk_prob": 1}, "norm_topk_prob", "a valid boolean", "1"),
        # Contradictions
        ({"n_group": 7}, "n_routed_experts", "a multiple of n_group, 7", "256"),
        ({"n_group": 256, "topk_group": 256}, "n_routed_experts", "at least 2 for each n_group, 512", "256"),
        ({"topk_group": 9}, "topk_group", "at most n_group, 8", "9"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok", "at most the 128 experts", "129"),
        ({"first_k_dense_replace": 62}, "first_k_dense_replace", "at most num_hidden_layers, 61", "62"),
        ({"index_head_dim": 63}, "index_head_dim", "at least qk_rope_head_dim, 64", "63"),
        ({"eos_token_id": 129280}, "eos_token_id", "less than vocab_size, 129280", "129280"),
        ({"bos_token_id": 129280}, "bos_token_id", "less than vocab_size, 129280", "129280"),
        ({"eos_token_id": -1}, "eos_token_id", "greater than or equal to 0", "-1"),
        ({"eos_token_id": [1, 2]}, "eos_token_id", "a valid integer", "[1, 2]"),
        # Quantisation
        ({"quantization_config": {}}, "quantization_config.quant_method", "a value", "no such key"),
        ({"quantization_config": "fp8"}, "quantization_config", "an object or null", '"fp8"'),
        ({"quantization_config": [1]}, "quantization_config", "an object or null", "[1]"),
        ({"quantization_config": False}, "quantization_config", "an object or null", "false"),
        # RoPE
        ({"rope_scaling": [1]}, "rope_scaling", "an object or null", "[1]"),
        ({"rope_scaling": "yarn"}, "rope_scaling", "an object or null", '"yarn"'),
        ({"rope_parameters": 1}, "rope_parameters", "an object or null", "1"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.type", "'default' or 'yarn'", '"linear"'),
        ({"rope_scaling": {"type": None}}, "rope_scaling.type", "'default' or 'yarn'", "null"),
        (
            {"rope_scaling": {"rope_type": ["yarn"]}},
            "rope_scaling.rope_type",
            "'default' or 'yarn'",
            '["yarn"]',
        ),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}},
            "rope_parameters.rope_type",
            "'default' or 'yarn'",
            '"dynamic"',
        ),
        (
            {"rope_parameters": {**ROPE, "factor": 4}},
            "rope_scaling",
            "the same as rope_parameters",
            '{"type": "y',
        ),
        (
            {"rope_scaling": None, "rope_parameters": ROPE, "rope_theta": 5e5},
            "rope_theta",
            "the one of rope_parameters, 10000",
            "500000.0",
        ),
        (
            {"rope_scaling": None, "rope_parameters": without(ROPE, "factor")},
            "rope_parameters.factor",
            "a value",
            "no such key",
        ),
    ],
)
def test_a_value_of_no_use_is_named(
    change: dict[str, Any], key: str, expected: str, found: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, {**OFFICIAL, **change})
    assert error.what == key
    assert error.expected.startswith(expected)
    assert error.found.startswith(found)


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"quant_method": "gptq"}, "quant_method", "'fp8'"),
        ({"fmt": "e5m2"}, "fmt", "'e4m3'"),
        ({"activation_scheme": "static"}, "activation_scheme", "'dynamic'"),
        ({"scale_fmt": "fp16"}, "scale_fmt", "'ue8m0'"),
        ({"weight_block_size": [64, 128]}, "weight_block_size.0", "128"),
        ({"weight_block_size": [128]}, "weight_block_size.1", "a value"),
        ({"weight_block_size": 128}, "weight_block_size", "a valid tuple"),
    ],
)
def test_a_quantisation_of_no_use_is_named(
    change: dict[str, Any], key: str, expected: str, tmp_path: Path
) -> None:
    changed = {**OFFICIAL["quantization_config"], **change}
    error = refusal(tmp_path, {**OFFICIAL, "quantization_config": changed})
    assert (error.what, error.expected) == (f"quantization_config.{key}", expected)


@pytest.mark.parametrize(
    ("change", "key", "expected"),
    [
        ({"factor": 0}, "factor", "greater than 0"),
        ({"factor": None}, "factor", "a valid number"),
        ({"factor": math.inf}, "factor", "a finite number"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings", "greater than 0"),
        ({"original_max_position_embeddings": 64.5}, "original_max_position_embeddings", "a valid integer"),
        ({"beta_fast": 0}, "beta_fast", "greater than 0"),
        ({"beta_slow": -1}, "beta_slow", "greater than 0"),
        ({"beta_fast": 1, "beta_slow": 32}, "beta_fast", "at least the beta_slow, 32.0"),
        # Another arithmetic: these put a factor on cos and sin, or cut the ramp differently.
        ({"mscale": 0.707}, "mscale", "the mscale_all_dim, 1.0"),
        ({"mscale_all_dim": 0}, "mscale_all_dim", "greater than 0"),
        ({"attention_factor": 1.2}, "attention_factor", "less than or equal to 1"),
        ({"truncate": False}, "truncate", "True"),
    ],
)
def test_a_yarn_of_no_use_is_named(change: dict[str, Any], key: str, expected: str, tmp_path: Path) -> None:
    error = refusal(tmp_path, {**OFFICIAL, "rope_scaling": {**OFFICIAL["rope_scaling"], **change}})
    assert (error.what, error.expected) == (f"rope_scaling.{key}", expected)


@pytest.mark.parametrize("key", ["factor", "original_max_position_embeddings", "mscale", "mscale_all_dim"])
def test_a_missing_key_of_yarn_is_named(key: str, tmp_path: Path) -> None:
    """Without mscale_all_dim other implementations scale cos and sin, which is not what is served here."""
    error = refusal(tmp_path, {**OFFICIAL, "rope_scaling": without(OFFICIAL["rope_scaling"], key)})
    assert (error.what, error.expected) == (f"rope_scaling.{key}", "a value")


@pytest.mark.parametrize(
    ("content", "what", "expected", "found"),
    [
        ("", "", "JSON", "bytes that start b''"),
        ("{", "", "JSON", "bytes that start b'{'"),
        ("\ufeff{}", "", "JSON", "bytes that start"),
        ("[1]", "", "a JSON object", "list"),
        ("null", "", "a JSON object", "NoneType"),
        ('{"vocab_size": 1, "vocab_size": 2}', "vocab_size", "each name once", "the name twice"),
        ('{"a\\nb": 1, "a\\nb": 2}', r"a\nb", "each name once", "the name twice"),
        ("[" * 100_000, "", "JSON", "bytes that start"),
    ],
)
def test_a_file_of_no_use_is_named(
    content: str, what: str, expected: str, found: str, tmp_path: Path
) -> None:
    error = refusal(tmp_path, content)
    assert (error.what, error.expected) == (what, expected)
    assert error.found.startswith(found)


@pytest.mark.parametrize("key", ["vocab_size", "rope_scaling"])
def test_nesting_around_the_limit_of_recursion(key: str, tmp_path: Path) -> None:
    """The parser, the rules and the message would each give up at some depth; the parser is the first."""
    for depth in [*range(300, 980, 40), *range(980, 1000)]:
        nested = '{"rope_type":' * depth + "1" + "}" * depth
        refusal(tmp_path, json.dumps(without(OFFICIAL, key))[:-1] + f', "{key}": {nested}}}')


def test_a_directory_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match=r"^config\.json: expected the model's configuration, found "):
        ModelConfig.load(tmp_path)

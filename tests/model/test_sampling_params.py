import math
from dataclasses import replace
from typing import Any

import pytest

from model.errors import RequestError
from model.sampling_params import SamplingParams, logit_bias_pairs

NOT_NUMBERS = [math.nan, math.inf, -math.inf, True, "1", None, [1]]
BAD_VALUES: dict[str, list[Any]] = {
    "max_tokens": [0, -1, 1.0, math.nan, True, "5", None],
    "temperature": [-0.01, 2.01, 10**400, *NOT_NUMBERS],
    "top_p": [-0.1, 1.1, *NOT_NUMBERS],
    "top_k": [-1, 1.0, True, "5", None],
    "min_p": [-0.1, 1.1, *NOT_NUMBERS],
    "frequency_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "presence_penalty": [-2.1, 2.1, *NOT_NUMBERS],
    "repetition_penalty": [0, 0.05, 10.1, *NOT_NUMBERS],
    "logit_bias": [
        {5: 1.0},
        [(5, 1.0)],
        (5, 1.0),
        ((5,),),
        ((-1, 1.0),),
        (("5", 1.0),),
        ((True, 1.0),),
        ((5, 1.0), (5, 2.0)),
        ((6, 1.0), (5, 2.0)),
        ((5, 100.1),),
        *(((5, value),) for value in NOT_NUMBERS),
        tuple((i, 0.0) for i in range(1025)),
    ],
    "stop": ["stop", ["stop"], (b"stop",), ("",), ("a", ""), ("\ud800",), ("é" * 129,), ("a",) * 17, None],
    "stop_token_ids": [[1], 1, (-1,), (1.0,), (True,), ("1",), (1,) * 257],
    "ignore_eos": [0, 1, "true", None],
    "seed": [-(2**63) - 1, 2**64, 1.0, True, "7", None, 10**5000],
    "n": [0, 9, 1.0, True, "2", None],
    "logprobs": [-1, 21, 5.0, True, "5"],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(field, value, id=f"{field}-{i}")
        for field, values in BAD_VALUES.items()
        for i, value in enumerate(values)
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"max_tokens": 5, field: value})
    assert caught.value.field == field
    assert 10 < len(caught.value.problem) < 200
    assert caught.value.problem.isprintable()


@pytest.mark.parametrize(
    ("params", "text"),
    [
        ({"n": 9}, "n: is 9; it takes an integer from 1 to 8: send several requests for more choices"),
        (
            {"temperature": math.nan},
            "temperature: is nan; it takes a number from 0 to 2: "
            "0 is greedy, 1 is the model's own distribution",
        ),
        ({"stop": ("a" * 257,)}, "stop: holds a string of 257 bytes; send at most 256"),
        ({"seed": 2**64}, "seed: is an integer of 65 bits; it takes an integer from -9223372036854775808 to "
         "18446744073709551615: any 64-bit number will do"),
    ],
)  # fmt: skip
def test_refusals_say_value_limit_and_cure(params: dict[str, Any], text: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{"max_tokens": 5, **params})
    assert str(caught.value) == text


def test_every_field_has_its_refusals() -> None:
    assert BAD_VALUES.keys() == set(SamplingParams.__dataclass_fields__)


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 2, "top_p": 0, "min_p": 1, "frequency_penalty": -2, "presence_penalty": 2.0},
        {"repetition_penalty": 0.1, "logit_bias": tuple((i, -100) for i in range(1024))},
        {"stop": ("é" * 128,) * 16, "stop_token_ids": tuple(range(256)), "ignore_eos": True},
        {"seed": -(2**63), "n": 8, "logprobs": 20, "top_k": 10**30},
        {"seed": 2**64 - 1, "n": 1, "logprobs": 0},
    ],
    ids=["numbers", "bias", "stops", "integers", "other ends"],
)
def test_values_at_their_limits_are_taken(params: dict[str, Any]) -> None:
    taken = SamplingParams(max_tokens=1, **params)
    assert {field: getattr(taken, field) for field in params} == params
    assert hash(taken) == hash(replace(taken))


@pytest.mark.parametrize("field", ["logit_bias", "stop_token_ids"])
def test_check_vocab(field: str) -> None:
    params = SamplingParams(max_tokens=1, **{field: ((9, 1.0),) if field == "logit_bias" else (9,)})
    params.check_vocab(10)
    with pytest.raises(RequestError, match="names token 9; this model's ids go from 0 to 8") as caught:
        params.check_vocab(9)
    assert caught.value.field == field


def test_logit_bias_pairs_sorts_and_reads_json_keys() -> None:
    assert logit_bias_pairs({"50": 1, 7: -2.5, "6": 0}) == ((6, 0), (7, -2.5), (50, 1))


@pytest.mark.parametrize(
    "bias",
    [
        {"x": 1.0},
        {"": 1.0},
        {"-1": 1.0},
        {"1_0": 1.0},
        {" 1": 1.0},
        {"٣": 1.0},
        {"1.0": 1.0},
        {"1" * 5000: 1.0},
        {True: 1.0},
        {1.5: 1.0},
        {7: 1.0, "7": 1.0},
        {"07": 1.0, "7": 1.0},
        dict.fromkeys(range(1025), 0.0),
    ],
    ids=lambda bias: repr(bias)[:20],
)
def test_logit_bias_pairs_refuses(bias: Any) -> None:
    with pytest.raises(RequestError) as caught:
        logit_bias_pairs(bias)
    assert caught.value.field == "logit_bias"
    assert len(caught.value.problem) < 200

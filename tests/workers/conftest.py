import json
from dataclasses import dataclass

import pytest

from tests.checkpoints import DEMO
from workers.local import LocalModel, ModelOptions


@dataclass(frozen=True)
class OraclePrompt:
    """One prompt of the demo's oracle and its 32 greedy tokens, end of sequence ignored."""

    name: str
    prompt_ids: tuple[int, ...]
    output_ids: list[int]


@pytest.fixture(scope="session")
def demo() -> LocalModel:
    return LocalModel(DEMO, ModelOptions())


@pytest.fixture(scope="session")
def oracle() -> dict[str, OraclePrompt]:
    from model.tokenizer import Tokenizer

    encode = Tokenizer.load(DEMO).encode
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    return {
        prompt["name"]: OraclePrompt(prompt["name"], tuple(encode(prompt["prompt"])), prompt["output_ids"])
        for prompt in prompts
    }

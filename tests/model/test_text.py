"""The text side of a checkpoint is checked as a whole."""

import json
import shutil
from pathlib import Path

import pytest

from model.chat.encoding import ChatEncoding
from model.config import ModelConfig
from model.errors import CheckpointError
from model.text import load_text
from tests.checkpoints import DEMO

CONFIG = ModelConfig.load(DEMO)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, tmp_path)
    return tmp_path


def change_config(directory: Path, **changes: object) -> None:
    path = directory / "tokenizer_config.json"
    facts = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in facts.items() if value is not None}))


def test_the_demo_is_in_order(directory: Path) -> None:
    tokenizer, encoding = load_text(directory, CONFIG)
    assert tokenizer.vocab_size == CONFIG.vocab_size
    assert encoding is ChatEncoding.EXP


def test_without_a_template_the_encoding_is_decembers(directory: Path) -> None:
    change_config(directory, chat_template=None)
    assert load_text(directory, CONFIG)[1] is ChatEncoding.DSML


def test_a_template_that_says_something_else_is_refused(directory: Path) -> None:
    change_config(
        directory, chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(CheckpointError, match="chat_template"):
        load_text(directory, CONFIG)


def test_a_tokenizer_larger_than_the_embedding_is_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match="8000 ids"):
        load_text(directory, CONFIG.model_copy(update={"vocab_size": 8000}))

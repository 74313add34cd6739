"""Serving is measured from outside: the demo, a few tokens, two clients."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.serve import Load, Seen, as_round, measure, table, write_tokenizer
from model.config import ModelConfig
from model.text import load_text
from model.tokenizer import Detokenizer
from tests.checkpoints import DEMO, OFFICIAL_671B


def test_clients_of_the_demo() -> None:
    loads = [Load(1, 20, 4), Load(2, 20, 4)]
    one, two = asyncio.run(measure({"directory": DEMO}, loads))
    assert (one.streams, two.streams) == (1, 2)
    for found in (one, two):
        assert found.prompt_tokens_per_second == pytest.approx(5 * found.output_tokens_per_second)
        assert 0 < found.first_token_p50_ms <= found.first_token_p99_ms
        assert 0 < found.between_tokens_p50_ms <= found.between_tokens_p99_ms
    assert table([one, two]).splitlines()[2].split()[0] == "2"


def test_the_figures_of_a_round() -> None:
    found = as_round(Load(2, 100, 3), 2.0, [Seen([0.1, 0.2, 0.4], 3), Seen([0.3, 0.5, 0.6], 3)])
    assert (found.output_tokens_per_second, found.prompt_tokens_per_second) == (3, 100)
    assert found.first_token_p50_ms == pytest.approx(200)
    assert found.first_token_p99_ms == pytest.approx(300)
    assert found.between_tokens_p50_ms == pytest.approx(150)
    assert found.between_tokens_p99_ms == pytest.approx(200)


def test_every_id_of_the_full_width_has_text(tmp_path: Path) -> None:
    config = ModelConfig.load(OFFICIAL_671B)
    write_tokenizer(tmp_path, config.vocab_size)
    tokenizer, _ = load_text(tmp_path, config)
    assert tokenizer.vocab_size == config.vocab_size
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(129_279) == " 129279:"
    demo, _ = load_text(DEMO, ModelConfig.load(DEMO))
    assert tokenizer.encode("harbor</think>") == demo.encode("harbor</think>")
    assert all(tokenizer.token_bytes(number) for number in range(config.vocab_size))

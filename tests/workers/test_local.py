"""A model by its options: where its weights come from."""

from pathlib import Path

import pytest

from model.config import ModelConfig
from model.decoder import DTYPES
from model.errors import CheckpointError
from model.random_weights import RandomCheckpoint
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from workers.engine import EngineConfig
from workers.experts import load_experts
from workers.local import LocalModel, ModelOptions, open_checkpoint
from workers.sequence import Request

OPTIONS = ModelOptions(weights="random", layers=3)


def tokens(model: LocalModel) -> list[int]:
    engine, found = model.engine(EngineConfig(num_drafts=1), 512), []
    engine.add(Request("one", tuple(range(400)), SamplingParams(max_tokens=8, ignore_eos=True)))
    while not engine.is_idle:
        found += [token.token_id for token in engine.step()]
    return found


def test_experts_that_are_drawn_elsewhere_are_the_same() -> None:
    checkpoint = open_checkpoint(DEMO, OPTIONS)
    groups = range(checkpoint.config.n_group)
    elsewhere = load_experts(checkpoint, groups, DTYPES[OPTIONS.dtype], OPTIONS.kernels)
    here, apart = LocalModel(DEMO, OPTIONS), LocalModel(DEMO, OPTIONS, experts=elsewhere)
    assert tokens(here) == tokens(apart)
    assert here.checkpoint.digest == apart.checkpoint.digest == checkpoint.digest


def test_nothing_but_a_configuration_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((DEMO / "config.json").read_bytes())
    model = LocalModel(tmp_path, OPTIONS)
    assert isinstance(model.checkpoint, RandomCheckpoint)
    assert model.config.num_hidden_layers == 3 < ModelConfig.load(DEMO).num_hidden_layers
    with pytest.raises(CheckpointError, match="safetensors"):
        LocalModel(tmp_path, ModelOptions())

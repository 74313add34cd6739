"""Attention workers: one prefills, another decodes, and the tokens are those of one engine."""

import time

import pytest

from model.sampling_params import SamplingParams
from tests.workers.workers import client, running
from workers.engine import EngineConfig
from workers.local import LocalModel
from workers.sequence import Request


def greedy(max_tokens: int = 32) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


@pytest.mark.parametrize(("chunk", "num_drafts"), [(2048, 0), (100, 2), (64, 1)])
def test_pages_survive_the_hand_over(demo: LocalModel, oracle, chunk: int, num_drafts: int) -> None:
    config = EngineConfig(chunk=chunk, num_drafts=num_drafts)
    names = ["chat", "code", "lookup_300", "lookup_1000"]
    with (
        running(demo, "prefill", "prefill", config=config) as prefill,
        running(demo, "decode", "decode", config=config) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for name in names:
            reader.generate(Request(name, oracle[name].prompt_ids, greedy()), prefill, decode)
        answers = reader.answers(*names)
    for name in names:
        assert answers[name] == oracle[name].output_ids
        assert reader.heard_from[name] == {"prefill", "decode"}

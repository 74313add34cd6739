"""The expert pool on a Ray of the test's own: the oracle's tokens through eight actors, and one that dies."""

import json
import time
from collections.abc import Iterator

import pytest
import ray

from cluster.expert_pool import ExpertPool
from cluster.ray_runtime import local_ray
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from workers.dispatch import RemoteExperts
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]  # Ray warns of much


@pytest.fixture(scope="module")
def pool() -> Iterator[ExpertPool]:
    with local_ray(num_cpus=2):
        pool = ExpertPool(DEMO, 8)
        yield pool
        pool.close()


@pytest.fixture(scope="module")
def experts(pool: ExpertPool) -> Iterator[RemoteExperts]:
    endpoint = PeerEndpoint(EndpointConfig("attention", pool.token))
    yield RemoteExperts(endpoint, pool, topk_group=4, layer_seconds=60.0)
    endpoint.close()


@pytest.fixture(scope="module")
def model(experts: RemoteExperts) -> LocalModel:
    return LocalModel(DEMO, ModelOptions(), experts=experts)


def oracle(name: str) -> tuple[tuple[int, ...], list[int]]:
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    found = next(prompt for prompt in prompts if prompt["name"] == name)
    return tuple(Tokenizer.load(DEMO).encode(found["prompt"])), found["output_ids"]


def answer(engine: Engine, prompt_ids: tuple[int, ...], uid: str) -> list[int]:
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    engine.add(Request(uid, prompt_ids, params))
    tokens: list[int] = []
    try:
        while not engine.is_idle:
            tokens += [token.token_id for token in engine.step()]
    finally:
        engine.cancel(uid)
    return tokens


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_eight_actors_give_the_tokens_of_one_process(
    model: LocalModel, experts: RemoteExperts, num_drafts: int
) -> None:
    engine = model.engine(EngineConfig(num_drafts=num_drafts), 1024)
    for name in ("chat", "lookup_300"):
        prompt_ids, expected = oracle(name)
        assert answer(engine, prompt_ids, name) == expected
    assert 0 < experts.stats.most_nodes <= 4
    assert experts.stats.copies <= 4 * experts.stats.tokens


def test_a_killed_actor_costs_a_pause_and_no_token(
    model: LocalModel, pool: ExpertPool, experts: RemoteExperts
) -> None:
    prompt_ids, expected = oracle("code")
    engine = model.engine(EngineConfig(), 256)
    assert answer(engine, prompt_ids, "before") == expected
    epoch = pool.current().epoch
    ray.kill(pool._actors[3])
    deadline = time.monotonic() + 60
    while pool.current().epoch == epoch:
        assert time.monotonic() < deadline, "no new actor within a minute"
        assert answer(engine, prompt_ids, "meanwhile") == expected
    assert experts.stats.retries > 0
    assert answer(engine, prompt_ids, "after") == expected
    assert len(pool.stats()) == 8
    engine.pool.check_idle()


def test_actors_that_take_too_long_are_given_up_and_the_key_is_named(pool: ExpertPool) -> None:
    problem = r"expert actors did not come up within 0\.01 s; ray\.start_seconds may allow more"
    with pytest.raises(TimeoutError, match=problem):
        ExpertPool(DEMO, 2, start_seconds=0.01)

"""An engine whose steps run as two micro-batches, its experts elsewhere: tokens, and failures on the way."""

import signal
from collections.abc import Callable

import pytest

from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from tests.workers.conftest import OraclePrompt
from tests.workers.expert_pool import Pool, process_pool, thread_pool
from workers.dispatch import WorkerLost
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.schedule import Batch
from workers.sequence import Request
from workers.transport.protocol import DeadlineExceeded

NAMES = ["chat", "lookup_300", "code"]


def engine_over(pool: Pool, oracle: dict[str, OraclePrompt], num_drafts: int = 0) -> Engine:
    """An engine that has taken on some of the oracle's prompts."""
    model = LocalModel(DEMO, ModelOptions(), experts=pool.experts)
    engine = model.engine(EngineConfig(chunk=200, num_drafts=num_drafts, micro_batches=2), 2048)
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    for name in NAMES:
        engine.add(Request(name, oracle[name].prompt_ids, params))
    return engine


def check(engine: Engine, pool: Pool, oracle: dict[str, OraclePrompt], answers: dict[str, list[int]]) -> None:
    """Step to the end: all answers are the oracle's, and nothing is left anywhere."""
    while not engine.is_idle:
        for token in engine.step():
            answers[token.uid].append(token.token_id)
    assert answers == {name: oracle[name].output_ids for name in NAMES}
    assert pool.experts._pending == {}
    engine.pool.check_idle()


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_the_answers_are_the_oracles(oracle: dict[str, OraclePrompt], num_drafts: int) -> None:
    with thread_pool(4) as pool:
        check(engine_over(pool, oracle, num_drafts), pool, oracle, {name: [] for name in NAMES})


def at_layer(layer: int, half: int, act: Callable[[], None]) -> Callable[[Batch, int], None]:
    """Acts once, when a half of the step has been through the attention of a layer and is at its experts."""
    calls: list[Batch] = []

    def on_layer(batch: Batch, number: int) -> None:
        if number == layer:
            calls.append(batch)
            if len(calls) == half:
                act()

    return on_layer


@pytest.mark.parametrize("half", [1, 2])
def test_a_frozen_expert_fails_the_step_and_not_the_next(oracle: dict[str, OraclePrompt], half: int) -> None:
    """Its late answers to both micro-batches are for nobody."""
    answers: dict[str, list[int]] = {name: [] for name in NAMES}
    with process_pool(["shared_memory", "tcp"], layer_seconds=1.0) as (pool, processes):
        engine = engine_over(pool, oracle)
        for _ in range(6):
            for token in engine.step():
                answers[token.uid].append(token.token_id)
        assert len(engine.running_uids) == 3
        for frozen in processes:
            with pytest.raises(DeadlineExceeded, match=frozen.address.name):
                engine.step(at_layer(3, half, lambda frozen=frozen: frozen.signal(signal.SIGSTOP)))
            assert pool.experts._pending == {}
            frozen.signal(signal.SIGCONT)
        check(engine, pool, oracle, answers)


@pytest.mark.parametrize("half", [1, 2])
def test_an_expert_killed_in_the_middle_is_lost(oracle: dict[str, OraclePrompt], half: int) -> None:
    with process_pool(["shared_memory", "shared_memory"], layer_seconds=1.0) as (pool, processes):
        engine = engine_over(pool, oracle)
        for _ in range(4):
            engine.step()

        def kill() -> None:
            processes[1].signal(signal.SIGSTOP)  # so that it does not answer before
            processes[1].signal(signal.SIGKILL)

        with pytest.raises(WorkerLost) as caught:
            engine.step(at_layer(2, half, kill))
        assert caught.value.peer == "worker 1"
        assert pool.experts._pending == {}
        with pytest.raises(WorkerLost):
            engine.step()
        assert pool.experts._pending == {}

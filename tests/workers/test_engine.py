"""The single-process engine on the demo: the oracle's tokens, whatever else runs and however it is cut."""

from unittest.mock import Mock

import pytest
import torch

from model.errors import PromptTooLong, RequestError
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from workers.allocation import Wait
from workers.engine import Engine, EngineConfig, NumericalFailure
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request, Sequence, Token


def greedy(max_tokens: int = 32, **overrides: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **overrides)


def drain(engine: Engine) -> dict[str, list[Token]]:
    """Step to the end; tokens by request."""
    tokens: dict[str, list[Token]] = {}
    while not engine.is_idle:
        for token in engine.step():
            tokens.setdefault(token.uid, []).append(token)
    engine.pool.check_idle()
    return tokens


def ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


@pytest.mark.parametrize("chunk", [7, 64, 2048])
def test_chunks_do_not_change_the_answer(demo: LocalModel, oracle, chunk: int) -> None:
    engine = demo.engine(EngineConfig(chunk=chunk), 2048)
    prompt = oracle["lookup_300"]
    engine.add(Request("r", prompt.prompt_ids, greedy()))
    assert ids(drain(engine)["r"]) == prompt.output_ids


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_requests_run_together_as_they_do_alone(demo: LocalModel, oracle, num_drafts: int) -> None:
    engine = demo.engine(EngineConfig(chunk=100, num_drafts=num_drafts), 4096)
    names = ["chat", "lookup_1000", "code", "lookup_300"]
    for name in names:
        engine.add(Request(name, oracle[name].prompt_ids, greedy()))
    tokens = drain(engine)
    for name in names:
        assert ids(tokens[name]) == oracle[name].output_ids
        assert [token.position for token in tokens[name]] == list(
            range(len(oracle[name].prompt_ids), len(oracle[name].prompt_ids) + 32)
        )


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_two_micro_batches_change_no_token(demo: LocalModel, oracle, num_drafts: int) -> None:
    config = EngineConfig(chunk=100, num_drafts=num_drafts, micro_batches=2)
    engine = demo.engine(config, 4096)
    names = ["chat", "lookup_1000", "code", "lookup_300"]
    for name in names:
        engine.add(Request(name, oracle[name].prompt_ids, greedy()))
    tokens = drain(engine)
    assert {name: ids(tokens[name]) for name in names} == {name: oracle[name].output_ids for name in names}


def test_two_micro_batches_change_no_bit_of_the_deterministic_kernels(oracle) -> None:
    """Log-probabilities of sampled tokens, and acceptance of drafts, are those of one."""
    model = LocalModel(DEMO, ModelOptions(pages="fp8", kernels="deterministic"))
    outcomes = []
    for micro_batches in (1, 2):
        config = EngineConfig(chunk=90, num_drafts=2, micro_batches=micro_batches)
        engine = model.engine(config, 2048)
        for number, name in enumerate(["chat", "lookup_300", "code"]):
            params = SamplingParams(max_tokens=12, temperature=0.8, seed=number, logprobs=3, ignore_eos=True)
            engine.add(Request(name, oracle[name].prompt_ids, params))
        outcomes.append((drain(engine), engine.acceptance))
    assert outcomes[0] == outcomes[1]


def test_each_micro_batch_is_told_of_its_own_layers(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(chunk=100, micro_batches=2), 2048)
    for name in ("chat", "lookup_300", "code"):
        engine.add(Request(name, oracle[name].prompt_ids, greedy(2)))
    told: list[tuple[int, list[str]]] = []
    engine.step(
        lambda batch, layer: told.append((layer, [share.sequence.request.uid for share in batch.shares]))
    )
    halves = [["chat"], ["lookup_300"]]  # the third has to wait for the next step
    assert told == [(layer, half) for layer in range(6) for half in halves]


def test_requests_wait_for_pages_and_all_get_them(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(), 128)  # two pages: one request at a time
    for uid in "abc":
        engine.add(Request(uid, oracle["code"].prompt_ids, greedy(64)))
    first = engine.step()
    assert engine.pool.num_free == 0
    tokens = drain(engine)
    tokens["a"] = first + tokens["a"]
    assert list(tokens) == ["a", "b", "c"]
    assert all(ids(tokens[uid])[:32] == oracle["code"].output_ids for uid in "abc")


def test_the_end_of_sequence_ends_the_answer_and_is_its_last_token(demo: LocalModel, oracle) -> None:
    prompt = oracle["chat"]
    engine = demo.engine(EngineConfig(num_drafts=3), 256)
    engine.add(Request("r", prompt.prompt_ids, SamplingParams(max_tokens=100, temperature=0)))
    tokens = drain(engine)["r"]
    eos = demo.config.eos_token_id
    assert ids(tokens) == prompt.output_ids[: prompt.output_ids.index(eos) + 1]
    assert [token.finish_reason for token in tokens] == [None] * (len(tokens) - 1) + ["stop"]


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("max_tokens", [1, 2, 3, 4, 5])
def test_an_answer_never_grows_beyond_max_tokens(
    demo: LocalModel, oracle, num_drafts: int, max_tokens: int
) -> None:
    engine = demo.engine(EngineConfig(num_drafts=num_drafts), 64)
    engine.add(Request("r", oracle["code"].prompt_ids, greedy(max_tokens)))
    tokens = drain(engine)["r"]
    assert ids(tokens) == oracle["code"].output_ids[:max_tokens]
    assert tokens[-1].finish_reason == "length"


def test_an_answer_may_fill_the_last_slot_of_its_pages(demo: LocalModel, oracle) -> None:
    prompt = oracle["code"].prompt_ids
    engine = demo.engine(EngineConfig(num_drafts=3), 64)
    engine.add(Request("r", prompt, greedy(64 - len(prompt))))
    assert len(drain(engine)["r"]) == 64 - len(prompt)


def test_cancelling_frees_the_pages_at_once(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(chunk=16, num_drafts=1), 1024)
    engine.add(Request("prefilling", oracle["lookup_300"].prompt_ids, greedy()))
    engine.add(Request("decoding", oracle["chat"].prompt_ids, greedy()))
    engine.step()
    engine.cancel("prefilling")
    engine.step()
    engine.cancel("decoding")
    engine.cancel("never heard of")
    assert engine.is_idle
    engine.pool.check_idle()


def test_who_ends_in_a_step_that_fails_still_runs(
    demo: LocalModel, oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody has seen the last token, so whoever fails the running requests must find this one too."""
    engine = demo.engine(EngineConfig(num_drafts=1), 1024)
    engine.add(Request("ends", oracle["code"].prompt_ids, greedy(1)))
    engine.add(Request("is handed over", oracle["chat"].prompt_ids, greedy()), hand_over=True)
    engine.add(Request("goes on", oracle["lookup_300"].prompt_ids, greedy()))
    monkeypatch.setattr(engine._runner, "draft", Mock(side_effect=ConnectionError))
    with pytest.raises(ConnectionError):
        engine.step()
    assert engine.running_uids == ["ends", "is handed over", "goes on"]
    for uid in engine.running_uids:
        engine.cancel(uid)
    engine.pool.check_idle()


def test_pages_of_a_request_that_failed_are_not_found_again(demo: LocalModel, oracle) -> None:
    cache = demo.cache(1024)
    engine = Engine(demo.decoder, cache, EngineConfig())
    prompt = oracle["lookup_300"]
    engine.add(Request("r", prompt.prompt_ids, greedy(4)))
    engine.step()
    cache.layers[0].latents[engine._running["r"].pages[0]] = torch.nan
    with pytest.raises(NumericalFailure):
        engine.step()
    engine.add(Request("r", prompt.prompt_ids, greedy(4)))
    assert ids(drain(engine)["r"]) == prompt.output_ids[:4]
    assert not engine.num_hit_tokens


def test_logprobs_come_with_the_tokens(demo: LocalModel, oracle) -> None:
    engine = demo.engine(EngineConfig(num_drafts=2), 256)
    engine.add(Request("r", oracle["chat"].prompt_ids, greedy(8, logprobs=3)))
    for token in drain(engine)["r"]:
        assert token.logprobs is not None
        assert token.logprobs.top[0] == (token.token_id, token.logprobs.logprob)  # greedy takes the best
        assert len(token.logprobs.top) == 3
        assert token.logprobs.logprob <= 0


@pytest.mark.parametrize(
    ("prompt_ids", "params", "error", "says"),
    [
        ((), greedy(), RequestError, "empty"),
        ((0, 8192), greedy(), RequestError, "8192"),
        ((0, -1), greedy(), RequestError, "-1"),
        ((0,) * 128, greedy(), PromptTooLong, "128"),
        ((0,) * 100, greedy(29), RequestError, "28 more"),
        ((0,), greedy(stop_token_ids=(9000,)), RequestError, "9000"),
    ],
)
def test_requests_that_can_never_run_are_refused(
    demo: LocalModel, prompt_ids: tuple[int, ...], params: SamplingParams, error: type, says: str
) -> None:
    engine = demo.engine(EngineConfig(), 128)
    with pytest.raises(error, match=says):
        engine.add(Request("r", prompt_ids, params))
    assert engine.is_idle


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"chunk": 0}, "chunk"),
        ({"num_drafts": 4}, "drafts"),
        ({"num_drafts": -1}, "drafts"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"micro_batches": 4}, "micro_batches"),
        ({"sequences": 0}, "sequences"),
    ],
)
def test_bad_engine_configurations_are_refused(config: dict[str, int], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        EngineConfig(**config)
    assert caught.value.field == field


def test_no_more_sequences_run_at_once_than_there_are_seats(demo: LocalModel, oracle) -> None:
    """Those that are reserved for have a seat too; the others wait, and all get their answers."""
    engine = demo.engine(EngineConfig(sequences=2), 4096)
    prompt = oracle["code"].prompt_ids
    assert isinstance(engine.reserve(Request("reserved", prompt, greedy(3))), Sequence)
    for uid in ("a", "b", "c"):
        engine.add(Request(uid, oracle["chat"].prompt_ids, greedy(3)))
    tokens = engine.step()
    assert engine.running_uids == ["a"]
    assert engine.reserve(Request("more", prompt, greedy(3))) is Wait.FOR_ROOM
    engine.cancel("reserved")
    tokens += engine.step()
    assert engine.running_uids == ["a", "b"]
    while not engine.is_idle:
        tokens += engine.step()
    answers = {uid: [token.token_id for token in tokens if token.uid == uid] for uid in ("a", "b", "c")}
    assert answers == dict.fromkeys(("a", "b", "c"), oracle["chat"].output_ids[:3])
    engine.pool.check_idle()

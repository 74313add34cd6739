"""An engine whose decode steps are graphs and are launched ahead: tokens, pages and failures of one without.

Graphs are replaced by what they record, so everything runs in the order in which a device would run it.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from model.graphs import DecodeGraphs
from model.inputs import PAGE_SIZE
from model.pages import PageCache
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from tests.model.fused.test_fused import fused, new_cache
from tests.model.test_graphs import again
from workers.engine import Engine, EngineConfig, NumericalFailure
from workers.local import LocalModel, ModelOptions
from workers.runner import Flight
from workers.sequence import Request, Sequence, Token

NAMES = ["chat", "lookup_300", "code"]
NUM_TOKENS = 2048


def engines(config: EngineConfig) -> tuple[Engine, Engine, PageCache]:
    """One with graphs and one without, and the pages of the former."""
    decoder, cache = fused(), new_cache(fused(), NUM_TOKENS)
    graphs = DecodeGraphs(decoder, cache, again)
    without = Engine(decoder, new_cache(decoder, NUM_TOKENS), config)
    return Engine(decoder, cache, config, graphs=graphs), without, cache


def drain(engine: Engine, between: Callable[[int], None] = lambda step: None) -> dict[str, list[Token]]:
    """Step to the end; tokens by request."""
    tokens: dict[str, list[Token]] = {}
    step = 0
    while not engine.is_idle:
        for token in engine.step():
            tokens.setdefault(token.uid, []).append(token)
        step += 1
        between(step)
    engine.pool.check_idle()
    return tokens


def mixed(number: int, max_tokens: int) -> SamplingParams:
    """Greedy, from the whole vocabulary, from part of it."""
    kinds: list[dict[str, float]] = [{"temperature": 0}, {}, {"top_p": 0.9}]
    return SamplingParams(max_tokens=max_tokens, seed=number, ignore_eos=True, **kinds[number % 3])


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
def test_tokens_are_those_of_an_engine_without_graphs(oracle, num_drafts: int) -> None:
    """Requests of other lengths that come one after the other, so that steps with prompts lie between."""
    answers, acceptances = [], []
    for engine in engines(EngineConfig(chunk=200, num_drafts=num_drafts))[:2]:
        engine.add(Request("first", oracle["chat"].prompt_ids, mixed(0, 12)))

        def more(step: int, engine: Engine = engine) -> None:
            if step in (3, 7):
                for number, name in enumerate(NAMES):
                    uid = f"{name} {step}"
                    engine.add(Request(uid, oracle[name].prompt_ids, mixed(number, 3 + number + step)))

        answers.append(drain(engine, more))
        acceptances.append(engine.acceptance)
    assert len(answers[0]) == 7
    assert answers[0] == answers[1]
    assert acceptances[0] == acceptances[1], "drafts that nobody read are verified all the same"
    assert sum(acceptances[0].accepted) > 0 or not num_drafts


def test_a_step_is_launched_ahead_of_the_tokens_before_it(oracle) -> None:
    engine = engines(EngineConfig())[0]
    engine.add(Request("r", oracle["code"].prompt_ids, mixed(0, 6)))
    assert len(engine.step()) == 1
    launched = engine._flight
    assert launched is None, "the first token is a prompt's"
    engine.step()
    launched = engine._flight
    assert launched is not None
    engine.step()
    assert engine._flight is not launched
    while engine.running_uids:
        engine.step()
    assert engine.is_idle, "max_tokens is known before: nothing was launched beyond"
    engine.pool.check_idle()


def test_an_answer_that_ends_has_its_pages_until_the_step_ahead_has_landed(oracle) -> None:
    engine = engines(EngineConfig())[0]
    prompt = oracle["chat"]
    eos = fused().config.eos_token_id
    engine.add(Request("r", prompt.prompt_ids, SamplingParams(max_tokens=60, temperature=0)))
    tokens: list[Token] = []
    while engine.running_uids or not tokens:
        tokens += engine.step()
    assert [token.token_id for token in tokens][-1] == eos
    assert tokens[-1].finish_reason == "stop"
    assert not engine.is_idle
    assert engine.pool.num_free + engine.pool.num_cached < engine.pool.num_pages
    assert engine.step() == []
    assert engine.is_idle
    engine.pool.check_idle()


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_cancelled_while_it_runs(oracle, num_drafts: int) -> None:
    """One leaves, its drafts unread, and comes back under its name; the other does not notice."""
    with_graphs, without, _ = engines(EngineConfig(num_drafts=num_drafts))
    outcomes = []
    for engine in (with_graphs, without):
        for number, name in enumerate(("code", "chat")):
            engine.add(Request(name, oracle[name].prompt_ids, mixed(number, 16)))

        def leave(step: int, engine: Engine = engine) -> None:
            if step == 4:
                engine.cancel("code")
                engine.add(Request("code", oracle["code"].prompt_ids, mixed(0, 8)))

        outcomes.append(drain(engine, leave))
    assert len(outcomes[0]["code"]) == 4 + 8 or num_drafts
    assert outcomes[0] == outcomes[1]


def test_rows_without_a_token_end_their_own_request_alone(oracle) -> None:
    """NaN in the pages of one: it is dropped, and the step that went on from it is run again without it."""
    engine, without, cache = engines(EngineConfig())
    for each in (engine, without):
        for number, name in enumerate(("code", "chat")):
            each.add(Request(name, oracle[name].prompt_ids, mixed(number, 16)))
    expected = drain(without)["chat"]
    tokens = [token for _ in range(4) for token in engine.step()]
    assert engine._flight is not None
    sequence = engine._running["code"]
    for pages in cache.layers:
        pages.latents[sequence.pages[0]].fill_(0xFF)
    tokens += engine.step()  # ran before
    with pytest.raises(NumericalFailure) as failure:
        engine.step()
    assert failure.value.uids == {"code"}
    while not engine.is_idle:
        tokens += engine.step()
    assert [token for token in tokens if token.uid == "chat"] == expected
    engine.pool.check_idle()


@pytest.mark.parametrize("layer", [0, -1])
def test_drafts_that_nobody_has_read_outlive_a_failure(oracle, layer: int) -> None:
    """NaN in the pages of one: of the model, which ends it, or of the draft module, which ends its drafts."""
    engine, without, cache = engines(EngineConfig(num_drafts=2))
    for each in (engine, without):
        for number, name in enumerate(("code", "chat")):
            each.add(Request(name, oracle[name].prompt_ids, mixed(number, 16)))
    expected = drain(without)
    tokens = [token for _ in range(3) for token in engine.step()]
    cache.layers[layer].latents[engine._running["code"].pages[0]].fill_(0xFF)
    if layer == 0:
        with pytest.raises(NumericalFailure) as failure:
            engine.step()
        assert failure.value.uids == {"code"}
        del expected["code"]
    else:
        tokens += engine.step()  # their drafts were made before
        drafted = engine.acceptance.accepted[0]
        engine.cancel("chat")
        del expected["chat"]
    while not engine.is_idle:
        tokens += engine.step()
    engine.pool.check_idle()
    for uid, answer in expected.items():
        assert [token for token in tokens if token.uid == uid] == answer
    assert layer == 0 or engine.acceptance.accepted[0] == drafted, "what is no token is no draft"


def test_a_step_that_cannot_be_launched_ahead_takes_nothing_along(
    oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, without, _ = engines(EngineConfig())
    for each in (engine, without):
        each.add(Request("r", oracle["code"].prompt_ids, mixed(1, 12)))
    tokens = [token for _ in range(3) for token in engine.step()]
    with monkeypatch.context() as patch:
        patch.setattr(engine._runner, "launch_ahead", Mock(side_effect=MemoryError))
        with pytest.raises(MemoryError):
            engine.step()
    while not engine.is_idle:
        tokens += engine.step()
    assert tokens == drain(without)["r"]
    engine.pool.check_idle()


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_sequence_goes_on_where_others_run(oracle, num_drafts: int) -> None:
    """It was prefilled elsewhere, and comes while a step or drafts are under way."""
    config = EngineConfig(num_drafts=num_drafts)
    source, alone, out_of = engines(config)
    engine, _, into = engines(config)
    engine.add(Request("chat", oracle["chat"].prompt_ids, mixed(1, 16)))
    request = Request("code", oracle["code"].prompt_ids, mixed(2, 12))
    for each, hand_over in ((alone, False), (source, True)):
        each.add(request, hand_over=hand_over)
    expected = drain(alone)["code"]
    (first,) = source.step()
    parked = source.parked("code")
    assert parked is not None
    assert not source.running_uids
    for _ in range(3):
        engine.step()
    sequence = engine.reserve(request)
    assert isinstance(sequence, Sequence)
    for ours, theirs in zip(into.layers, out_of.layers, strict=True):
        ours.latents[sequence.pages[0]] = theirs.latents[parked.pages[0]]
        ours.index_keys[sequence.pages[0]] = theirs.index_keys[parked.pages[0]]
    engine.adopt("code", first)
    source.cancel("code")
    source.pool.check_idle()
    soon = [token for _ in range(2) for token in engine.step() if token.uid == "code"]
    assert soon, "the step that was under way is the last without it"
    assert [first, *soon, *drain(engine)["code"]] == expected


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_an_answer_may_fill_the_last_slot_of_its_pages(oracle, num_drafts: int) -> None:
    engine = engines(EngineConfig(num_drafts=num_drafts))[0]
    prompt = oracle["code"].prompt_ids
    engine.add(Request("r", prompt, mixed(0, PAGE_SIZE - len(prompt))))
    assert len(drain(engine)["r"]) == PAGE_SIZE - len(prompt)


def test_a_next_turn_goes_on_from_pages_that_steps_ahead_have_filled(oracle) -> None:
    turns, hits = [], []
    for engine in engines(EngineConfig())[:2]:
        prompt = oracle["lookup_300"].prompt_ids[: PAGE_SIZE - 4]
        engine.add(Request("one", prompt, mixed(1, 12)))
        answer = [token.token_id for token in drain(engine)["one"]]
        engine.add(Request("two", (*prompt, *answer, *prompt[:9]), mixed(2, 8)))
        turns.append((answer, [token.token_id for token in drain(engine)["two"]]))
        hits.append(engine.num_hit_tokens)
    assert turns[0] == turns[1]
    assert hits == [PAGE_SIZE] * 2


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_one_who_counts_tokens_is_served_beside_those_who_do_not(oracle, num_drafts: int) -> None:
    answers = []
    for engine in engines(EngineConfig(num_drafts=num_drafts))[:2]:
        engine.add(Request("chat", oracle["chat"].prompt_ids, mixed(1, 14)))
        # One of two tokens, whichever it has had less often: a draft that is not counted is one too many.
        counting = replace(
            mixed(0, 9), frequency_penalty=2.0, logit_bias=((5, 100.0), (70, 99.0)), logprobs=2
        )
        engine.add(Request("code", oracle["code"].prompt_ids, counting))
        answers.append({uid: [token.token_id for token in each] for uid, each in drain(engine).items()})
    assert answers[0] == answers[1]
    assert set(answers[0]["code"]) == {5, 70}


def test_a_token_that_needs_the_host_is_waited_for(oracle) -> None:
    """A nucleus wider than a device looks at: what went on from it is thrown away, and run again."""
    answers, given_up = [], 0
    wide = SamplingParams(max_tokens=12, temperature=2, top_p=0.99, seed=3, ignore_eos=True)
    for engine in engines(EngineConfig())[:2]:
        engine.add(Request("code", oracle["code"].prompt_ids, mixed(1, 20)))
        engine.add(Request("chat", oracle["chat"].prompt_ids, wide))
        tokens: list[Token] = []
        while not engine.is_idle:
            tokens += engine.step()
            given_up += bool(engine._flight and engine._flight.void)
        engine.pool.check_idle()
        answers.append({uid: [token for token in tokens if token.uid == uid] for uid in ("code", "chat")})
    assert answers[0] == answers[1]
    assert given_up


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("num_drafts", [0, 2])
def test_a_launched_step_has_not_waited_for_the_device(
    oracle, monkeypatch: pytest.MonkeyPatch, num_drafts: int
) -> None:
    """Greedy rows and sampled ones, whole and cut: between schedule and landing nothing asks the device."""
    options = ModelOptions(dtype="bfloat16", pages="fp8", kernels="triton", device="cuda")
    engine = LocalModel(DEMO, options).engine(EngineConfig(num_drafts=num_drafts), NUM_TOKENS)
    for number, name in enumerate(NAMES):
        engine.add(Request(name, oracle[name].prompt_ids, mixed(number, 40)))
    for _ in range(6):
        engine.step()
    launches: list[Flight] = []

    def strictly(launch: Callable[..., Flight], *args: Any) -> Flight:
        torch.cuda.set_sync_debug_mode("error")
        try:
            launches.append(launch(*args))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return launches[-1]

    for name in ("launch", "launch_ahead"):
        monkeypatch.setattr(engine._runner, name, partial(strictly, getattr(engine._runner, name)))
    for _ in range(8):
        engine.step()
    assert len(launches) == 8


def test_penalties_and_logprobs_are_not_run_ahead(oracle) -> None:
    for params in ({"presence_penalty": 0.5}, {"logprobs": 2}):
        answers = []
        for engine in engines(EngineConfig())[:2]:
            request = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, **params)
            engine.add(Request("r", oracle["code"].prompt_ids, request))
            tokens: list[Token] = []
            while engine.running_uids or not tokens:
                tokens += engine.step()
                assert engine._flight is None
            answers.append([token.token_id for token in tokens])
        assert answers[0] == answers[1]

"""Where the time of a request went: what a worker tells of one that is traced, and of no other."""

import time

import torch

from model.sampling_params import SamplingParams
from tests.workers.workers import Client, client, running
from workers.dispatch import DispatchStats
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel
from workers.sequence import Request
from workers.stages import Decoded, Prefilled, Queued, StageClock, Stages
from workers.wire import Kind, pack, unpack


def greedy(max_tokens: int = 8) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


def stages(reader: Client, uid: str) -> dict[str, object]:
    """Those that a worker tells next, by name."""
    reader.read_until(lambda: uid in reader.stages)
    return {stage.name: stage for stage in reader.stages.pop(uid).stages}


def test_both_ends_of_a_hand_over_tell_their_part(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_1000"].prompt_ids
    config, before = EngineConfig(chunk=300, num_drafts=2), time.time_ns()
    with (
        running(demo, "prefill", "prefill", config=config) as prefill,
        running(demo, "decode", "decode", config=config) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.generate(Request("quiet", prompt, greedy()), prefill, None)
        reader.answers("quiet")
        reader.generate(Request("traced", (7, *prompt), greedy(12), traced=True), prefill, None)
        reader.answers("traced")
        alone = stages(reader, "traced")
        reader.generate(Request("moved", (9, *prompt), greedy(12), traced=True), prefill, decode)
        reader.answers("moved")
        found: dict[str, object] = {}
        while len(found) < 4:  # of both workers, whichever tells first
            found |= stages(reader, "moved")
    assert alone.keys() == {"queue", "prefill", "decode"}
    assert found.keys() == {"queue", "prefill", "hand_over", "decode"}
    assert not reader.stages
    queued, prefilled, handed_over, decoded = (
        found[name] for name in ("queue", "prefill", "hand_over", "decode")
    )
    assert before < queued.start_ns <= queued.end_ns == prefilled.start_ns < prefilled.end_ns
    assert (prefilled.prompt_tokens, prefilled.cached_tokens) == (len(prompt) + 1, 0)
    assert prefilled.chunks == -(-(len(prompt) + 1) // 300)
    assert prefilled.start_ns < handed_over.start_ns < decoded.start_ns < decoded.end_ns
    assert handed_over.start_ns < handed_over.end_ns < time.time_ns()
    assert handed_over.pages == -(-(len(prompt) + 1) // 64) * (demo.config.num_hidden_layers + 1)
    assert (decoded.tokens, decoded.steps) == (11, 11 - decoded.accepted_drafts)
    assert 0 < decoded.first_step_seconds <= (decoded.end_ns - decoded.start_ns) / 1e9


def test_an_answer_that_is_cancelled_is_told_as_far_as_it_came(demo: LocalModel, oracle) -> None:
    with running(demo, "worker", "decode") as worker, client() as reader:
        reader.meet(worker)
        reader.generate(Request("long", oracle["code"].prompt_ids, greedy(4000), traced=True), worker, None)
        reader.read_until(lambda: len(reader.tokens.get("long", [])) > 3)
        reader.cancel("long", worker)
        found = stages(reader, "long")
    assert isinstance(found["decode"], Decoded)
    assert found["decode"].tokens >= len(reader.tokens["long"]) - 1


def test_cached_tokens_and_the_wait_for_experts(demo: LocalModel, oracle) -> None:
    """By hand, with an engine whose experts would be elsewhere: every step waits half a second for them."""
    engine, dispatch = demo.engine(EngineConfig(chunk=100), 4096), DispatchStats()
    clock = StageClock(dispatch)

    def run(request: Request) -> Stages | None:
        engine.add(request)
        clock.arrived(request)
        return step_until_idle(engine, clock, dispatch) or clock.end(request.uid)

    prompt = oracle["lookup_300"].prompt_ids
    run(Request("before", prompt[:128], greedy(1)))
    told = run(Request("uid", prompt, greedy(4), traced=True))
    assert told
    queued, prefilled, decoded = told.stages
    assert isinstance(queued, Queued)
    assert isinstance(prefilled, Prefilled)
    assert isinstance(decoded, Decoded)
    chunks = -(-(len(prompt) - 128) // 100)
    assert (prefilled.cached_tokens, prefilled.chunks) == (128, chunks)
    assert (prefilled.experts_seconds, decoded.experts_seconds) == (0.5 * chunks, 1.5)
    assert unpack(Stages, pack(Kind.STAGES, told)) == told
    assert clock.is_idle


def step_until_idle(engine: Engine, clock: StageClock, dispatch: DispatchStats) -> None:
    with torch.inference_mode():
        while not engine.is_idle:
            clock.step_begins()
            tokens = engine.step(clock.on_layer)
            dispatch.wait_seconds += 0.5
            clock.step_ends(tokens)

"""Sequences that move from one worker to another: whole answers."""

import pytest

from model.inputs import PAGE_SIZE
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from tests.workers.handoffs import NO_DRAFTS, greedy
from tests.workers.workers import SECRET, client, running, soon, stranger
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.page_pool import pages_for
from workers.sequence import Request, Token
from workers.wire import Drop, Generate, Kind, Reserve, pack


def alone(model: LocalModel, *requests: Request, config: EngineConfig = NO_DRAFTS) -> dict[str, list[Token]]:
    """What one engine makes of requests."""
    engine = Engine(model.decoder, model.cache(16384), config, SECRET)
    tokens: dict[str, list[Token]] = {request.uid: [] for request in requests}
    for request in requests:
        engine.add(request)
    while not engine.is_idle:
        for token in engine.step():
            tokens[token.uid].append(token)
    return tokens


def test_many_at_once(demo: LocalModel, oracle) -> None:
    names = ["chat", "code", "lookup_300"]
    uids = [f"{name}-{i}" for i in range(4) for name in names]
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for uid in uids:
            prompt = oracle[uid.split("-")[0]]
            reader.generate(Request(uid, prompt.prompt_ids, greedy(6)), prefill, decode)
        answers = reader.answers(*uids)
    for uid in uids:
        assert answers[uid] == oracle[uid.split("-")[0]].output_ids[:6]


@pytest.mark.parametrize("num_drafts", [0, 1, 2, 3])
@pytest.mark.parametrize("pages", ["fp8", "full"])
def test_drawn_tokens_are_those_of_one_engine(oracle, pages, num_drafts: int) -> None:
    """With everything that a token can depend on, in both formats of pages."""
    model = LocalModel(DEMO, ModelOptions(pages=pages))
    config = EngineConfig(chunk=100, num_drafts=num_drafts)
    params = SamplingParams(
        max_tokens=7, temperature=0.9, top_p=0.9, top_k=50, min_p=0.01, seed=2**64 - 3, frequency_penalty=0.7,
        presence_penalty=-0.3, repetition_penalty=1.1, logit_bias=((5, 2.5), (70, -100.0)), logprobs=3,
        ignore_eos=True,
    )  # fmt: skip
    requests = [
        Request("sampled", oracle["lookup_300"].prompt_ids, params, choice=1),
        Request("penalised", oracle["chat"].prompt_ids, greedy(7, frequency_penalty=1.5, logprobs=0)),
    ]
    with (
        running(model, "prefill", "prefill", config=config) as prefill,
        running(model, "decode", "decode", config=config) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for request in requests:
            reader.generate(request, prefill, decode)
        reader.answers("sampled", "penalised")
    for uid, tokens in alone(model, *requests, config=config).items():
        got = sorted(reader.tokens[uid], key=lambda token: token.position)
        assert [token.token_id for token in got] == [token.token_id for token in tokens]
        assert got[-1].finish_reason == "length"
        for ours, theirs in zip(got, tokens, strict=True):
            assert ours.logprobs
            assert theirs.logprobs
            assert ours.logprobs.logprob == pytest.approx(theirs.logprobs.logprob, abs=1e-4)
            assert [i for i, _ in ours.logprobs.top] == [i for i, _ in theirs.logprobs.top]


@pytest.mark.parametrize("ends", ["max_tokens", "stop_token"])
def test_a_first_token_that_ends_the_answer_needs_nobody_else(demo: LocalModel, oracle, ends: str) -> None:
    prompt = oracle["lookup_300"]
    stop = SamplingParams(max_tokens=9, temperature=0, stop_token_ids=(prompt.output_ids[0],))
    params = greedy(1) if ends == "max_tokens" else stop
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.generate(Request("r", prompt.prompt_ids, params), prefill, decode)
        assert reader.answers("r") == {"r": prompt.output_ids[:1]}
        assert reader.heard_from["r"] == {"prefill"}
        soon(lambda: decode.num_parked == 0)


def test_known_pages_are_not_sent_again(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_300"].prompt_ids
    other = (*prompt[: 3 * PAGE_SIZE], *oracle["code"].prompt_ids)
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.watch(prefill)
        sent = []
        for uid, ids in (("a", prompt), ("b", prompt), ("c", other)):
            reader.generate(Request(uid, ids, greedy()), prefill, decode)
            reader.answers(uid)
            reader.read_status(prefill)
            sent.append(reader.read_status(prefill).sent_pages)
    layers = demo.config.num_hidden_layers
    in_full, known = pages_for(len(prompt)), (len(prompt) - 1) // PAGE_SIZE
    assert sent[0] == layers * in_full
    assert sent[1] - sent[0] == layers * (in_full - known)
    assert sent[2] - sent[1] == layers * (pages_for(len(other)) - 3)
    assert reader.tokens["b"][0].num_prompt_cached == known * PAGE_SIZE


def test_choices_compute_their_common_pages_once(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_300"].prompt_ids
    uids = [f"r-{choice}" for choice in range(4)]
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.watch(prefill)
        for choice, uid in enumerate(uids):
            params = SamplingParams(max_tokens=3, seed=1, n=4, ignore_eos=True)
            reader.generate(Request(uid, prompt, params, choice=choice), prefill, decode)
        answers = reader.answers(*uids)
        reader.read_status(prefill)
        status = reader.read_status(prefill)
    known = (len(prompt) - 1) // PAGE_SIZE
    assert prefill.engine.num_prompt_tokens == 4 * len(prompt)
    assert prefill.engine.num_hit_tokens == 3 * known * PAGE_SIZE
    assert status.sent_pages == demo.config.num_hidden_layers * (pages_for(len(prompt)) + 3)
    slot_bytes = (demo.config.latent_dim + demo.config.index_head_dim) * 4
    assert status.sent_bytes == status.sent_pages * PAGE_SIZE * slot_bytes
    assert status.hand_overs == len(uids)
    assert 0 < status.hand_over_seconds < 60 * len(uids)
    expected = alone(
        demo, *(Request(uid, prompt, SamplingParams(max_tokens=3, seed=1, n=4, ignore_eos=True), choice=i)
                for i, uid in enumerate(uids))
    )  # fmt: skip
    assert answers == {uid: [token.token_id for token in tokens] for uid, tokens in expected.items()}


def test_who_finds_no_room_waits_in_order(demo: LocalModel, oracle) -> None:
    prompt = oracle["code"].prompt_ids
    answer = 2 * PAGE_SIZE - len(prompt)
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode", num_tokens=2 * PAGE_SIZE) as decode,  # room for one
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for uid in "abc":
            reader.generate(Request(uid, prompt, greedy(answer)), prefill, decode)
        reader.read_until(lambda: len(reader.tokens) == 3)
        assert decode.engine.load().parked + decode.engine.load().running <= 1
        ended: list[str] = []
        while len(ended) < 3:
            reader.read()
            ended += [uid for uid in reader.tokens if reader.is_complete(uid) and uid not in ended]
    assert ended == list("abc")
    for uid in "abc":
        answers = reader.answers(uid)
        assert answers[uid][:32] == oracle["code"].output_ids


def test_the_first_token_waits_for_no_pages(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_300"]
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        stranger("decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill)
        order = Generate(Request("r", prompt.prompt_ids, greedy()), decode.endpoint.address)
        reader.send(prefill, pack(Kind.GENERATE, order))  # no budget: as long as it takes
        decode.greet_until(lambda: prefill.num_parked == 1)
        reader.read_until(lambda: "r" in reader.tokens)
        assert [token.token_id for token in reader.tokens["r"]] == prompt.output_ids[:1]
        reserve = decode.expect(Kind.RESERVE, Reserve)
        assert reserve.request == order.request
        assert reserve.client == "client"
        assert not prefill.holds_nothing
        reader.cancel("r", prefill)
        assert decode.expect(Kind.DROP, Drop).uid == "r"

"""Sequences that move from one worker to another, and everything that can come between."""

from collections.abc import Callable

import pytest
import torch

from model.inputs import PAGE_SIZE
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from tests.workers.workers import SECONDS, SECRET, Stranger, Worker, client, running, soon, stranger
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.page_pool import pages_for
from workers.sequence import Request, Token
from workers.transport.message import Message
from workers.transport.protocol import Deadline
from workers.wire import Adopted, Drop, Failed, Generate, Grant, HandOver, Kind, Reserve, pack, unpack

NO_DRAFTS = EngineConfig(chunk=64)


def greedy(max_tokens: int = 4, **overrides: object) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True, **overrides)


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


# Whole answers


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


# Cancelling


@pytest.mark.parametrize("stage", ["ordered", "prefilling", "half sent", "started", "decoding"])
def test_cancelled_at_any_time_it_leaves_nothing(demo: LocalModel, oracle, stage: str) -> None:
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for uid in "ab":
            reader.generate(Request(uid, oracle["lookup_1000"].prompt_ids, greedy(5000)), prefill, decode)
        match stage:
            case "prefilling":
                soon(lambda: not prefill.engine.is_idle)
            case "half sent":
                soon(lambda: decode.num_parked > 0)
            case "started":
                reader.read_until(lambda: "a" in reader.tokens)
            case "decoding":
                reader.read_until(lambda: len(reader.tokens.get("a", [])) > 2)
        for uid in "ab":
            reader.cancel(uid, prefill, decode)
        soon(lambda: prefill.holds_nothing and decode.holds_nothing)
        assert decode.num_parked == prefill.num_parked == 0


def test_cancelled_before_any_page_was_granted(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode", num_tokens=6 * PAGE_SIZE) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.generate(Request("runs", oracle["code"].prompt_ids, greedy(300)), prefill, decode)
        reader.read_until(lambda: len(reader.tokens.get("runs", [])) > 1)
        reader.generate(Request("waits", oracle["chat"].prompt_ids, greedy(300)), prefill, decode)
        reader.read_until(lambda: "waits" in reader.tokens)
        reader.cancel("waits", prefill, decode)
        soon(lambda: prefill.num_parked == 0)
        reader.cancel("runs", prefill, decode)
        soon(lambda: decode.holds_nothing)
        assert len(reader.tokens["waits"]) == 1


def test_a_cancel_that_comes_to_the_source_alone_ends_the_answer(demo: LocalModel, oracle) -> None:
    """As when it overtakes the hand-over: the source tells who took the sequence."""
    with (
        running(demo, "decode", "decode") as decode,
        stranger("prefill") as prefill,
        client() as reader,
    ):
        reader.meet(decode)
        hand_over(prefill, decode, Request("r", oracle["code"].prompt_ids, greedy(5000)))
        prefill.expect(Kind.ADOPTED, Adopted)
        reader.read_until(lambda: "r" in reader.tokens)
        prefill.send(decode, pack(Kind.DROP, Drop("r", "replica_lost")))
        soon(lambda: decode.holds_nothing)


def test_a_client_that_dies_takes_its_requests_along(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS) as decode,
    ):
        with client() as reader:
            reader.meet(prefill, decode)
            reader.generate(Request("decoding", oracle["code"].prompt_ids, greedy(5000)), prefill, decode)
            reader.read_until(lambda: len(reader.tokens.get("decoding", [])) > 1)
            for uid in "ab":
                reader.generate(Request(uid, oracle["lookup_1000"].prompt_ids, greedy(5000)), prefill, decode)
            soon(lambda: not prefill.engine.is_idle)
        soon(lambda: prefill.holds_nothing and decode.holds_nothing)


@pytest.mark.parametrize("max_tokens", [5000, 8000])
def test_a_request_ends_with_its_time(demo: LocalModel, oracle, max_tokens: int) -> None:
    """Where it decodes, and where it waits for room on the decode side."""
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode", num_tokens=8192) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for uid in "ab":
            request = Request(uid, oracle["code"].prompt_ids, greedy(max_tokens))
            reader.generate(request, prefill, decode, seconds=1.5)
        assert [reader.why_failed(uid) for uid in "ab"] == ["timeout", "timeout"]
        assert not reader.is_complete("a")
        soon(lambda: prefill.holds_nothing and decode.holds_nothing)


# Partners that fail


def test_a_decode_worker_that_dies_is_told_of(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS) as prefill,
        running(demo, "decode", "decode", is_idle_at_end=False) as decode,
        running(demo, "other", "decode") as other,
        client() as reader,
    ):
        reader.meet(prefill, decode, other)
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(5000)), prefill, decode)
        soon(lambda: decode.num_parked == 1)
        decode.end()
        assert reader.why_failed("r") == "replica_lost"
        soon(lambda: prefill.holds_nothing)
        reader.generate(Request("s", oracle["code"].prompt_ids, greedy()), prefill, other)
        assert reader.answers("s")["s"] == oracle["code"].output_ids[:4]


def test_a_decode_worker_that_cannot_be_reached(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode", is_idle_at_end=False) as decode,
        client() as reader,
    ):
        decode.end()
        reader.meet(prefill)
        reader.generate(Request("r", oracle["code"].prompt_ids, greedy()), prefill, decode)
        assert reader.why_failed("r") == "replica_lost"


def test_a_decode_worker_that_stops_reading_loses_its_sequences(demo: LocalModel, oracle) -> None:
    """And only once is it waited for, however many sequences go there."""
    with (
        running(demo, "prefill", "prefill", lease_seconds=1.0) as prefill,
        stranger("decode", ring_bytes=2**18) as decode,
        client() as reader,
    ):
        reader.meet(prefill)
        uids = [f"r-{i}" for i in range(4)]
        for uid in uids:
            request = Request(uid, (ord(uid[-1]), *oracle["lookup_300"].prompt_ids), greedy())
            reader.send(prefill, pack(Kind.GENERATE, Generate(request, decode.endpoint.address)))
        for lease in range(1, len(uids) + 1):
            message = decode.read().message
            while message.kind != Kind.RESERVE:
                message = decode.read().message
            uid = unpack(Reserve, message).request.uid
            decode.send(prefill, pack(Kind.GRANT, Grant(uid, lease, 0)))
        assert {reader.why_failed(uid) for uid in uids} == {"replica_lost"}
        soon(lambda: prefill.holds_nothing)


def test_a_decode_worker_that_never_says_it_has_adopted(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill", lease_seconds=0.5) as prefill,
        stranger("decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill)
        order = Generate(Request("r", oracle["code"].prompt_ids, greedy(50)), decode.endpoint.address)
        reader.send(prefill, pack(Kind.GENERATE, order))
        decode.expect(Kind.RESERVE, Reserve)
        decode.send(prefill, pack(Kind.GRANT, Grant("r", 7, 0)))
        kinds = []
        while not kinds or kinds[-1] != Kind.DROP:
            message = decode.read().message
            assert message.kind != Kind.PAGES or message.sequence == 7
            kinds.append(Kind(message.kind))
        assert kinds == [Kind.PAGES] * demo.config.num_hidden_layers + [Kind.HAND_OVER, Kind.DROP]
        assert reader.why_failed("r") == "replica_lost"


def test_only_the_target_can_grant_adopt_or_drop(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        stranger("decode") as decode,
        stranger("meddler") as meddler,
        client() as reader,
    ):
        reader.meet(prefill)
        order = Generate(Request("r", oracle["code"].prompt_ids, greedy(50)), decode.endpoint.address)
        reader.send(prefill, pack(Kind.GENERATE, order))
        decode.expect(Kind.RESERVE, Reserve)
        meddler.send(prefill, pack(Kind.ADOPTED, Adopted("r")))
        meddler.send(prefill, pack(Kind.DROP, Drop("r", "replica_lost")))
        meddler.send(prefill, pack(Kind.GRANT, Grant("r", 1, 0)))
        assert meddler.expect(Kind.DROP, Drop).uid == "r"
        assert prefill.num_parked == 1
        decode.send(prefill, pack(Kind.DROP, Drop("r", "overloaded")))
        assert reader.why_failed("r") == "overloaded"


def test_other_weights_take_no_pages(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode", digest="other weights") as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        reader.generate(Request("r", oracle["code"].prompt_ids, greedy()), prefill, decode)
        assert reader.why_failed("r") == "replica_lost"
        assert [token.token_id for token in reader.tokens["r"]] == oracle["code"].output_ids[:1]


# A source that does not behave


def reserve(source: Stranger, decode: Worker, request: Request, seconds: float = SECONDS) -> Grant:
    body = Reserve(request, "client", decode.worker._config.digest)
    source.send(decode, pack(Kind.RESERVE, body, Deadline.after(seconds).left_us()))
    return source.expect(Kind.GRANT, Grant)


def pages(worker: Worker, grant: Grant, layer: int, num_pages: int) -> Message:
    """Pages full of ones, after those that are known."""
    own = worker.worker._receiver._cache.layers[layer]
    latents = torch.ones_like(own.latents[:num_pages])
    keys = torch.ones_like(own.index_keys[:num_pages])
    return Message(Kind.PAGES, (latents, keys), sequence=grant.lease, layer=layer, step=grant.first_page)


def first_token(request: Request) -> Token:
    return Token(request.uid, 11, len(request.prompt_ids))


def hand_over(source: Stranger, decode: Worker, request: Request) -> None:
    grant = reserve(source, decode, request)
    for layer in range(len(decode.worker._receiver._cache.layers)):
        source.send(decode, pages(decode, grant, layer, pages_for(len(request.prompt_ids))))
    source.send(decode, pack(Kind.HAND_OVER, HandOver(request.uid, grant.lease, first_token(request))))


def test_a_source_that_stops_loses_its_lease(demo: LocalModel, oracle) -> None:
    request = Request("r", oracle["lookup_300"].prompt_ids, greedy(50))
    with (
        running(demo, "decode", "decode", lease_seconds=0.5) as decode,
        stranger("prefill") as source,
        client() as reader,
    ):
        reader.meet(decode)
        reader.watch(decode)
        grant = reserve(source, decode, request)
        assert decode.num_parked == 1
        assert source.expect(Kind.DROP, Drop) == Drop("r", "replica_lost")
        soon(lambda: decode.holds_nothing)
        source.send(decode, pages(decode, grant, 0, 1))
        source.send(decode, pack(Kind.HAND_OVER, HandOver("r", grant.lease, first_token(request))))
        reader.read_until(lambda: reader.status["decode"].stray == 1 if reader.status else False)
        again = reserve(source, decode, request)
        assert again.lease != grant.lease
        source.send(decode, pages(decode, grant, 0, 1))  # of the old lease
        reader.read_until(lambda: reader.status["decode"].stray == 2)
        assert not decode.worker._receiver._cache.layers[0].latents.any()
        source.send(decode, pack(Kind.DROP, Drop("r", "replica_lost")))


def test_a_request_that_is_tried_again_replaces_the_first_try(demo: LocalModel, oracle) -> None:
    request = Request("r", oracle["code"].prompt_ids, greedy(5000))
    with (
        running(demo, "decode", "decode") as decode,
        stranger("one") as one,
        stranger("two") as two,
        client() as reader,
    ):
        reader.meet(decode)
        reserve(one, decode, request)
        hand_over(two, decode, request)
        two.expect(Kind.ADOPTED, Adopted)
        assert decode.engine.load().running == 1
        reserve(one, decode, request)
        assert (decode.engine.load().running, decode.num_parked) == (0, 1)


def test_a_source_that_dies_loses_its_pages(demo: LocalModel, oracle) -> None:
    with running(demo, "decode", "decode") as decode:
        with stranger("prefill") as source:
            reserve(source, decode, Request("r", oracle["lookup_300"].prompt_ids, greedy()))
            assert not decode.holds_nothing
        soon(lambda: decode.holds_nothing)


def test_an_answer_that_nobody_would_read_does_not_run(demo: LocalModel, oracle) -> None:
    with running(demo, "decode", "decode") as decode, stranger("prefill") as source:
        hand_over(source, decode, Request("r", oracle["code"].prompt_ids, greedy(5000)))
        source.expect(Kind.ADOPTED, Adopted)
        soon(lambda: decode.holds_nothing)


def test_what_can_never_run_is_refused(demo: LocalModel, oracle) -> None:
    requests = [
        Request("long", oracle["code"].prompt_ids, greedy(200)),
        Request("unknown", (2**40,) * 100, greedy()),
        Request("empty", (), greedy()),
    ]
    with running(demo, "decode", "decode", num_tokens=128) as decode, stranger("prefill") as source:
        for request in requests:
            source.send(decode, pack(Kind.RESERVE, Reserve(request, "client", decode.worker._config.digest)))
            assert source.expect(Kind.DROP, Drop) == Drop(request.uid, "overloaded")


def changed(message: Message, **fields: object) -> Message:
    own = {"tensors": message.tensors, "sequence": message.sequence} | {
        "layer": message.layer,
        "step": message.step,
    }
    return Message(message.kind, **(own | fields))  # type: ignore[arg-type]


BAD_PAGES: dict[str, Callable[[Message], Message]] = {
    "layer": lambda good: changed(good, layer=99),
    "negative layer": lambda good: changed(good, layer=-1),
    "gap": lambda good: changed(good, step=good.step + 1),
    "beyond": lambda good: changed(good, step=2**40),
    "one tensor": lambda good: changed(good, tensors=good.tensors[:1]),
    "none": lambda good: changed(good, tensors=()),
    "dtype": lambda good: changed(good, tensors=(good.tensors[0].double(), good.tensors[1])),
    "dtype of keys": lambda good: changed(good, tensors=(good.tensors[0], good.tensors[1].half())),
    "shape": lambda good: changed(good, tensors=(good.tensors[0][:, :3], good.tensors[1])),
    "numbers": lambda good: changed(good, tensors=(good.tensors[0], good.tensors[1][:1])),
    "scalar": lambda good: changed(good, tensors=(torch.tensor(1.0), good.tensors[1])),
    "too many": lambda good: changed(good, tensors=tuple(torch.cat([t] * 20) for t in good.tensors)),
}


def test_pages_that_do_not_fit_end_the_connection(demo: LocalModel, oracle) -> None:
    prompt = oracle["lookup_300"]
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode") as decode,
        client() as reader,
    ):
        for name, spoil in BAD_PAGES.items():
            with stranger("prefill?") as source:
                grant = reserve(source, decode, Request("r", prompt.prompt_ids, greedy()))
                source.send(decode, spoil(pages(decode, grant, 0, 2)))
                assert source.is_cut_off(), name
                soon(lambda: decode.holds_nothing)
        reader.meet(prefill, decode)
        reader.generate(Request("good", prompt.prompt_ids, greedy()), prefill, decode)
        assert reader.answers("good")["good"] == prompt.output_ids[:4]


@pytest.mark.parametrize("wrong", ["pages", "layers", "uid", "token", "position", "end"])
def test_a_hand_over_that_is_not_complete_ends_the_connection(demo: LocalModel, oracle, wrong: str) -> None:
    request = Request("r", oracle["lookup_300"].prompt_ids, greedy())
    first = first_token(request)
    num_pages, uid = pages_for(len(request.prompt_ids)), "r"
    num_layers = demo.config.num_hidden_layers
    match wrong:
        case "pages":
            num_pages -= 1
        case "layers":
            num_layers -= 1
        case "uid":
            uid = "another"
        case "token":
            first = Token("another", 11, first.position)
        case "position":
            first = Token("r", 11, first.position + 1)
        case "end":
            first = Token("r", 11, first.position, "stop")
    with running(demo, "decode", "decode") as decode, stranger("prefill") as source:
        grant = reserve(source, decode, request)
        for layer in range(num_layers):
            source.send(decode, pages(decode, grant, layer, num_pages))
        source.send(decode, pack(Kind.HAND_OVER, HandOver(uid, grant.lease, first)))
        assert source.is_cut_off()
        soon(lambda: decode.holds_nothing)


@pytest.mark.parametrize(
    "message",
    [
        Message(Kind.RESERVE),
        Message(Kind.HAND_OVER, (torch.zeros(3),)),
        Message(Kind.TOKENS),
        Message(999),
        pack(Kind.GRANT, Failed("r", "invalid")),
        Message(Kind.GENERATE, (torch.frombuffer(bytearray(b'{"request": 1}'), dtype=torch.uint8),)),
    ],
)
def test_what_is_no_message_ends_the_connection(demo: LocalModel, message: Message) -> None:
    with running(demo, "decode", "decode") as decode, stranger("prefill") as source:
        source.send(decode, message)
        assert source.is_cut_off()

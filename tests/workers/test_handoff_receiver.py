"""What a decode worker makes of a source that does not behave."""

from collections.abc import Callable

import pytest
import torch

from tests.workers.handoffs import first_token, greedy, hand_over, pages, reserve
from tests.workers.workers import client, running, soon, stranger
from workers.local import LocalModel
from workers.page_pool import pages_for
from workers.sequence import Request, Token
from workers.transport.message import Message
from workers.wire import Adopted, Drop, Failed, HandOver, Kind, Reserve, pack


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

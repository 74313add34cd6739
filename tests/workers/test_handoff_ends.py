"""Sequences whose move or answer ends early: cancelled, out of time, or with a partner that fails."""

import pytest

from model.inputs import PAGE_SIZE
from tests.workers.handoffs import NO_DRAFTS, greedy, hand_over
from tests.workers.workers import client, running, soon, stranger
from workers.local import LocalModel
from workers.sequence import Request
from workers.wire import Adopted, Drop, Generate, Grant, Kind, Reserve, pack, unpack

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

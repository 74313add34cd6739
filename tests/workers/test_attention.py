"""Attention workers: what they do for those who order answers, and what they tell of themselves."""

import pytest
import torch

from model.decoder import Decoder
from model.sampling_params import SamplingParams
from tests.workers.workers import client, running, soon, stranger
from workers.dispatch import WorkerFailed, WorkerLost
from workers.engine import EngineConfig
from workers.local import LocalModel
from workers.sequence import Request
from workers.transport.message import Message
from workers.transport.protocol import DeadlineExceeded
from workers.wire import Generate, Kind, pack, short_key


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


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_a_worker_can_run_all_of_a_request(demo: LocalModel, oracle, role) -> None:
    with running(demo, "worker", role) as worker, client("one") as one, client("two") as two:
        for name, reader in (("code", one), ("chat", two)):
            reader.meet(worker)
            reader.generate(Request(name, oracle[name].prompt_ids, greedy(8)), worker, None)
        assert one.answers("code")["code"] == oracle["code"].output_ids[:8]
        assert two.answers("chat")["chat"] == oracle["chat"].output_ids[:8]
        assert set(one.tokens) == {"code"}


def test_what_cannot_run_is_refused_with_its_reason(demo: LocalModel, oracle) -> None:
    prompt = oracle["code"].prompt_ids
    with (
        running(demo, "worker", "decode", num_tokens=128) as worker,
        running(demo, "other", "decode") as other,
        client() as reader,
    ):
        reader.meet(worker)
        for decode in (None, other):
            reader.generate(Request("long", prompt, greedy(200)), worker, decode)
            assert reader.why_failed("long") == "invalid"
            assert reader.failed.pop("long").field == "max_tokens"
        reader.generate(Request("unknown", (0, 9999), greedy()), worker, None)
        assert reader.why_failed("unknown") == "invalid"
        assert "9999" in reader.failed["unknown"].problem
        reader.generate(Request("good", prompt, greedy(2)), worker, None)
        reader.answers("good")


def test_an_order_with_bad_parameters_costs_its_sender_the_connection_and_nobody_else(
    demo: LocalModel, oracle
) -> None:
    order = pack(Kind.GENERATE, Generate(Request("r", oracle["code"].prompt_ids, greedy())))
    text = order.tensors[0].numpy().tobytes().replace(b'"temperature":0.0', b'"temperature":-1')
    with running(demo, "worker", "decode") as worker, stranger("bad") as bad, client() as reader:
        bad.send(worker, Message(Kind.GENERATE, (torch.frombuffer(bytearray(text), dtype=torch.uint8),)))
        assert bad.is_cut_off()
        reader.meet(worker)
        reader.generate(Request("r", oracle["code"].prompt_ids, greedy(2)), worker, None)
        assert reader.answers("r")["r"] == oracle["code"].output_ids[:2]


def test_an_order_given_twice_runs_once(demo: LocalModel, oracle) -> None:
    request = Request("r", oracle["code"].prompt_ids, greedy(4))
    with running(demo, "worker", "decode") as worker, client() as reader:
        reader.meet(worker)
        reader.generate(request, worker, None)
        reader.generate(request, worker, None)
        reader.read_until(lambda: reader.is_complete("r"))
        soon(lambda: worker.holds_nothing)


def test_a_numerical_failure_is_that_of_its_request(demo: LocalModel, oracle, monkeypatch) -> None:
    """Rows of one prompt turn to NaN in the model; what runs beside it goes on."""
    logits = Decoder.logits

    def spoilt(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
        out = logits(self, hidden)
        is_bad = torch.isclose(hidden, poison, rtol=1e-3, atol=1e-3).all(1, keepdim=True)  # in any batch
        return out.masked_fill(is_bad, torch.nan)

    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        caught: list[torch.Tensor] = []

        def catch(self: Decoder, hidden: torch.Tensor) -> torch.Tensor:
            caught.append(hidden[-1:].clone())
            return logits(self, hidden)

        monkeypatch.setattr(Decoder, "logits", catch)
        reader.generate(Request("first", oracle["chat"].prompt_ids, greedy(1)), prefill, None)
        reader.answers("first")
        poison = caught[0]
        monkeypatch.setattr(Decoder, "logits", spoilt)
        reader.generate(Request("good", oracle["code"].prompt_ids, greedy(40)), prefill, decode)
        reader.generate(Request("bad", oracle["chat"].prompt_ids, greedy(40)), prefill, decode)
        assert reader.why_failed("bad") == "numerical_error"
        assert reader.answers("good")["good"][:32] == oracle["code"].output_ids


@pytest.mark.parametrize("num_failures", [1, 3])
def test_a_worker_whose_steps_fail_fails_its_requests_and_gives_up_in_the_end(
    demo: LocalModel, oracle, monkeypatch, num_failures: int
) -> None:
    forward = Decoder.forward_in_turn
    left = [num_failures]

    def broken(self: Decoder, *args: object, **kwargs: object) -> object:
        if left[0]:
            left[0] -= 1
            raise ZeroDivisionError("a bug")
        return forward(self, *args, **kwargs)  # type: ignore[arg-type]

    is_lasting = num_failures == 3
    if is_lasting:
        monkeypatch.setattr("threading.excepthook", lambda _: None)
    with running(demo, "worker", "decode", is_idle_at_end=not is_lasting) as worker, client() as reader:
        reader.meet(worker)
        monkeypatch.setattr(Decoder, "forward_in_turn", broken)
        for i in range(num_failures):
            reader.generate(Request(f"{i}", oracle["code"].prompt_ids, greedy(3)), worker, None)
            assert reader.why_failed(f"{i}") == "step_failed"
        if is_lasting:
            worker.thread.join(5)
            assert not worker.thread.is_alive()
        else:
            reader.generate(Request("r", oracle["code"].prompt_ids, greedy(3)), worker, None)
            assert reader.answers("r")["r"] == oracle["code"].output_ids[:3]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (WorkerLost("experts", "gone"), "experts_lost"),
        (DeadlineExceeded("a layer"), "experts_lost"),
        (WorkerFailed("experts", "it answered nonsense"), "step_failed"),
    ],
    ids=["lost", "late", "wrong"],
)
def test_experts_that_fail_a_step_do_not_end_the_worker(
    demo: LocalModel, oracle, monkeypatch, error: Exception, why: str
) -> None:
    def broken(*args: object, **kwargs: object) -> object:
        raise error

    with running(demo, "worker", "decode") as worker, client() as reader:
        reader.meet(worker)
        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "forward_in_turn", broken)
            for i in range(4):
                reader.generate(Request(f"{i}", oracle["code"].prompt_ids, greedy(3)), worker, None)
                assert reader.why_failed(f"{i}") == why
        reader.generate(Request("r", oracle["code"].prompt_ids, greedy(3)), worker, None)
        assert reader.answers("r")["r"] == oracle["code"].output_ids[:3]


def test_who_watches_knows_the_pages_at_first_and_ever_after(demo: LocalModel, oracle) -> None:
    prompts = [oracle[name].prompt_ids for name in ("lookup_300", "chat")]
    prompts.append(oracle["lookup_1000"].prompt_ids[:600])
    with (
        running(demo, "worker", "decode", num_tokens=768) as worker,  # the last one displaces others
        client("early") as early,
        client("late") as late,
    ):
        early.meet(worker)
        early.watch(worker)
        assert early.read_status(worker).is_full
        late.meet(worker)
        for i, prompt in enumerate(prompts):
            early.generate(Request(f"{i}", prompt, greedy(4)), worker, None)
            early.answers(f"{i}")
            if i == 1:
                late.watch(worker)
                assert late.read_status(worker).keys_added
            keys = set(map(short_key, worker.engine.pool.keys()))
            early.read_until(lambda keys=keys: early.keys["worker"] == keys, 5)
        late.read_until(lambda: late.keys["worker"] == keys, 5)
        gone = early.read_status(worker)
    assert not gone.is_full
    assert not gone.keys_added


def test_a_worker_tells_its_load(demo: LocalModel, oracle) -> None:
    with running(demo, "worker", "decode", num_tokens=2048) as worker, client() as reader:
        reader.meet(worker)
        reader.watch(worker)
        idle = reader.read_status(worker)
        assert (idle.role, idle.load.num_pages, idle.load.free_pages) == ("decode", 32, 32)
        reader.generate(Request("runs", oracle["code"].prompt_ids, greedy(1500)), worker, None)
        for uid in "ab":
            reader.generate(Request(uid, oracle["chat"].prompt_ids, greedy(1500)), worker, None)
        reader.read_until(lambda: reader.status["worker"].load.waiting == 2)
        load = reader.status["worker"].load
        assert load.running == 1
        assert load.queued_tokens == 2 * len(oracle["chat"].prompt_ids)
        assert load.free_pages == 32 - -(-(len(oracle["code"].prompt_ids) + 1500) // 64)
        reader.cancel("runs", worker)
        reader.cancel("a", worker)
        reader.cancel("b", worker)
        reader.read_until(lambda: reader.status["worker"].load.free_pages == 32)
        last = reader.status["worker"]
        assert last.load.queued_tokens == last.load.running == last.load.waiting == 0
        assert last.tokens >= len(reader.tokens["runs"])
        assert last.prompt_tokens >= len(oracle["code"].prompt_ids)


def test_a_report_covers_what_was_sent_before_it(demo: LocalModel, oracle) -> None:
    """The router forgets what it has sent once a report must know of it."""
    prompt = oracle["lookup_1000"].prompt_ids
    with running(demo, "worker", "prefill", config=EngineConfig(chunk=700)) as worker, client() as reader:
        reader.meet(worker)
        reader.watch(worker)
        reader.generate(Request("a", prompt, greedy(1)), worker, None)
        soon(lambda: not worker.engine.is_idle)  # a step runs, which takes long
        reader.generate(Request("b", (1, *prompt), greedy(1)), worker, None)
        reader.read_until(lambda: reader.status["worker"].steps > 0 if reader.status else False)
        assert reader.status["worker"].load.queued_tokens > len(prompt)
        reader.answers("a", "b")


def test_while_nothing_can_run_a_worker_rests(demo: LocalModel, oracle) -> None:
    """A prompt waits for pages that a decode worker does not take over."""
    with (
        running(demo, "prefill", "prefill", num_tokens=1024) as prefill,
        stranger("decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill)
        prompt = oracle["lookup_1000"].prompt_ids[:600]
        for uid in "ab":
            request = Request(uid, (ord(uid), *prompt), greedy())
            reader.send(prefill, pack(Kind.GENERATE, Generate(request, decode.endpoint.address)))
        decode.greet_until(lambda: prefill.num_parked == 1)
        calls = 0
        step = prefill.engine.step

        def counted(*args: object) -> object:
            nonlocal calls
            calls += 1
            return step(*args)  # type: ignore[arg-type]

        prefill.engine.step = counted  # type: ignore[method-assign,assignment]
        reader.read_until(lambda: "a" in reader.tokens)
        before = calls
        reader.endpoint.pump(0.5)
        soon(lambda: calls > before)  # it looks now and then
        assert calls - before < 100
        reader.cancel("a", prefill)
        reader.read_until(lambda: "b" in reader.tokens)
        reader.cancel("b", prefill)


def test_a_client_that_does_not_read_is_cut_off_and_others_go_on(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "worker", "decode", ring_bytes=2**16) as worker,
        stranger("deaf") as deaf,
        client() as reader,
    ):
        params = SamplingParams(max_tokens=8000, temperature=0, ignore_eos=True, logprobs=20)
        request = Request("unread", oracle["chat"].prompt_ids, params)
        deaf.send(worker, pack(Kind.GENERATE, Generate(request)))
        reader.meet(worker)
        reader.generate(Request("r", oracle["code"].prompt_ids, greedy(32)), worker, None)
        assert reader.answers("r")["r"] == oracle["code"].output_ids
        while not worker.holds_nothing:
            reader.generate(Request("s", oracle["code"].prompt_ids, greedy(8)), worker, None)
            assert reader.answers("s")["s"][:8] == oracle["code"].output_ids[:8]
            reader.tokens.clear()
        assert deaf.is_cut_off()


def test_a_worker_that_leaves_says_so_and_goes_on_until_its_watchers_are_gone(
    demo: LocalModel, oracle
) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode") as decode,
        client("one") as one,
        client("two") as two,
    ):
        for reader in (one, two):
            reader.meet(prefill, decode)
            for worker in (prefill, decode):
                reader.watch(worker)
                assert not reader.read_status(worker).leaving
        one.generate(Request("before", oracle["code"].prompt_ids, greedy()), prefill, decode)
        for worker in (prefill, decode):
            worker.worker.leave()
            one.read_until(lambda worker=worker: one.status[worker.name].leaving)
        # Sent by somebody who has not heard of it: it is run all the same.
        one.generate(Request("after", oracle["chat"].prompt_ids, greedy()), prefill, decode)
        answers = one.answers("before", "after")
        assert answers == {"before": oracle["code"].output_ids, "after": oracle["chat"].output_ids}
        for worker in (prefill, decode):
            assert not worker.worker.has_left
            one.endpoint.disconnect(worker.name)
        soon(lambda: prefill.worker._watchers == decode.worker._watchers == {"two"})
        assert not prefill.worker.has_left
        two.endpoint.disconnect("prefill")
        soon(lambda: prefill.worker.has_left)
        assert not decode.worker.has_left


def test_a_worker_counts_what_its_tokens_took(demo: LocalModel, oracle) -> None:
    with (
        running(demo, "prefill", "prefill") as prefill,
        running(demo, "decode", "decode") as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        for name in ("code", "chat"):
            reader.generate(Request(name, oracle[name].prompt_ids, greedy(20)), prefill, decode)
        reader.answers("code", "chat")
        soon(lambda: decode.worker.status.decode_tokens == 2 * 19)
        told = decode.worker.status
        assert 0 < told.busy_seconds <= told.decode_seconds <= 2 * told.busy_seconds
        length = sum(len(oracle[name].prompt_ids) for name in ("code", "chat"))
        soon(lambda: prefill.worker.status.prefilled_tokens == length)
        assert prefill.worker.status.busy_seconds > 0
        assert prefill.worker.status.decode_tokens == told.prefilled_tokens == 0

"""Engines whose experts are on other GPUs, from JOIN to tokens; carriers between threads stand for those."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest

from model.sampling_params import SamplingParams
from tests.workers.conftest import OraclePrompt
from tests.workers.paired import SECONDS, Model, Pool, alone, attention, new_host, paired, pool
from tests.workers.test_gpu_dispatch import demo_config, moe_layers
from tests.workers.workers import TOKEN, client, running, soon
from workers.dispatch import WorkerLost
from workers.engine import Engine, EngineConfig
from workers.gpu_experts import StepPlan
from workers.placement import PlacementError
from workers.schedule import Batch
from workers.sequence import Request
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import Message
from workers.transport.protocol import Deadline, PeerLost, Received
from workers.wire import Join, Kind, Refused, pack, unpack

PROMPTS = ("code", "chat")


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Whatever a test did, its ways end."""
    yield
    soon(lambda: not [thread for thread in threading.enumerate() if "/rows/" in thread.name], SECONDS)


def ask(engine: Engine, oracle: dict[str, OraclePrompt], max_tokens: int = 6) -> None:
    for number, name in enumerate(PROMPTS):
        params = SamplingParams(max_tokens=max_tokens + number, temperature=0, ignore_eos=True)
        engine.add(Request(name, oracle[name].prompt_ids, params))


def drain(engine: Engine) -> dict[str, list[int]]:
    answers: dict[str, list[int]] = {}
    while not engine.is_idle:
        for token in engine.step():
            answers.setdefault(token.uid, []).append(token.token_id)
    engine.pool.check_idle()
    return answers


def answers_alone(pool: Pool, oracle: dict[str, OraclePrompt]) -> dict[str, list[int]]:
    engine = alone(pool, EngineConfig())
    ask(engine, oracle)
    return drain(engine)


@pytest.mark.parametrize(
    ("num_hosts", "num_drafts", "micro_batches", "records"),
    [(1, 0, 1, True), (2, 1, 2, True), (1, 2, 3, False), (2, 3, 2, True)],
)
def test_tokens_are_those_of_one_process(
    oracle: dict[str, OraclePrompt],
    monkeypatch: pytest.MonkeyPatch,
    num_hosts: int,
    num_drafts: int,
    micro_batches: int,
    records: bool,
) -> None:
    """Chunks of prompts, then steps that are recorded and launched ahead, or run operation by operation."""
    config = EngineConfig(30, num_drafts, micro_batches=micro_batches, sequences=8)
    with (
        pool(num_hosts, monkeypatch) as (experts, _),
        attention(experts, "attention", config, records=records) as (engine, ways, graphs),
    ):
        ask(engine, oracle)
        assert drain(engine) == answers_alone(experts, oracle)
        assert bool(graphs and graphs._steps) == records
        assert ways.stats.tokens
        plans = [host.seats[0]._stepper._graphs for host in experts.hosts]
        assert all(plan.captured for each in plans for plan in each)
        assert all(bool(each) == records for each in plans), "as many recordings there as here"


def at_layer(layer: int, act: Callable[[], None]) -> Callable[[Batch, int], None]:
    def on_layer(batch: Batch, number: int) -> None:
        if number == layer:
            act()

    return on_layer


@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_an_expert_that_dies_in_the_middle_of_a_step_loses_that_step(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The requests of the step are lost; under the next placement they have the same tokens."""
    with (
        pool(2, monkeypatch) as (experts, meeting),
        attention(experts, "attention", EngineConfig(chunk=30)) as (engine, ways, graphs),
    ):
        assert graphs
        expected = answers_alone(experts, oracle)
        ask(engine, oracle)
        dead = experts.hosts[1]

        def kill() -> None:
            dead.seats[0].abort("killed")

        if when == "decode":  # whichever hears of it first: who announces, or who looks for answers
            while not graphs._steps:
                engine.step()
            kill()
        with pytest.raises(WorkerLost, match="experts-1"):
            engine.step(at_layer(moe_layers()[0], kill))
        for uid in engine.running_uids:
            engine.cancel(uid)
        drain(engine)
        experts.replace(1)
        ask(engine, oracle)
        assert drain(engine) == expected
        assert ways.is_current
        old = [carrier for carrier in meeting.carriers if carrier.failure]
        assert len(old) == 4, "both ways of the old placement, at both ends"
        soon(lambda: all(carrier.is_closed for carrier in old))


def test_a_warm_up_is_announced_too(oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pool(1, monkeypatch) as (experts, _),
        attention(experts, "attention", EngineConfig(chunk=32, sequences=1)) as (engine, _, graphs),
    ):
        warmed = engine.warm_up()
        assert warmed
        assert warmed.done == warmed.planned
        assert graphs
        assert graphs._steps
        ask(engine, oracle)
        assert drain(engine) == answers_alone(experts, oracle)


def test_a_worker_outlives_its_experts(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The requests of a step that an expert takes with it are lost, and so are those that find none."""
    with pool(2, monkeypatch) as (experts, _):
        expected = answers_alone(experts, oracle)["code"]
        attending = paired(experts, "worker", EngineConfig(), layer_seconds=3.0)
        with (
            closing(attending),
            running(Model(attending), "worker", "decode") as worker,  # type: ignore[arg-type]
            client() as reader,
        ):
            reader.meet(worker)
            code = oracle["code"].prompt_ids
            long = SamplingParams(max_tokens=300, temperature=0, ignore_eos=True)
            reader.generate(Request("long", code, long), worker, None)
            reader.read_until(lambda: len(reader.tokens.get("long", [])) > 3)
            experts.hosts[1].end()
            assert reader.why_failed("long", SECONDS) == "experts_lost"
            reader.generate(Request("early", code, long), worker, None)
            assert reader.why_failed("early", SECONDS) == "experts_lost"
            experts.hosts[1] = new_host(1, experts.hosts[1].groups)
            experts.next_epoch()
            short = SamplingParams(max_tokens=len(expected), temperature=0, ignore_eos=True)
            reader.generate(Request("late", code, short), worker, None)
            assert reader.answers("late")["late"] == expected


def test_recordings_are_forgotten_with_the_carriers_they_hold(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new placement is taken up between two steps, and nothing is lost."""
    with (
        pool(1, monkeypatch) as (experts, _),
        attention(experts, "attention", EngineConfig()) as (engine, ways, graphs),
    ):
        assert graphs
        ask(engine, oracle, max_tokens=12)
        tokens = [token for _ in range(4) for token in engine.step()]
        (before,) = graphs._steps.values()
        experts.next_epoch()
        assert not ways.is_current
        while not engine.is_idle:
            tokens += engine.step()
        assert graphs._steps
        assert before not in graphs._steps.values()
        engine = alone(experts, EngineConfig())
        ask(engine, oracle, max_tokens=12)
        expected = drain(engine)
        assert {uid: [t.token_id for t in tokens if t.uid == uid] for uid in PROMPTS} == expected


def test_a_step_waits_for_experts_and_not_for_ever(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pool(1, monkeypatch) as (experts, _),
        attention(experts, "attention", EngineConfig(), layer_seconds=1.0) as (engine, _, _),
    ):
        experts.hosts[0].end()
        ask(engine, oracle)
        started = time.monotonic()
        with pytest.raises(WorkerLost, match="experts-0"):
            engine.step()
        assert time.monotonic() - started < 5
        experts.hosts[0] = new_host(0, experts.hosts[0].groups)
        threading.Timer(0.3, experts.next_epoch).start()
        assert drain(engine) == answers_alone(experts, oracle)


def test_attention_comes_and_goes_while_others_work(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EngineConfig()
    with pool(1, monkeypatch) as (experts, _), attention(experts, "first", config) as (first, _, _):
        expected = answers_alone(experts, oracle)
        ask(first, oracle)
        answers: dict[str, list[int]] = {}
        for _ in range(3):
            for token in first.step():
                answers.setdefault(token.uid, []).append(token.token_id)
        with attention(experts, "second", config) as (second, _, _):
            ask(second, oracle)
            second.step()
            assert len(experts.hosts[0].seats) == 2
            assert experts.hosts[0].urgent == [True, False], "each has a stream of its own kind"
        soon(lambda: len(experts.hosts[0].seats) == 1)
        for uid, more in drain(first).items():
            answers[uid] += more
        assert answers == expected


def test_a_plan_that_cannot_be_run_ends_its_own_seat(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig()
    with (
        pool(1, monkeypatch) as (experts, _),
        attention(experts, "good", config) as (good, _, _),
        attention(experts, "bad", config) as (_, bad, _),
    ):
        ask(good, oracle)
        answers = {token.uid: [token.token_id] for token in good.step()}
        for wrong in (StepPlan((1,), (0,)).message(2), Message(99)):
            bad.prepare()
            (way,) = bad._ways
            with caplog.at_level(logging.WARNING):
                way._endpoint.send(way.peer.carrier.peer, wrong, Deadline.after(1))
                soon(lambda: not bad.is_current)
            with pytest.raises(WorkerLost):
                bad.check(lambda: None)
        assert "layer 0 has no experts here" in caplog.text
        assert "bad/rows/2 sent what it should not" in caplog.text
        for uid, more in drain(good).items():
            answers[uid] += more
        assert answers == answers_alone(experts, oracle)


def test_a_pass_that_fails_at_the_attention_is_given_up_at_the_experts(
    oracle: dict[str, OraclePrompt], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise MemoryError("out of something")

    with (
        pool(2, monkeypatch) as (experts, _),
        attention(experts, "attention", EngineConfig()) as (engine, ways, _),
    ):
        ask(engine, oracle)
        with pytest.raises(MemoryError):
            engine.step(at_layer(moe_layers()[1], fail))
        assert not ways.is_current
        soon(lambda: not any(host.seats for host in experts.hosts))
        assert drain(engine) == answers_alone(experts, oracle), "nothing of the step has counted"


@pytest.mark.parametrize(
    ("join", "says"),
    [
        (Join(1, 64, 99, True), "its placement has epoch 2, ours 99"),
        (Join(4, 64, 2, True), "4 micro-batches of 64 rows were asked for; at most 3 of 16384 fit"),
        (Join(1, 0, 2, True), "1 micro-batches of 0 rows"),
        (Join(1, 16385, 2, True), "16385 rows"),
    ],
)
def test_who_asks_for_too_much_gets_no_seat(join: Join, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = PeerEndpoint(EndpointConfig("stranger", TOKEN))
    with pool(1, monkeypatch) as (experts, _):
        (host,) = experts.hosts
        endpoint.connect(host.endpoint.address, Deadline.after(SECONDS))
        endpoint.send("experts-0", pack(Kind.JOIN, join), Deadline.after(SECONDS))
        answer = endpoint.receive(Deadline.after(SECONDS))
        assert isinstance(answer, Received)
        assert says in unpack(Refused, answer.message).reason
        endpoint.send("experts-0", Message(99), Deadline.after(SECONDS))
        assert isinstance(endpoint.receive(Deadline.after(SECONDS)), PeerLost)
        assert host.host
        assert host.host.num_refused == 2
        assert not host.seats
    endpoint.close()


def test_experts_serve_exactly_the_groups_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    with pool(2, monkeypatch) as (experts, _):
        experts.hosts.reverse()
        with pytest.raises(PlacementError, match="the placement asks for"):
            experts.next_epoch()
        experts.hosts.reverse()


def test_passes_have_room() -> None:
    """What carriers are made for is the most that an engine launches."""
    assert EngineConfig(chunk=2048, num_drafts=3, sequences=256).most_rows(demo_config()) == 2048
    assert EngineConfig(chunk=64, num_drafts=3, sequences=200).most_rows(demo_config()) == 4 * 224

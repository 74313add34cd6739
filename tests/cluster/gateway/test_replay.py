"""Requests that outlive their workers: real workers end and begin, and the reader sees every token once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from cluster.gateway.backend import Backend
from cluster.gateway.errors import ExpertsLost, Overloaded, ReplicaLost, StepFailed
from cluster.gateway.journal import Journal
from cluster.gateway.metrics import Metrics
from cluster.gateway.replay import ReplayedStream
from cluster.gateway.tracing import NoTracing
from model.errors import RequestError
from model.sampling_params import SamplingParams
from tests.checkpoints import DEMO
from tests.cluster.gateway.backends import Listed, greedy, prompts, run, started
from tests.workers.workers import Worker, running
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request, Token
from workers.wire import Role

SAMPLED = SamplingParams(
    max_tokens=24, temperature=0.9, top_p=0.95, seed=5, presence_penalty=0.4, repetition_penalty=1.1,
    logprobs=2, ignore_eos=True,
)  # fmt: skip
PROMPT = prompts()["code"].ids


@pytest.fixture(scope="module")
def exact() -> LocalModel:
    """The demo in arithmetic that does not depend on how a text is cut into steps."""
    return LocalModel(DEMO, ModelOptions(kernels="deterministic"))


def undisturbed(model: LocalModel, request: Request) -> list[Token]:
    engine = model.engine(EngineConfig(), 2048)
    engine.add(request)
    tokens = []
    while not engine.is_idle:
        tokens += engine.step()
    return tokens


@asynccontextmanager
async def replayed(backend: Backend, request: Request, metrics: Metrics) -> AsyncIterator["Reader"]:
    with Journal(10_000).entry(request, "digest") as entry:
        stream = await ReplayedStream(backend, entry, metrics, NoTracing()).open()
        try:
            yield Reader(stream, entry.record)
        finally:
            await stream.aclose()


class Reader:
    """Reads as an `Answer` does: the journal first."""

    def __init__(self, stream: ReplayedStream, record) -> None:
        self._stream, self._record = stream, record
        self.tokens: list[Token] = []

    async def read(self, most: int = 1000) -> None:
        while most and (token := await anext(self._stream, None)):
            self._record(token.token_id)
            self.tokens.append(token)
            most -= 1


@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("params", [greedy(24), SAMPLED], ids=["greedy", "sampled"])
def test_two_lost_decode_workers_change_nothing(
    exact: LocalModel, params: SamplingParams, num_drafts: int
) -> None:
    request = Request("r", PROMPT, params)
    expected = undisturbed(exact, request)
    metrics = Metrics()

    async def work() -> None:
        async with started(exact, listed) as backend, replayed(backend, request, metrics) as reader:
            for number in range(2):
                await reader.read(4)
                decode[-1].end()
                listed.entries.pop(decode[-1].name)
                decode.append(stack.enter_context(worker(f"decode-{number}", is_idle_at_end=number == 1)))
                listed.add("decode", decode[-1])
            await reader.read()
            assert reader.tokens == expected

    def worker(name: str, role: Role = "decode", **options: Any) -> AbstractContextManager[Worker]:
        return running(
            exact, name, role, config=EngineConfig(num_drafts=num_drafts), lease_seconds=60, **options
        )

    with ExitStack() as stack:
        listed = Listed()
        listed.add("prefill", stack.enter_context(worker("prefill", "prefill")))
        decode = [stack.enter_context(worker("decode", is_idle_at_end=False))]
        listed.add("decode", decode[0])
        run(work())
    assert metrics.replays._value.get() == 2


def test_a_prefill_worker_lost_before_the_first_token(exact: LocalModel) -> None:
    request = Request("r", prompts()["lookup_1000"].ids, greedy(4))
    expected = prompts()["lookup_1000"].answer[:4]

    async def work() -> None:
        async with started(exact, listed) as backend, replayed(backend, request, Metrics()) as reader:
            prefill.end()  # while it computes the prompt; for a while nobody is there
            listed.entries.pop("prefill")
            reading = asyncio.create_task(reader.read())
            await asyncio.sleep(0.5)
            listed.add("prefill", stack.enter_context(running(exact, "another", "prefill", lease_seconds=60)))
            await reading
            assert [token.token_id for token in reader.tokens] == expected

    with ExitStack() as stack:
        listed = Listed()
        prefill = stack.enter_context(running(exact, "prefill", "prefill", is_idle_at_end=False))
        listed.add("prefill", prefill)
        listed.add("decode", stack.enter_context(running(exact, "decode", "decode", lease_seconds=60)))
        run(work())


class Scripted:
    """A backend whose runs end as they are told to; what was asked of it."""

    def __init__(self, *ends: Exception | None) -> None:
        self._ends = list(ends)
        self.requests: list[Request] = []

    def check_room(self) -> None:
        assert not self.requests, "a replay has its room"

    async def generate(self, request: Request) -> AsyncIterator[Token]:
        self.requests.append(request)
        end = self._ends.pop(0)
        if isinstance(end, Overloaded) and len(self.requests) > 1:
            raise end
        return self._tokens(request, end)

    async def _tokens(self, request: Request, end: Exception | None) -> AsyncIterator[Token]:
        start = len(request.prompt_ids)
        for position in range(start, start + 2):
            yield Token(request.uid, position, position, num_prompt_cached=64 * len(self.requests))
        if end:
            raise end
        yield Token(request.uid, start + 2, start + 2, "length")


def read_all(backend: Scripted, monkeypatch: pytest.MonkeyPatch) -> list[Token]:
    async def work() -> None:
        async with replayed(backend, Request("r", (1, 2, 3), greedy(99)), Metrics()) as reader:
            readers.append(reader)
            await reader.read()

    readers: list[Reader] = []
    monkeypatch.setattr("cluster.gateway.replay._PAUSES", (0.0,) * 5)
    monkeypatch.setattr("cluster.gateway.replay._RETRY_SECONDS", 0.0)
    try:
        run(work())
    finally:
        assert [token.position for token in readers[0].tokens] == list(range(3, 3 + len(readers[0].tokens)))
        assert {(token.uid, token.num_prompt_cached) for token in readers[0].tokens} <= {("r", 64), ("r", 0)}
    return readers[0].tokens


def test_a_replay_is_a_request_of_its_own_with_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(ReplicaLost(), Overloaded("nobody is there"), ReplicaLost(), None)
    assert len(read_all(backend, monkeypatch)) == 7
    uids, known, resumed = zip(
        *((each.uid, each.prompt_ids, each.num_resumed) for each in backend.requests), strict=True
    )
    assert uids == ("r", "r-1", "r-1", "r-2")
    assert known == ((1, 2, 3), (1, 2, 3, 3, 4), (1, 2, 3, 3, 4), (1, 2, 3, 3, 4, 5, 6))
    assert resumed == (0, 2, 2, 4)
    assert {each.longest for each in backend.requests} == {3 + 99}


def test_what_ends_its_worker_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(*[ReplicaLost()] * 9)
    with pytest.raises(ReplicaLost):
        read_all(backend, monkeypatch)
    assert len(backend.requests) == 6


def test_experts_that_are_away_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_all(Scripted(*[ExpertsLost()] * 8, None), monkeypatch)) == 2 * 8 + 3


def test_what_fails_its_step_runs_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(read_all(Scripted(StepFailed(), None), monkeypatch)) == 5
    backend = Scripted(*[StepFailed()] * 9)
    with pytest.raises(StepFailed):
        read_all(backend, monkeypatch)
    assert len(backend.requests) == 2


def test_a_first_run_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Scripted(Overloaded("full"), None)
    with pytest.raises(Overloaded, match="full"):
        read_all(backend, monkeypatch)


@pytest.mark.parametrize(("num_resumed", "max_tokens"), [(-1, 8), (3, 8), (2, 2)])
def test_a_request_that_cannot_be_a_rest_is_refused(
    exact: LocalModel, num_resumed: int, max_tokens: int
) -> None:
    engine: Engine = exact.engine(EngineConfig(), 256)
    request = replace(Request("r", (1, 2, 3), greedy(max_tokens)), num_resumed=num_resumed)
    with pytest.raises(RequestError, match="num_resumed"):
        engine.add(request)

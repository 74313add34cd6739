"""The open loop: nothing waits for answers but a session's own next turn."""

import asyncio
import time
from collections.abc import Callable, Sequence

from cluster.bench.load import LEAD_SECONDS, LoadGenerator, LoadLimits, Progress
from cluster.bench.outcome import Outcome
from cluster.bench.plan import Session, Turn
from cluster.bench.prompts import PromptMaker, TokenCost
from cluster.bench.reading import Failed, Message, Reading

LIMITS = LoadLimits(timeout=5.0, max_open=100)


class Pretender:
    """A server in one object: answers with one word a token, `pause` seconds apart."""

    def __init__(self, pause: float = 0.0, failing: Sequence[int] = ()) -> None:
        self._pause, self._failing = pause, failing
        self.asked: list[list[Message]] = []
        self.most_open = self._open = 0

    async def model(self) -> str:
        return "pretended"

    async def ask(self, model: str, messages: list[Message], max_tokens: int, reading: Reading) -> None:
        self.asked.append(list(messages))
        number = len(self.asked) - 1
        self._open += 1
        self.most_open = max(self.most_open, self._open)
        try:
            for index in range(max_tokens):
                await asyncio.sleep(self._pause)
                if number in self._failing:
                    raise Failed("http 503", "full")
                reading.add(f" answer{number}.{index}")
            reading.finish()
            reading.answer_tokens = max_tokens
        finally:
            self._open -= 1

    async def aclose(self) -> None: ...


def load(
    client: Pretender, sessions: Sequence[Session], limits: LoadLimits = LIMITS, shared: int = 0,
    is_hopeless: Callable[[Outcome], bool] = lambda outcome: False,
) -> list[Outcome]:  # fmt: skip
    maker = PromptMaker(1, TokenCost())
    progress = Progress()
    generator = LoadGenerator(client, "pretended", maker, shared, limits, progress, is_hopeless)
    asyncio.run(generator.run(list(enumerate(sessions)), time.perf_counter() + LEAD_SECONDS))
    assert progress.num_open == 0
    assert progress.loop_delays or len(sessions) == 0
    return sorted(progress.outcomes, key=lambda outcome: (outcome.session, outcome.turn))


def single(at: float, tokens: int = 2) -> Session:
    return Session(at, (Turn(int(at * 1000), 5, tokens),))


def test_arrivals_never_wait_for_answers() -> None:
    client = Pretender(pause=0.25)
    outcomes = load(client, [single(index * 0.02) for index in range(10)])
    assert client.most_open == 10
    for index, outcome in enumerate(outcomes):
        assert outcome.sent is not None
        assert outcome.sent >= outcome.planned == index * 0.02
        assert outcome.ttft is not None
        assert outcome.e2e is not None
        assert outcome.tpot is not None
        assert 0.25 <= outcome.ttft < outcome.e2e
        assert outcome.e2e >= 0.5


def test_one_too_many_open_is_an_error_and_no_wait() -> None:
    client = Pretender(pause=0.2)
    outcomes = load(client, [single(0.0)] * 5 + [single(1.0)], LoadLimits(timeout=5, max_open=3))
    assert [outcome.error for outcome in outcomes] == [None] * 3 + ["too many open"] * 2 + [None]
    assert client.most_open == 3
    assert all(outcome.sent is None for outcome in outcomes if outcome.error)


def test_a_session_sends_what_was_said_and_waits_between_turns() -> None:
    client = Pretender(pause=0.01)
    turns = (Turn(0, 4, 2), Turn(1, 3, 1, think=0.2), Turn(2, 3, 1, think=0.0))
    first, second, third = load(client, [Session(0.0, turns)], shared=6)
    assert [[message.role for message in messages] for messages in client.asked] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user", "assistant", "user", "assistant", "user"],
    ]
    assert client.asked[2][:3] == client.asked[1]
    assert client.asked[1][1].content == " answer0.0 answer0.1"
    assert len(client.asked[0][0].content.split()) == 6 + 4
    assert len(client.asked[1][2].content.split()) == 3
    assert second.planned == first.ended + 0.2
    assert third.planned == second.ended


def test_sessions_share_the_prefix_and_nothing_else() -> None:
    client = Pretender()
    load(client, [Session(0.0, (Turn(0, 20, 1),)), Session(0.0, (Turn(1, 20, 1),))], shared=6)
    one, other = (messages[0].content.split() for messages in client.asked)
    assert one[:6] == other[:6]
    assert one[6:10] != other[6:10]


def test_a_failed_turn_ends_its_session_and_the_rest_is_counted() -> None:
    client = Pretender(failing=[1])
    outcomes = load(client, [Session(0.0, tuple(Turn(key, 2, 1) for key in range(4)))])
    lost = "earlier turn failed"
    assert [outcome.error for outcome in outcomes] == [None, "http 503", lost, lost]
    assert len(client.asked) == 2


def test_an_answer_that_takes_too_long_is_a_timeout() -> None:
    (outcome,) = load(Pretender(pause=0.15), [single(0.0, tokens=100)], LoadLimits(timeout=0.4, max_open=1))
    assert outcome.error == "timeout"
    assert outcome.ttft is not None
    assert outcome.e2e is None
    assert 0.4 <= outcome.ended - (outcome.sent or 0) < 3


def test_an_answer_without_text_is_empty() -> None:
    (outcome,) = load(Pretender(), [single(0.0, tokens=0)])
    assert outcome.error == "empty"


def test_a_hopeless_run_ends_at_once() -> None:
    client = Pretender(failing=[0])
    sessions = [single(0.0), *(single(30.0) for _ in range(5))]
    outcomes = load(client, sessions, is_hopeless=lambda outcome: outcome.error is not None)
    assert [outcome.error for outcome in outcomes] == ["http 503"]

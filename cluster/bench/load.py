"""The open loop: sessions begin when they are due, whatever has become of those before."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cluster.bench.outcome import HISTORY_LOST, TOO_MANY_OPEN, Outcome
from cluster.bench.plan import Session, Turn
from cluster.bench.prompts import PromptMaker
from cluster.bench.reading import Client, Failed, Message, Reading

LEAD_SECONDS = 0.2  # before the first arrival, for the loop to come to rest
_TICK_SECONDS = 0.02


@dataclass(frozen=True, kw_only=True)
class LoadLimits:
    """`timeout`: seconds for one answer. `max_open`: requests open at once; one too many is an error."""

    timeout: float
    max_open: int


@dataclass
class Progress:
    """What has happened so far; the loop writes it, whoever draws a progress line reads it.

    Attributes:
        origin: the beginning, on `time.perf_counter()`; infinite until it is known.
        loop_delays: seconds by which the generator's own loop was late for each tick.
    """

    origin: float = math.inf
    num_sent: int = 0
    num_open: int = 0
    num_tokens: int = 0
    num_failed: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    loop_delays: list[float] = field(default_factory=list)

    def note(self, outcome: Outcome) -> None:
        """Counts one more."""
        self.outcomes.append(outcome)
        self.num_tokens += outcome.tokens
        self.num_failed += outcome.error is not None


Numbered = tuple[int, Session]
"""A session and its number in the plan."""


class _GivenUp(Exception):
    """The rest of the run is not wanted."""


class LoadGenerator:
    """Sends one plan.

    Args:
        client, model: to whom.
        maker: of the prompts.
        shared_tokens: of a beginning that all sessions have in common; 0 for none.
        limits: of the requests.
        progress: written as it goes.
        is_hopeless: looked at after each outcome; True ends the run.
    """

    def __init__(
        self, client: Client, model: str, maker: PromptMaker, shared_tokens: int, limits: LoadLimits,
        progress: Progress, is_hopeless: Callable[[Outcome], bool] = lambda outcome: False,
    ) -> None:  # fmt: skip
        self._client, self._model, self._maker, self._limits = client, model, maker, limits
        self._shared = maker.shared(shared_tokens)
        self._is_hopeless = is_hopeless
        self.progress = progress

    async def run(self, sessions: Sequence[Numbered], origin: float) -> None:
        """Sends everything and waits for all answers; what is open when it is given up is not counted.

        Args:
            sessions: by arrival.
            origin: the beginning, on `time.perf_counter()`.
        """
        progress = self.progress
        progress.origin = origin
        watch = asyncio.create_task(self._watch_loop())
        try:
            async with asyncio.TaskGroup() as group:
                for index, session in sessions:
                    await self._until(session.at)
                    if progress.num_open >= self._limits.max_open:
                        self._skip(index, session, 0, TOO_MANY_OPEN)
                    else:
                        progress.num_open += 1
                        group.create_task(self._session(index, session))
        except* _GivenUp:
            pass
        finally:
            watch.cancel()

    async def _session(self, index: int, session: Session) -> None:
        """One conversation: each turn has all before it, as it was really said."""
        history: list[Message] = []
        due = session.at
        for number, turn in enumerate(session.turns):
            if number:
                due += turn.think
                await self._until(due)
                if self.progress.num_open >= self._limits.max_open:
                    self._skip(index, session, number, TOO_MANY_OPEN, due)
                    return
                self.progress.num_open += 1
            history.append(Message("user", self._question(number, turn)))
            outcome, said = await self._ask(index, number, turn, due, history)
            if outcome.error is not None:
                self._skip(index, session, number + 1, HISTORY_LOST, outcome.ended)
                return
            history.append(Message("assistant", said))
            due = outcome.ended

    def _question(self, number: int, turn: Turn) -> str:
        text = self._maker.text(turn.prompt_tokens, turn.key) if turn.text is None else turn.text
        return text if number else self._shared + text

    async def _ask(
        self, index: int, number: int, turn: Turn, due: float, messages: list[Message]
    ) -> tuple[Outcome, str]:
        progress, reading, failed = self.progress, Reading(), None
        sent = time.perf_counter()
        progress.num_sent += 1
        try:
            async with asyncio.timeout(self._limits.timeout):
                await self._client.ask(self._model, messages, turn.max_tokens, reading)
        except Failed as error:
            failed = error
        except TimeoutError:
            failed = Failed("timeout", f"no whole answer within {self._limits.timeout:g} s")
        finally:
            progress.num_open -= 1
        outcome = Outcome.of(
            index, number, due, sent, progress.origin, turn.max_tokens, reading, failed, time.perf_counter()
        )
        self._note(outcome)
        return outcome, "".join(reading.texts)

    def _skip(self, index: int, session: Session, first: int, error: str, due: float | None = None) -> None:
        """Counts turns that are never sent, from `first` on."""
        for number, turn in enumerate(session.turns[first:], first):
            moment = session.at if due is None else due
            self._note(Outcome.unsent(index, number, moment, turn.max_tokens, error))
            error = HISTORY_LOST

    def _note(self, outcome: Outcome) -> None:
        self.progress.note(outcome)
        if self._is_hopeless(outcome):
            raise _GivenUp

    async def _until(self, moment: float) -> None:
        """Waits for a moment of the run; at once where it has passed."""
        await asyncio.sleep(max(0.0, self.progress.origin + moment - time.perf_counter()))

    async def _watch_loop(self) -> None:
        """Notes how late the loop is: as late are the moments that are measured in it."""
        due = time.perf_counter()
        while True:
            due = max(due + _TICK_SECONDS, time.perf_counter())
            await asyncio.sleep(due - time.perf_counter())
            self.progress.loop_delays.append(max(0.0, time.perf_counter() - due))

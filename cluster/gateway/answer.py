"""An answer on its way to a client: typed events, whatever the protocol.

Each choice is read by a task of its own (`_pump`), which writes the journal before it passes anything on.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

from cluster.gateway.backend import TokenStream
from cluster.gateway.errors import Kind, Refusal, as_refusal
from cluster.gateway.journal import JournalEntry
from cluster.gateway.metrics import Metrics
from model.chat.events import ContentDelta, Event, ToolCallStart
from model.sampling import TokenLogprobs
from workers.answer import ChatAnswer, TextAnswer
from workers.sequence import Token

Reason = Literal["stop", "length", "tool_calls"]

# Events that may wait for a slow client before its choices stop being read.
_MAX_WAITING_EVENTS = 256


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token as it was drawn, for those who asked for ids or log-probabilities."""

    token_id: int
    logprobs: TokenLogprobs | None
    in_reasoning: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """More of one choice. Text is held back while it may change, so `tokens` can come without events."""

    choice: int
    events: tuple[Event, ...]
    tokens: tuple[DrawnToken, ...] = ()


@dataclass(frozen=True, slots=True)
class Finish:
    """One choice is complete."""

    choice: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Usage:
    """What was spent, all choices together; the last event of a complete answer."""

    prompt_tokens: int
    cached_tokens: int
    answer_tokens: int
    reasoning_tokens: int


AnswerEvent = Delta | Finish | Usage


class ChoiceReader:
    """Tokens of one choice to events, and the counts for its usage.

    Args:
        text: what turns tokens into text or chat events.
        end_of_reasoning: id of the token that ends reasoning; None where the answer has none.
    """

    def __init__(self, choice: int, text: TextAnswer | ChatAnswer, end_of_reasoning: int | None) -> None:
        self._choice, self._text, self._end_of_reasoning = choice, text, end_of_reasoning
        self._in_reasoning = end_of_reasoning is not None
        self._has_calls = False
        self.num_tokens = self.num_reasoning = self.num_cached = 0
        self.reason: Reason | None = None  # why it is complete

    def push(self, token: Token) -> list[Delta | Finish]:
        """What a token makes certain."""
        self.num_tokens += 1
        self.num_cached = token.num_prompt_cached
        if token.token_id == self._end_of_reasoning:
            self._in_reasoning = False
        self.num_reasoning += self._in_reasoning
        pushed = self._text.push(token)
        events = tuple(pushed) if isinstance(pushed, list) else (ContentDelta(pushed),) if pushed else ()
        self._has_calls = self._has_calls or any(isinstance(event, ToolCallStart) for event in events)
        # A token that ends the answer by its id is no part of it.
        is_shown = token.finish_reason != "stop"
        drawn = (DrawnToken(token.token_id, token.logprobs, self._in_reasoning),) if is_shown else ()
        out: list[Delta | Finish] = []
        if events or drawn:
            out.append(Delta(self._choice, events, drawn))
        if reason := "stop" if self._text.stopped else token.finish_reason:
            self.reason = "tool_calls" if self._has_calls and reason == "stop" else reason
            out.append(Finish(self._choice, self.reason))
        return out


class Answer:
    """The events of one accepted request. Whoever has it must close it.

    Args:
        uid: of the request; ids that clients see are made of it.
        prompt_tokens: length of the prompt.
        first_token_seconds, total_seconds: budgets, from now on.
        on_close: what gives back what was taken for the answer; called once.
    """

    def __init__(
        self,
        uid: str,
        prompt_tokens: int,
        metrics: Metrics,
        *,
        first_token_seconds: float,
        total_seconds: float,
        on_close: ExitStack,
    ) -> None:
        self.uid, self.prompt_tokens = uid, prompt_tokens
        self.created = int(time.time())
        self.first_token_seconds: float | None = None
        self._metrics, self._on_close = metrics, on_close
        self._started = asyncio.get_running_loop().time()
        self._deadline = self._started + min(first_token_seconds, total_seconds)
        self._total_deadline = self._started + total_seconds
        self._events: asyncio.Queue[Delta | Finish | Refusal] = asyncio.Queue(_MAX_WAITING_EVENTS)
        self._readers: list[ChoiceReader] = []
        self._streams: list[TokenStream] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._num_unfinished = 0
        self._is_ended = False

    def read(self, stream: TokenStream, reader: ChoiceReader, entry: JournalEntry) -> None:
        """Starts to read one more choice."""
        self._readers.append(reader)
        self._streams.append(stream)
        self._num_unfinished += 1
        self._pumps.append(asyncio.create_task(self._pump(stream, reader, entry)))

    @property
    def num_tokens(self) -> int:
        """Drawn so far, all choices together."""
        return sum(reader.num_tokens for reader in self._readers)

    @property
    def finish_reasons(self) -> list[Reason]:
        """Of the choices that are complete."""
        return [reader.reason for reader in self._readers if reader.reason]

    def __aiter__(self) -> "Answer":
        return self

    async def __anext__(self) -> AnswerEvent:
        """The next event. May be cancelled and called again without losing one.

        Raises:
            Refusal: the answer stays incomplete.
        """
        if self._is_ended:
            raise StopAsyncIteration
        if not self._num_unfinished:
            self._is_ended = True
            return self._usage()
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await self._events.get()
        except TimeoutError:
            raise Refusal(Kind.TIMEOUT, "the time for this request is spent", None, 1.0) from None
        self._deadline = self._total_deadline
        if isinstance(event, Refusal):
            raise event
        if isinstance(event, Finish):
            self._num_unfinished -= 1
        return event

    async def aclose(self) -> None:
        """Cancels what still runs and gives everything back; a second time does nothing."""
        for pump in self._pumps:
            pump.cancel()
        self._on_close.close()
        self._is_ended = True
        for stream in self._streams:  # a pump that was cancelled before it began has closed nothing
            await stream.aclose()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _pump(self, stream: TokenStream, reader: ChoiceReader, entry: JournalEntry) -> None:
        last = self._started
        observe: Callable[[float], None] = self._metrics.first_token.observe
        clock = asyncio.get_running_loop().time
        try:
            async for token in stream:
                now = clock()
                if self.first_token_seconds is None:
                    self.first_token_seconds = now - self._started
                observe(now - last)
                last, observe = now, self._metrics.between_tokens.observe
                entry.record(token.token_id)
                self._metrics.answer_tokens.inc()
                for event in reader.push(token):
                    await self._events.put(event)
                if reader.reason:
                    break
        except Exception as error:
            await self._events.put(as_refusal(error))
        finally:
            await stream.aclose()

    def _usage(self) -> Usage:
        # Choices after the first find the pages of the first; the client pays for its prompt once.
        cached = self._readers[0].num_cached
        self._metrics.prompt_tokens.labels("hit").inc(cached)
        self._metrics.prompt_tokens.labels("miss").inc(self.prompt_tokens - cached)
        return Usage(
            self.prompt_tokens,
            cached,
            self.num_tokens,
            sum(reader.num_reasoning for reader in self._readers),
        )

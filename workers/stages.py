"""Where the time of a traced request went at the worker that ran it.

A `StageClock` watches an engine from outside and says, when a request ends there, which stages it went
through; whoever asked for it makes spans of them (cluster/telemetry). Nothing is kept of other requests.

Times are those of the wall clock of the worker's machine, in nanoseconds since 1970: stages of different
machines fit together as well as their clocks agree.
"""

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from workers.dispatch import DispatchStats
from workers.schedule import Batch
from workers.sequence import Request, Token


@dataclass(frozen=True)
class Queued:
    """Until the first chunk of the prompt began to run."""

    start_ns: int
    end_ns: int
    name: Literal["queue"] = "queue"


@dataclass(frozen=True)
class Prefilled:
    """The prompt, from its first chunk to the first token.

    Attributes:
        chunks: steps that ran a part of it.
        cached_tokens: of the prompt, found in pages.
        experts_seconds: in which those steps waited for experts elsewhere.
    """

    start_ns: int
    end_ns: int
    prompt_tokens: int
    cached_tokens: int
    chunks: int
    experts_seconds: float
    name: Literal["prefill"] = "prefill"


@dataclass(frozen=True)
class HandedOver:
    """The pages of the prompt, from asking for room until the other side had adopted them.

    Attributes:
        pages: that were sent, each layer's counted; `bytes` is their size.
        grant_seconds: until the other side had reserved pages.
        exposed_seconds: after the first token, when nothing else went on.
    """

    start_ns: int
    end_ns: int
    pages: int
    bytes: int
    grant_seconds: float
    exposed_seconds: float
    name: Literal["hand_over"] = "hand_over"


@dataclass(frozen=True)
class Decoded:
    """All tokens after the first.

    Attributes:
        accepted_drafts: of the tokens, those that cost no step of their own.
        first_step_seconds: until the first of these tokens; 0 where none came.
        experts_seconds: as of `Prefilled`.
    """

    start_ns: int
    end_ns: int
    steps: int
    tokens: int
    accepted_drafts: int
    first_step_seconds: float
    experts_seconds: float
    name: Literal["decode"] = "decode"


Stage = Queued | Prefilled | HandedOver | Decoded


@dataclass(frozen=True)
class Stages:
    """What a request went through at one worker, in order."""

    uid: str
    stages: tuple[Annotated[Stage, Field(discriminator="name")], ...]


@dataclass
class _Watched:
    """A request so far; times are 0 until they are known."""

    prompt_tokens: int
    arrived_ns: int = 0
    started_ns: int = 0
    first_ns: int = 0  # of the first token, wherever it was drawn
    cached_tokens: int = 0
    chunks: int = 0
    steps: int = 0
    tokens: int = 0
    first_step_ns: int = 0
    prefill_experts: float = 0.0
    decode_experts: float = 0.0
    handed_over: HandedOver | None = None

    def draw(self, num_tokens: int, now: int, waited: float) -> None:
        """A step has drawn tokens for it; the first one comes alone."""
        if not self.first_ns:
            self.first_ns = now
            return
        self.steps += 1
        self.tokens += num_tokens
        self.first_step_ns = self.first_step_ns or now
        self.decode_experts += waited

    def stages(self, now: int) -> Iterator[Stage]:
        """Those that have begun; the last one may have been cut short."""
        if self.arrived_ns:
            yield Queued(self.arrived_ns, self.started_ns or now)
        if self.started_ns:
            yield Prefilled(
                self.started_ns, self.first_ns or now, self.prompt_tokens, self.cached_tokens, self.chunks,
                self.prefill_experts,
            )  # fmt: skip
        if self.handed_over:
            yield self.handed_over
        elif self.steps or not self.arrived_ns:
            first_step = self.first_step_ns - self.first_ns if self.steps else 0
            yield Decoded(
                self.first_ns, now, self.steps, self.tokens, self.tokens - self.steps, first_step / 1e9,
                self.decode_experts,
            )  # fmt: skip


class StageClock:
    """Times the requests of one engine that are `traced`. One thread: the engine's.

    Args:
        dispatch: of the engine's experts, where they are elsewhere.
    """

    def __init__(self, dispatch: DispatchStats | None = None) -> None:
        self._dispatch = dispatch or DispatchStats()
        self._watched: dict[str, _Watched] = {}
        self._in_prefill: list[_Watched] = []  # whose chunks are in the step that runs
        self._step_ns = 0
        self._waited = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nobody asked for anything."""
        return not self._watched

    def arrived(self, request: Request) -> None:
        """A request waits to be prefilled here."""
        if request.traced:
            self._watched[request.uid] = _Watched(len(request.prompt_ids), arrived_ns=time.time_ns())

    def adopted(self, request: Request) -> None:
        """A request goes on here after its first token."""
        if request.traced:
            self._watched[request.uid] = _Watched(len(request.prompt_ids), first_ns=time.time_ns())

    def handed_over(self, uid: str, stage: HandedOver) -> None:
        """A request went on elsewhere."""
        if watched := self._watched.get(uid):
            watched.handed_over = stage

    def step_begins(self) -> None:
        """Before every step."""
        if self._watched:
            self._step_ns, self._waited = time.time_ns(), self._dispatch.wait_seconds
            self._in_prefill = []

    def on_layer(self, batch: Batch, layer: int) -> None:
        """As the engine tells: chunks of prompts run."""
        if layer or not self._watched:
            return
        for share in batch.shares:
            watched = self._watched.get(share.sequence.request.uid)
            if watched is None or share.sequence.phase == "decode":
                continue
            watched.started_ns = watched.started_ns or self._step_ns
            watched.cached_tokens = share.sequence.num_prompt_cached
            watched.chunks += 1
            self._in_prefill.append(watched)

    def step_ends(self, tokens: list[Token]) -> None:
        """After a step that did not fail."""
        if not self._watched:
            return
        now, waited = time.time_ns(), self._dispatch.wait_seconds - self._waited
        for prefilled in self._in_prefill:
            prefilled.prefill_experts += waited
        for uid, count in Counter(token.uid for token in tokens).items():
            if watched := self._watched.get(uid):
                watched.draw(count, now, waited)

    def end(self, uid: str) -> Stages | None:
        """What a request went through here, which has come to its end; None if nobody wants to know."""
        watched = self._watched.pop(uid, None)
        return Stages(uid, tuple(watched.stages(time.time_ns()))) if watched else None

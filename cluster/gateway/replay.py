"""A request whose worker is lost runs again from the journal: its reader sees a pause, and no token twice.

The prompt and the tokens that came out so far are run like a prompt, on whoever is there; pages of them that
are still known somewhere are not computed again. What follows are the tokens of an undisturbed run, exactly
so where the model is deterministic.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Self

from cluster.gateway.backend import Backend, TokenStream
from cluster.gateway.errors import ExpertsLost, Overloaded, Refusal, ReplicaLost, StepFailed
from cluster.gateway.journal import JournalEntry
from cluster.gateway.metrics import Metrics
from cluster.gateway.tracing import RequestSpan
from workers.sequence import Token

_log = logging.getLogger(__name__)

_PAUSES = (0.0, 0.2, 1.0, 2.0, 4.0)  # before a replay; the last one before all that follow
_MOST_LOST = 5  # replays after that: a request that ends its worker must not go through all of them
_MOST_FAILED = 1  # replays after a failed step: one that fails every step must not break its worker
_RETRY_SECONDS = 0.2  # while nobody can take it


class ReplayedStream:
    """The `TokenStream` of a journal's entry, across as many runs as it takes.

    It waits for workers as long as its reader does: whoever reads has a deadline, and ends it by `aclose`.
    """

    def __init__(self, backend: Backend, entry: JournalEntry, metrics: Metrics, span: RequestSpan) -> None:
        self._backend, self._entry, self._metrics, self._span = backend, entry, metrics, span
        self._stream: TokenStream | None = None
        self._num_replays = self._num_lost = self._num_failed = 0
        self._num_prompt_cached: int | None = None

    async def open(self) -> Self:
        """Begin the first run, if there is room for one more request; those that follow have theirs.

        Raises:
            Refusal, RequestError: as `Backend.check_room` and `generate`; nobody else is asked.
        """
        self._backend.check_room()
        self._span.sent(self._entry.request)
        self._stream = await self._backend.generate(self._entry.request)
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        """As `TokenStream`.

        Raises:
            ReplicaLost: it was lost in every run.
        """
        while True:
            try:
                stream = self._stream or await self._run_again()
                return self._as_of_one_run(await anext(stream))
            except (ReplicaLost, Overloaded) as error:
                if not self._is_worth_another(error):
                    raise
                self._stream = None

    async def aclose(self) -> None:
        if self._stream:
            await self._stream.aclose()

    def _is_worth_another(self, error: Refusal) -> bool:
        match error:
            case ExpertsLost():  # the request has no part in that
                return True
            case StepFailed():
                self._num_failed += 1
            case ReplicaLost():
                self._num_lost += 1
            case Overloaded() if not self._num_replays:
                return False
        return self._num_lost <= _MOST_LOST and self._num_failed <= _MOST_FAILED

    async def _run_again(self) -> TokenStream:
        """A run of what is left, as soon as somebody takes it."""
        await asyncio.sleep(_PAUSES[min(self._num_replays, len(_PAUSES) - 1)])
        self._num_replays += 1
        request = self._entry.resumed(f"{self._entry.request.uid}-{self._num_replays}")
        self._span.sent(request)
        _log.warning("%s: run again after %d tokens", request.uid, request.num_resumed)
        while True:
            try:
                self._stream = await self._backend.generate(request)
            except Overloaded:
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                self._metrics.replays.inc()
                return self._stream

    def _as_of_one_run(self, token: Token) -> Token:
        """With the name and the count of the first run, which is what the client pays for."""
        if self._num_prompt_cached is None:
            self._num_prompt_cached = token.num_prompt_cached
        if not self._num_replays:
            return token
        return replace(token, uid=self._entry.request.uid, num_prompt_cached=self._num_prompt_cached)

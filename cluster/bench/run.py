"""One run from the first connection to the last answer."""

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing, closing, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime

from cluster.bench.http_connection import ConnectionPool, Site
from cluster.bench.load import LEAD_SECONDS, LoadGenerator, LoadLimits, Progress
from cluster.bench.outcome import Outcome
from cluster.bench.plan import Session
from cluster.bench.prompts import PromptMaker, TokenCost
from cluster.bench.reading import Asking
from cluster.bench.server_view import ServerView
from cluster.bench.spread import Share, run_spread, shares
from cluster.bench.target import open_client, token_cost

_SHOW_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Whom to ask and how; the same for every trial of a search.

    Attributes:
        url: of the server under load.
        status_url: of its HTTP interface, for `/status`; None where nobody said.
        model: its name; None takes the first that is served.
        shared_tokens: of the beginning that all sessions have in common.
        processes: that the load comes from.
    """

    url: str
    status_url: str | None
    asking: Asking
    model: str | None
    shared_tokens: int
    limits: LoadLimits
    processes: int


@dataclass(frozen=True, kw_only=True)
class Known:
    """What two probes found: a model, and what words cost in tokens; None where the server counts none."""

    model: str
    cost: TokenCost | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a run brought. `started` is in UTC."""

    started: str
    known: Known
    progress: Progress
    view: ServerView


async def probe(setup: Setup, seed: int) -> Known:
    """Asks the server for its model and two short answers.

    Raises:
        RequestError: the URL is none.
        Failed: it does not answer.
        TimeoutError: not in time.
    """
    async with (
        aclosing(open_client(setup.url, setup.asking)) as client,
        asyncio.timeout(setup.limits.timeout),
    ):
        model = setup.model or await client.model()
        return Known(model=model, cost=await token_cost(client, model, seed))


async def run_once(
    setup: Setup,
    known: Known,
    sessions: Sequence[Session],
    seed: int,
    show: Callable[[Progress], None],
    is_hopeless: Callable[[Outcome], bool] = lambda outcome: False,
) -> Run:
    """Sends the sessions and waits for all answers.

    Args:
        setup: to whom, and how.
        known: of the server.
        sessions: what is due when.
        seed: of the texts.
        show: called twice a second with what has happened.
        is_hopeless: looked at after each outcome; True ends the run.

    Raises:
        Failed: a process of the generator died.
    """
    whole = Share(
        url=setup.url, asking=setup.asking, model=known.model, seed=seed, cost=known.cost or TokenCost(),
        shared_tokens=setup.shared_tokens, limits=setup.limits, sessions=list(enumerate(sessions)),
    )  # fmt: skip
    started, progress, view = datetime.now(UTC).isoformat(timespec="seconds"), Progress(), ServerView()
    pool = ConnectionPool(Site.parse(setup.status_url), setup.asking.key) if setup.status_url else None
    with closing(pool) if pool else nullcontext():
        watching = [
            asyncio.create_task(view.watch(pool, lambda: progress.origin)),
            asyncio.create_task(_show(show, progress)),
        ]
        try:
            if setup.processes == 1:
                await _run_here(whole, progress, is_hopeless)
            else:
                await run_spread(shares(whole, setup.processes), progress, is_hopeless)
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)
    return Run(started=started, known=known, progress=progress, view=view)


async def _run_here(whole: Share, progress: Progress, is_hopeless: Callable[[Outcome], bool]) -> None:
    async with aclosing(open_client(whole.url, whole.asking)) as client:
        maker = PromptMaker(whole.seed, whole.cost)
        load = LoadGenerator(
            client, whole.model, maker, whole.shared_tokens, whole.limits, progress, is_hopeless
        )
        await load.run(whole.sessions, time.perf_counter() + LEAD_SECONDS)


async def _show(show: Callable[[Progress], None], progress: Progress) -> None:
    while True:
        await asyncio.sleep(_SHOW_SECONDS)
        show(progress)


class ProgressLine:
    """One line that says how it goes: rewritten on a terminal, else a new one every ten seconds.

    Args:
        write: takes text.
        is_terminal: whether a line can be rewritten.
        num_due: requests of the whole run, as far as it is known.
    """

    def __init__(self, write: Callable[[str], object], is_terminal: bool, num_due: int) -> None:
        self._write, self._is_terminal, self._num_due = write, is_terminal, num_due
        self._next = 0.0
        self._tokens, self._at = 0, time.perf_counter()
        self._width = 0

    def __call__(self, progress: Progress) -> None:
        now = time.perf_counter()
        if now < self._next:
            return
        self._next = now + (_SHOW_SECONDS / 2 if self._is_terminal else 10.0)
        text = self._text(progress, now)
        self._write(f"\r{text:<{self._width}}" if self._is_terminal else f"{text}\n")
        self._width = len(text)

    def clear(self) -> None:
        if self._is_terminal:
            self._write(f"\r{'':<{self._width}}\r")

    def _text(self, progress: Progress, now: float) -> str:
        rate = (progress.num_tokens - self._tokens) / max(now - self._at, 1e-9)
        self._tokens, self._at = progress.num_tokens, now
        firsts = sorted(outcome.ttft for outcome in progress.outcomes[-200:] if outcome.ttft is not None)
        ttft = f"{firsts[len(firsts) // 2] * 1e3:.0f} ms" if firsts else "-"
        done = len(progress.outcomes) - progress.num_failed
        return (
            f"{max(0.0, now - progress.origin):6.1f} s  {progress.num_sent} of {self._num_due} sent, "
            f"{progress.num_open} open, {done} done, {progress.num_failed} failed; "
            f"TTFT {ttft}, {rate:,.0f} tokens/s"
        )

"""One load from several processes, where one cannot read as fast as the servers write.

Each process sends every n-th session. They share a beginning and a clock (`time.perf_counter()` is the
system's monotonic one), tell the parent five times a second what has become of their requests, and know no
other.
"""

import asyncio
import multiprocessing
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, aclosing, closing
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from cluster.bench.load import LEAD_SECONDS, LoadGenerator, LoadLimits, Numbered, Progress
from cluster.bench.outcome import Outcome
from cluster.bench.prompts import PromptMaker, TokenCost
from cluster.bench.reading import Asking, Failed
from cluster.bench.target import open_client

_TELL_SECONDS = 0.2
_START_SECONDS = 120.0
_END_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """All that one process needs to know."""

    url: str
    asking: Asking
    model: str
    seed: int
    cost: TokenCost
    shared_tokens: int
    limits: LoadLimits
    sessions: Sequence[Numbered]


@dataclass(frozen=True, kw_only=True)
class _News:
    """What is new since the news before; `num_sent` and `num_open` are of all so far."""

    num_sent: int
    num_open: int
    outcomes: list[Outcome]
    loop_delays: list[float]
    is_last: bool


def shares(whole: Share, count: int) -> list[Share]:
    """The load dealt out. Open requests are bounded in each process by its part of `max_open`."""
    limits = replace(whole.limits, max_open=max(1, whole.limits.max_open // count))
    return [replace(whole, limits=limits, sessions=whole.sessions[first::count]) for first in range(count)]


async def run_spread(
    parts: Sequence[Share], progress: Progress, is_hopeless: Callable[[Outcome], bool]
) -> None:
    """Runs each part in a process of its own, to the end or until it is hopeless.

    Args:
        parts: of the load.
        progress: written as the processes tell.
        is_hopeless: looked at after each outcome; True ends the run.

    Raises:
        Failed: a process died.
    """
    with ExitStack() as stack:
        workers = [_start(part, stack) for part in parts]
        await _all_ready(workers)
        progress.origin = time.perf_counter() + LEAD_SECONDS
        for worker in workers:
            worker.send(progress.origin)
        latest: dict[Connection, _News] = {}
        while sum(news.is_last for news in latest.values()) < len(workers):
            await asyncio.sleep(_TELL_SECONDS)
            for worker in workers:
                while (worker not in latest or not latest[worker].is_last) and worker.poll():
                    latest[worker] = _receive(worker)
                    if _merge(latest, latest[worker], progress, is_hopeless):
                        return


def _start(part: Share, stack: ExitStack) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, part), daemon=True)
    process.start()
    theirs.close()
    stack.callback(_end, process)
    return stack.enter_context(closing(ours))


def _end(process: BaseProcess) -> None:
    process.terminate()
    process.join(_END_SECONDS)


async def _all_ready(workers: Sequence[Connection]) -> None:
    until = time.perf_counter() + _START_SECONDS
    for worker in workers:
        while not worker.poll():
            if time.perf_counter() > until:
                raise Failed("generator", f"its processes did not start within {_START_SECONDS:g} s")
            await asyncio.sleep(0.01)
        _receive(worker)


def _receive(worker: Connection) -> _News:
    try:
        news: _News = worker.recv()
    except (EOFError, OSError):
        raise Failed("generator", "one of its processes died") from None
    return news


def _merge(
    latest: dict[Connection, _News], news: _News, progress: Progress, is_hopeless: Callable[[Outcome], bool]
) -> bool:
    """Takes news over; returns whether the rest of the run is not wanted."""
    progress.num_sent = sum(one.num_sent for one in latest.values())
    progress.num_open = sum(one.num_open for one in latest.values())
    progress.loop_delays += news.loop_delays
    for outcome in news.outcomes:
        progress.note(outcome)
        if is_hopeless(outcome):
            return True
    return False


def _work(pipe: Connection, part: Share) -> None:
    """A process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    asyncio.run(_send(pipe, part))


async def _send(pipe: Connection, part: Share) -> None:
    async with aclosing(open_client(part.url, part.asking)) as client:
        maker = PromptMaker(part.seed, part.cost)
        load = LoadGenerator(client, part.model, maker, part.shared_tokens, part.limits, Progress())
        pipe.send(_news(load.progress, is_last=False))
        origin = await asyncio.to_thread(pipe.recv)
        running = asyncio.create_task(load.run(part.sessions, origin))
        while not running.done():
            await asyncio.wait({running}, timeout=_TELL_SECONDS)
            if running.done():
                running.result()  # one that failed must not look like one that is through
            pipe.send(_news(load.progress, is_last=running.done()))


def _news(progress: Progress, is_last: bool) -> _News:
    """What has not been told yet; it is told once."""
    outcomes, progress.outcomes = progress.outcomes, []
    delays, progress.loop_delays = progress.loop_delays, []
    return _News(
        num_sent=progress.num_sent,
        num_open=progress.num_open,
        outcomes=outcomes,
        loop_delays=delays,
        is_last=is_last,
    )

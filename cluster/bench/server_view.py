"""What the server says of itself while it is under load: its `/status`, read again and again."""

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from cluster.bench.http_connection import ConnectionPool
from cluster.bench.reading import Failed

_EVERY_SECONDS = 1.0
_TICK_SECONDS = 0.1
_PATIENCE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The server at one moment, `at` seconds from the beginning.

    Attributes:
        waiting, running: requests without and with a token.
        queued_tokens: of prompts that have not been run, of all workers.
        pages_used, pages: of all workers.
        replicas: workers by role, and expert actors.
        tokens: drawn so far, by all workers that are there.
    """

    at: float
    waiting: int
    running: int
    queued_tokens: int
    pages_used: int
    pages: int
    replicas: dict[str, int]
    tokens: int

    @classmethod
    def of(cls, at: float, status: Any) -> "Sample":
        """From `/status`. Raises LookupError or TypeError for what is no status."""
        parts = status["parts"]
        loads = [worker["status"]["load"] for worker in parts["workers"]]
        replicas: dict[str, int] = {}
        for worker in parts["workers"]:
            role = worker["status"]["role"]
            replicas[role] = replicas.get(role, 0) + 1
        if parts["experts"]:
            replicas["experts"] = len(parts["experts"])
        return cls(
            at=at,
            waiting=status["waiting"],
            running=status["running"],
            queued_tokens=sum(load["queued_tokens"] for load in loads),
            pages_used=sum(load["num_pages"] - load["free_pages"] for load in loads),
            pages=sum(load["num_pages"] for load in loads),
            replicas=replicas,
            tokens=sum(worker["status"]["tokens"] for worker in parts["workers"]),
        )


@dataclass
class ServerView:
    """Collects samples.

    Attributes:
        samples: so far.
        not_offered: why there are none, or no more; None while they come.
    """

    samples: list[Sample] = field(default_factory=list)
    not_offered: str | None = None

    async def watch(self, pool: ConnectionPool | None, origin: Callable[[], float]) -> None:
        """Reads `/status` every second until it is cancelled, or there is none.

        A server that has answered once may fail to later: that is what is looked at, and the next may come.

        Args:
            pool: connections to the server; None where nobody said where it speaks HTTP.
            origin: the beginning of the run, on `time.perf_counter()`; infinite until it is known.
        """
        if pool is None:
            self.not_offered = "not asked: gRPC has no status; name its HTTP interface with --status-url"
            return
        while True:
            if (early := origin() - time.perf_counter()) > 0:
                await asyncio.sleep(min(early, _TICK_SECONDS))
                continue
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    status, body = await pool.get("/status")
                self._take(time.perf_counter() - origin(), status, body)
            except (Failed, TimeoutError) as error:
                self.not_offered = self.not_offered or f"/status: {str(error) or 'no answer in time'}"
            if self.not_offered and not self.samples:
                return
            await asyncio.sleep(_EVERY_SECONDS)

    def _take(self, at: float, status: int, body: bytes) -> None:
        if status != 200:
            self.not_offered = f"/status answered {status}"
            return
        try:
            self.samples.append(Sample.of(at, json.loads(body)))
            self.not_offered = None
        except (ValueError, LookupError, TypeError):
            self.not_offered = "/status is not that of an Eightfold of this version"

    def columns(self) -> dict[str, list[Any]]:
        """Samples as columns, with `tokens_rate`: tokens a second since the sample before."""
        columns: dict[str, list[Any]] = {}
        for sample in self.samples:
            for name, value in asdict(sample).items():
                columns.setdefault(name, []).append(value)
        rates: list[float | None] = [None]
        for before, after in zip(self.samples, self.samples[1:], strict=False):
            # A worker that has left takes its count with it: such a step says nothing.
            drawn = after.tokens - before.tokens
            rates.append(drawn / (after.at - before.at) if drawn >= 0 else None)
        return columns | ({"tokens_rate": rates} if columns else {})

"""How much a role has to do: what its workers count, made into engines' worth of load.

What an engine can do in a second, and how many sequences it bears, is learned on the way.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from workers.wire import WorkerStatus

_METER_SECONDS = 10.0  # what counters are measured over
_WARM_STEPS = 10  # until then a worker fills caches, and compiles what its warm-up left over
_MEMORY = 0.98  # of what was learned, each time something new is


@dataclass(frozen=True)
class Load:
    """A role at one moment.

    Attributes:
        seconds: when, on a clock that only goes forward.
        engines: that work and stay.
        workers: attention workers of an engine.
        requests: of prefill those without a token; of decode sequences that run, or are about to.
        queued_tokens: of prompts.
        arriving_tokens: of prompts to be computed, a second, of late.
        busy: engines' worth of time spent in steps.
        used_pages, num_pages: of all engines.
        token_rate: prompt tokens a second that a busy worker computes; None while unknown.
        batch: sequences that a worker bears within the objective; None while unknown.
        token_seconds: from one token of an answer to the next, of late; None where nothing decoded.
        is_used: whether any worker, warm or not, has a request without a token or has run a step just now.
    """

    seconds: float
    engines: int
    workers: int = 1
    requests: int = 0
    queued_tokens: int = 0
    arriving_tokens: float = 0.0
    busy: float = 0.0
    used_pages: int = 0
    num_pages: int = 0
    token_rate: float | None = None
    batch: float | None = None
    token_seconds: float | None = None
    is_used: bool = False


class Meter:
    """Makes loads of what the workers of a role say, and learns what an engine can do.

    Whoever has not warmed up teaches nothing, and its time in steps does not count as load.
    """

    def __init__(self, objective_seconds: float) -> None:
        self._objective = objective_seconds
        self._seen: dict[str, deque[tuple[float, WorkerStatus]]] = {}
        self._tokens = self._seconds = 0.0  # prompt tokens computed, and time spent on them
        self._curve = _Curve()
        self._steps: dict[str, int] = {}

    def read(self, now: float, engines: Mapping[str, Mapping[str, WorkerStatus]]) -> Load:
        """The load now.

        Args:
            now: later than any time before.
            engines: of each that has not begun to leave, what its workers said last, by name.
        """
        staying = {name: status for workers in engines.values() for name, status in workers.items()}
        workers = max((len(members) for members in engines.values()), default=1)
        spans = self._spans(now, staying)
        self._learn(spans)
        loads = [status.load for status in staying.values()]
        decoded = sum(span.decode_tokens for span in spans)
        steps = {name: status.steps for name, status in staying.items()}
        has_run = any(self._steps.get(name, 0) != count for name, count in steps.items())
        self._steps = steps
        is_prefill = any(status.role == "prefill" for status in staying.values())
        return Load(
            now,
            len(engines),
            max(1, workers),
            sum(load.waiting if is_prefill else load.running + load.parked for load in loads),
            sum(load.queued_tokens for load in loads),
            sum(max(0, span.arrived) / span.seconds for span in spans),
            sum(min(1.0, span.busy / span.seconds) for span in spans) / max(1, workers),
            sum(load.num_pages - load.free_pages for load in loads),
            sum(load.num_pages for load in loads),
            self._tokens / self._seconds if self._seconds else None,
            self._curve.batch_within(self._objective),
            sum(span.decode_seconds for span in spans) / decoded if decoded else None,
            has_run or any(load.waiting for load in loads),
        )

    def _spans(self, now: float, staying: Mapping[str, WorkerStatus]) -> "list[_Span]":
        """What warm workers did of late."""
        self._seen = {name: seen for name, seen in self._seen.items() if name in staying}
        spans = []
        for name, status in staying.items():
            if status.steps < _WARM_STEPS:
                continue
            seen = self._seen.setdefault(name, deque())
            if seen and status.steps < seen[-1][1].steps:  # another took its place
                seen.clear()
            seen.append((now, status))
            while len(seen) > 2 and seen[1][0] <= now - _METER_SECONDS:
                seen.popleft()
            if len(seen) > 1:
                spans.append(_Span.between(seen[0], seen[-1], seen[-2]))
        return spans

    def _learn(self, spans: "list[_Span]") -> None:
        if prefilled := [span for span in spans if span.new_prefilled]:
            self._tokens = self._tokens * _MEMORY + sum(span.new_prefilled for span in prefilled)
            self._seconds = self._seconds * _MEMORY + sum(span.new_busy for span in prefilled)
        if decoded := [span for span in spans if span.decode_tokens and span.busy]:
            self._curve.fade()
            for span in decoded:
                self._curve.add(span.decode_seconds / span.busy, span.decode_seconds / span.decode_tokens)


@dataclass(frozen=True)
class _Span:
    """What a worker did in `seconds`; `arrived` counts prompt tokens; `new_*` since it was asked last."""

    seconds: float
    arrived: int
    busy: float
    decode_seconds: float
    decode_tokens: int
    new_busy: float
    new_prefilled: int

    @classmethod
    def between(
        cls,
        first: tuple[float, WorkerStatus],
        last: tuple[float, WorkerStatus],
        before: tuple[float, WorkerStatus],
    ) -> "_Span":
        (began, old), (ended, new) = first, last
        return cls(
            ended - began,
            new.prefilled_tokens + new.load.queued_tokens - old.prefilled_tokens - old.load.queued_tokens,
            new.busy_seconds - old.busy_seconds,
            new.decode_seconds - old.decode_seconds,
            new.decode_tokens - old.decode_tokens,
            new.busy_seconds - before[1].busy_seconds,
            new.prefilled_tokens - before[1].prefilled_tokens,
        )


@dataclass
class _Curve:
    """Time between tokens against the batch: a line through what was seen, older sightings weighing less."""

    weight: float = 0.0
    batch: float = 0.0
    seconds: float = 0.0
    batch_squared: float = 0.0
    product: float = 0.0

    def fade(self) -> None:
        self.weight *= _MEMORY
        self.batch *= _MEMORY
        self.seconds *= _MEMORY
        self.batch_squared *= _MEMORY
        self.product *= _MEMORY

    def add(self, batch: float, seconds: float) -> None:
        self.weight += 1
        self.batch += batch
        self.seconds += seconds
        self.batch_squared += batch * batch
        self.product += batch * seconds

    def batch_within(self, seconds: float) -> float | None:
        """The batch that takes so long; at least one sequence, which no more engines make faster.

        Where batches hardly differ, time is taken to grow in proportion: that asks for engines too early
        rather than too late.
        """
        if not self.weight:
            return None
        batch, mean = self.batch / self.weight, self.seconds / self.weight
        spread = self.batch_squared / self.weight - batch * batch
        slope = mean / batch
        if spread > (0.2 * batch) ** 2:
            covariance = self.product / self.weight - batch * mean
            slope = min(slope, max(covariance / spread, 0.01 * slope))
        return max(1.0, batch + (seconds - mean) / slope)

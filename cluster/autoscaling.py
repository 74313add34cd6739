"""How many engines a role needs: pure functions from what workers count to a decision with its reasons.

    statuses -> Meter -> Load -> needed -> Need    (once a second)
    Needs of the last while -> decide -> Decision

Load is counted in engines: 2.3 means that 2.3 of them would bear it as they should. Prefill needs engines for
queued prompts, which are to have their first token within the objective, and for the time engines spend in
steps; decode for KV pages in use, and for sequences, of which an engine bears as many as get their tokens
within the objective. What an engine does in that time is learned, from engines that have warmed up.

It goes up at once when the last few needs agree, as far as they do. It goes down by one engine at a time, and
only after all needs of `settle_seconds` would have fitted into one engine less with room to spare. Where one
that went is soon missed, that time doubles. The last engine of a role that may have none goes when nothing
was needed at all, and one comes as soon as a request calls for it.
"""

import logging
import math
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from cluster.load_meter import Load, Meter
from workers.wire import Role, WorkerStatus

_log = logging.getLogger(__name__)

AGREE_SECONDS = 2.0  # needs that go up together: longer than a step with a long prompt, or one unlucky moment
_CLEAR_SECONDS = 10.0  # in which a queue is to be gone that engines are added for
_FULL = 0.8  # of pages, or of time: beyond it waiting grows faster than the load
_ROOM = 0.75  # of the engines that stay: as much as a need may take when one goes
_REGRET = 10.0  # times `settle_seconds` after it, an engine that is missed should not have gone
_PATIENCE = 8.0  # times `settle_seconds`, at most, until the next one goes
_TRACE = 0.01  # of an engine: what a role needs that does anything at all, so that its last engine stays
_KEPT = 20  # decisions

Reason = Literal["time", "queue", "pages", "sequences", "called", "settled", "bounds"]
"""What a need comes from: time in steps, prompts that wait, pages or sequences; `called` for an engine where
there is none. Of a decision also `settled`, where the load fits into one engine less, and `bounds`, those of
the description."""
Direction = Literal["up", "down"]


class AutoscaleSection(BaseModel):
    """More engines of a role, up to `max`, as the load needs them.

    `objective_seconds` is the time to first token that prefill keeps, and the time between two tokens that
    decode keeps. An engine goes when for `settle_seconds` the load would have fitted into the others.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    max: Annotated[int, Field(ge=1)]
    objective_seconds: Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]
    settle_seconds: Annotated[float, Field(gt=0, le=86400, allow_inf_nan=False)] = 120.0


@dataclass(frozen=True)
class Bounds:
    """How many engines there may be; both ends included."""

    least: int
    most: int


@dataclass(frozen=True)
class Need:
    """What a load needs, in engines, and why so many.

    Attributes:
        seconds: when, on the clock of the load.
        parts: what it needs for each reason by itself; the largest is `engines`.
        predicted_seconds: what the objective is about, as it is to be expected now; None while unknown.
    """

    seconds: float
    engines: float
    reason: Reason
    why: str
    parts: tuple[tuple[Reason, float], ...] = ()
    predicted_seconds: float | None = None


@dataclass(frozen=True)
class Decision:
    """How many engines there shall be. `at` is the time of day, as `time.time` has it."""

    role: Role
    at: float
    before: int
    after: int
    reason: Reason
    why: str

    @property
    def direction(self) -> Direction:
        return "up" if self.after > self.before else "down"


@dataclass(frozen=True)
class RoleScaling:
    """What an operator sees of the scaling of a role.

    Attributes:
        engines: that work and stay.
        need, why, parts, predicted_seconds: those of the last `Need`.
        decisions: the last changes, newest last.
        counts: of all changes, by direction and reason.
    """

    role: Role
    engines: int
    wanted: int
    need: float
    why: str
    parts: tuple[tuple[Reason, float], ...]
    objective_seconds: float
    predicted_seconds: float | None
    decisions: tuple[Decision, ...]
    counts: tuple[tuple[Direction, Reason, int], ...]


_Part = tuple[float, Reason, str]  # engines needed for one reason, and its words


def needed(role: Role, load: Load, objective_seconds: float, *, is_called: bool = False) -> Need:
    """The engines that would bear a load as they should; `is_called`: requests came that found no engine."""
    is_prefill = role == "prefill"
    needs = _prefill_needs(load, objective_seconds) if is_prefill else _decode_needs(load)
    if is_called:
        needs.append((1.0, "called", "requests came and there was no engine"))
    engines, reason, why = max(needs, key=lambda need: need[0])
    parts = tuple((reason, engines) for engines, reason, _ in needs)
    predicted = _first_seconds(load) if is_prefill else load.token_seconds
    return Need(load.seconds, engines, reason, why, parts, predicted)


def _first_seconds(load: Load) -> float | None:
    """Until the first token of a prompt that comes now."""
    if not load.token_rate:
        return None
    return load.queued_tokens / (load.token_rate * load.workers * max(1, load.engines))


def _prefill_needs(load: Load, objective_seconds: float) -> list[_Part]:
    spent = f"{load.busy:.2f} engines' time is spent in steps"
    needs: list[_Part] = [(max(load.busy / _FULL, _TRACE * load.is_used), "time", spent)]
    first = _first_seconds(load)
    if load.token_rate and first is not None:
        rate = load.token_rate * load.workers
        engines = load.engines * first / objective_seconds
        if first > objective_seconds:
            # So many as would clear the queue in an instant come too late for it.
            arriving = load.arriving_tokens + load.queued_tokens / max(objective_seconds, _CLEAR_SECONDS)
            engines = min(engines, max(load.engines + 1.0, arriving / rate))
        why = f"{load.queued_tokens:,} prompt tokens wait: {first:.2f} s to their first token"
        # More workers than prompts would have nothing to do.
        needs.append((min(engines, load.requests / load.workers), "queue", why))
    return needs


def _decode_needs(load: Load) -> list[_Part]:
    pages = load.num_pages / max(1, load.engines)
    used = f"{load.used_pages:,} of {load.num_pages:,} pages are in use"
    needs: list[_Part] = [(load.used_pages / (pages * _FULL) if pages else 0.0, "pages", used)]
    if load.batch and load.token_seconds:
        took = f"{load.requests} sequences, {load.token_seconds * 1e3:.1f} ms from token to token"
        needs.append((load.requests / (load.batch * load.workers), "sequences", took))
    return needs


def decide(
    bounds: Bounds, current: int, needs: Sequence[Need], changed: float, settle_seconds: float
) -> tuple[int, Reason, str]:
    """How many engines there shall be, and why.

    Args:
        current: as many as there shall be so far.
        needs: oldest first, the newest of this moment.
        changed: when the number of engines changed last, on the clock of the needs.
        settle_seconds: for how long the load must have fitted into one engine less.
    """
    newest = needs[-1]
    now = newest.seconds
    wanted = min(max(current, bounds.least), bounds.most)
    if wanted != current:
        return wanted, "bounds", f"from {bounds.least} to {bounds.most} engines are described"
    if not current:  # whoever waits, waits for the whole start of an engine
        return int(newest.reason == "called"), newest.reason, newest.why
    agreed = [need for need in needs if need.seconds >= now - AGREE_SECONDS]
    least = min(need.engines for need in agreed)
    if needs[0].seconds <= now - AGREE_SECONDS and math.ceil(least) > current:
        return min(math.ceil(least), bounds.most), newest.reason, newest.why
    settled = [need for need in needs if need.seconds >= now - settle_seconds]
    most = max(need.engines for need in settled)
    has_settled = min(now - needs[0].seconds, now - changed) >= settle_seconds
    if current > bounds.least and has_settled and most <= _ROOM * (current - 1):
        left = f"{current - 1} engine(s) bear all of the last {settle_seconds:g} s"
        return current - 1, "settled", f"{left}, which needed {most:.2f} at most"
    return current, newest.reason, newest.why


@dataclass
class Autoscaler:
    """What one role has needed and how that was answered; whoever scales it asks `want` once a second."""

    role: Role
    least: int
    section: AutoscaleSection
    decisions: deque[Decision] = field(default_factory=lambda: deque(maxlen=_KEPT))
    counts: Counter[tuple[Direction, Reason]] = field(default_factory=Counter)
    needs: deque[Need] = field(default_factory=deque)
    wanted: int = 0
    _changed: float = -math.inf
    _went: float = -math.inf  # when an engine was let go
    _is_missed: bool = False
    _patience: float = 1.0
    _working: int = 0

    def __post_init__(self) -> None:
        self._bounds = Bounds(self.least, self.section.max)
        self.wanted = self.least
        self._meter = Meter(self.section.objective_seconds)

    def want(
        self,
        current: int,
        engines: Mapping[str, Mapping[str, WorkerStatus]],
        now: float,
        at: float,
        *,
        is_called: bool = False,
    ) -> Decision:
        """How many engines there shall be.

        Args:
            current: as many as there shall be so far.
            engines: those that work and stay, as of `Meter.read`.
            now: on a clock that only goes forward.
            at: the time of day.
            is_called: requests came of late that found no engine.
        """
        self._working = len(engines)
        load = self._meter.read(now, engines)
        self.needs.append(needed(self.role, load, self.section.objective_seconds, is_called=is_called))
        settle_seconds = self.section.settle_seconds * self._patience
        while self.needs[0].seconds < now - self.section.settle_seconds * _PATIENCE:
            self.needs.popleft()
        if len(engines) != current:  # some start, or are lost: what they would bear is not known
            self._changed = now
        self.wanted, reason, why = decide(self._bounds, current, self.needs, self._changed, settle_seconds)
        decision = Decision(self.role, at, current, self.wanted, reason, why)
        if self.wanted != current:
            self._note_change(now, self.wanted < current)
            if not self.decisions or _differ(self.decisions[-1], decision):
                self.decisions.append(decision)
                self.counts[decision.direction, reason] += 1
                _log.info("%s: %d engine(s) instead of %d: %s", self.role, self.wanted, current, why)
        return decision

    def _note_change(self, now: float, is_down: bool) -> None:
        self._changed = now
        if is_down:
            if now - self._went > self.section.settle_seconds * _REGRET:
                self._patience = 1.0
            self._went, self._is_missed = now, False
        elif not self._is_missed and now - self._went < self.section.settle_seconds * _REGRET:
            self._patience = min(2 * self._patience, _PATIENCE)
            self._is_missed = True  # once, however many come back

    def shown(self) -> RoleScaling:
        """For operators."""
        need = self.needs[-1] if self.needs else Need(0.0, 0.0, "time", "nobody has asked yet")
        return RoleScaling(
            self.role, self._working, self.wanted, need.engines, need.why, need.parts,
            self.section.objective_seconds, need.predicted_seconds, tuple(self.decisions),
            tuple((*change, count) for change, count in sorted(self.counts.items())),
        )  # fmt: skip


def _differ(one: Decision, other: Decision) -> bool:
    return (one.before, one.after) != (other.before, other.after)

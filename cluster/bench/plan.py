"""What is sent when: everything but the texts and the answers, decided before the first request."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cluster.bench.arrivals import Arrivals
from cluster.bench.distribution import Distribution
from model.errors import RequestError


@dataclass(frozen=True)
class Turn:
    """One question.

    Attributes:
        key: makes its text, and makes it differ from all others.
        prompt_tokens: new tokens of it; what was said before comes on top.
        max_tokens: of the answer.
        think: seconds between the answer before it and this question.
        text: the question itself, where a trace has it.
    """

    key: int
    prompt_tokens: int
    max_tokens: int
    think: float = 0.0
    text: str | None = None


@dataclass(frozen=True)
class Session:
    """Turns of one conversation, of which the first is due `at` seconds after the beginning."""

    at: float
    turns: tuple[Turn, ...]


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """How long questions, answers, conversations and pauses are."""

    prompt_tokens: Distribution
    answer_tokens: Distribution
    turns: Distribution
    think: Distribution


def make_plan(arrivals: Arrivals, shapes: Shapes, seed: int) -> list[Session]:
    """The sessions of a run, by arrival. Arrivals and lengths are drawn apart: one may change alone."""
    when, what = (np.random.default_rng(part) for part in np.random.SeedSequence(seed).spawn(2))
    sessions: list[Session] = []
    key = 0
    for moment in arrivals.times(when):
        turns = []
        for index in range(shapes.turns.draw_whole(what)):
            think = shapes.think.draw(what, 0.0) if index else 0.0
            lengths = shapes.prompt_tokens.draw_whole(what), shapes.answer_tokens.draw_whole(what)
            turns.append(Turn(key, *lengths, think))
            key += 1
        sessions.append(Session(moment, tuple(turns)))
    return sessions


def read_trace(path: Path) -> list[Session]:
    """A recorded load: one JSON object a line, `{"at": s, "prompt_tokens" or "prompt": .., "max_tokens": n}`.

    Raises:
        RequestError: the file cannot be read, or a line is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("--trace", f"{path}: {getattr(error, 'strerror', None) or error}") from None
    sessions = [_trace_line(line, number) for number, line in enumerate(lines, 1) if line.strip()]
    if not sessions:
        raise RequestError("--trace", f"{path} holds no request")
    return sorted(sessions, key=lambda session: session.at)


def _trace_line(line: str, number: int) -> Session:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError("--trace", f"line {number} is not JSON: {error}") from None
    if not isinstance(entry, dict):
        raise RequestError("--trace", f"line {number} is no JSON object")
    if extra := sorted(entry.keys() - {"at", "prompt", "prompt_tokens", "max_tokens"}):
        raise RequestError("--trace", f"line {number}: {extra[0]!r} is no field of a trace")
    prompt = entry.get("prompt")
    if ("prompt_tokens" in entry) == isinstance(prompt, str):
        raise RequestError("--trace", f"line {number} needs one of prompt (text) and prompt_tokens")
    at = entry.get("at")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at < float("inf"):
        raise RequestError("--trace", f"line {number}: at is {at!r}; it takes seconds from 0")
    tokens = 0 if isinstance(prompt, str) else _count(entry, "prompt_tokens", number)
    return Session(float(at), (Turn(number, tokens, _count(entry, "max_tokens", number), text=prompt),))


def _count(entry: dict[str, Any], name: str, number: int) -> int:
    value = entry.get(name)
    if type(value) is not int or value < 1:
        raise RequestError("--trace", f"line {number}: {name} is {value!r}; it takes an integer from 1")
    return value


def last_arrival(sessions: Sequence[Session]) -> float:
    """Seconds; 0 for an empty plan."""
    return max((session.at for session in sessions), default=0.0)

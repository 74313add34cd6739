"""What a model's answer consists of, as it is read, and what reads it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ContentDelta:
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of the arguments' JSON text."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallEnd:
    """The call is complete. Its arguments are a JSON object in DSML, and as written in V3.2-Exp."""

    index: int


Event = ReasoningDelta | ContentDelta | ToolCallStart | ToolCallDelta | ToolCallEnd


class StreamParser(Protocol):
    """Reads one answer."""

    def push(self, text: str) -> list[Event]:
        """Takes more of the text; returns what it makes certain."""
        ...

    def finish(self) -> list[Event]:
        """Ends the text; returns what was held back. Nothing may be pushed afterwards."""
        ...


def merge(events: Iterable[Event]) -> list[Event]:
    """The same events with neighbouring deltas of one kind, and of one call, joined."""
    runs: list[tuple[Event, list[str]]] = []
    for event in events:
        match event:
            case ReasoningDelta(text) | ContentDelta(text) | ToolCallDelta(arguments=text):
                if runs and _kind(runs[-1][0]) == _kind(event):
                    runs[-1][1].append(text)
                else:
                    runs.append((event, [text]))
            case _:
                runs.append((event, []))
    return [_with_text(event, "".join(texts)) for event, texts in runs]


def _kind(event: Event) -> tuple[type[Event], int | None]:
    return type(event), event.index if isinstance(event, ToolCallDelta) else None


def _with_text(event: Event, text: str) -> Event:
    match event:
        case ReasoningDelta():
            return ReasoningDelta(text)
        case ContentDelta():
            return ContentDelta(text)
        case ToolCallDelta(index):
            return ToolCallDelta(index, text)
        case _:
            return event

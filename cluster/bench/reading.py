"""One answer while it is read, and how it may fail."""

import time
from array import array
from dataclasses import dataclass, field
from typing import Literal, Protocol

Api = Literal["chat", "completions"]


class Failed(Exception):
    """An answer that did not come, or not whole.

    Args:
        kind: what is counted: `http 503`, `grpc UNAVAILABLE`, `connection`, `timeout`, `truncated`, `stream
            error` (the server said so within the stream), `malformed`, `empty` (whole, without any text).
        detail: for people, as the server or the system put it.
        retry_after: seconds after which the server says that a later try is worth while, where it does.
    """

    def __init__(self, kind: str, detail: str = "", retry_after: float | None = None) -> None:
        super().__init__(kind, detail, retry_after)
        self.kind, self.detail, self.retry_after = kind, detail[:300], retry_after

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Reading:
    """What has come of an answer so far. Moments are `time.perf_counter()`.

    Attributes:
        moments: of each event that brought text.
        texts: what they brought.
        ended: when the last event with text, or the one that says why the answer ended, came.
        prompt_tokens, cached_tokens, answer_tokens: as the server counts them, where it does.
    """

    moments: "array[float]" = field(default_factory=lambda: array("d"))
    texts: list[str] = field(default_factory=list)
    ended: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    answer_tokens: int | None = None

    def add(self, text: str) -> None:
        """Text has come, just now."""
        self.ended = time.perf_counter()
        self.moments.append(self.ended)
        self.texts.append(text)

    def finish(self) -> None:
        """The server has said, just now, why the answer ends."""
        self.ended = time.perf_counter()


@dataclass(frozen=True)
class Message:
    """One part of a conversation. `role` is `user` or `assistant`."""

    role: str
    content: str


class Client(Protocol):
    """Asks one server, many questions at once."""

    async def model(self) -> str:
        """The first model that is served.

        Raises:
            Failed: nobody says.
        """
        ...

    async def ask(self, model: str, messages: list[Message], max_tokens: int, reading: Reading) -> None:
        """One whole answer; `reading` is filled as it comes.

        Raises:
            Failed: it did not come, or not whole; `reading` keeps what came.
        """
        ...

    async def aclose(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What every request of a run has in common."""

    api: Api
    temperature: float
    ignore_eos: bool
    key: str | None


def as_text(messages: list[Message]) -> str:
    """A conversation as a raw text to continue: what is said again begins as it did before."""
    return "\n".join(message.content for message in messages)

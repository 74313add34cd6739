"""What the gateway tells of its requests, to whoever makes spans of it; nobody does where tracing is off.

`cluster/telemetry` does where a description switches it on. Nothing here imports OpenTelemetry.
"""

from collections.abc import Callable, Iterable
from typing import Protocol

from cluster.gateway.answer import Answer
from workers.sequence import Request
from workers.stages import Stages

Headers = Iterable[tuple[str | bytes, str | bytes]]


class RequestSpan(Protocol):
    """One request of a client, from its first byte to the end of its answer."""

    @property
    def is_sampled(self) -> bool:
        """Whether somebody will look at it; else nothing is measured for it."""
        ...

    def opened(self, answer: Answer) -> None:
        """It was found good, and is to be answered."""
        ...

    def sent(self, request: Request) -> None:
        """One of its choices is on its way to whoever runs it, or runs again."""
        ...

    def end(self, outcome: str) -> None:
        """It is over: `ok`, `cancelled` by the client, or the code of an error."""
        ...


class Tracing(Protocol):
    """Takes note of requests. Nothing here may wait or fail.

    `on_dropped` is told how many spans nobody will see, from any thread.
    """

    on_dropped: Callable[[int], None]

    def request(self, name: str, headers: Headers, facts: dict[str, str]) -> RequestSpan:
        """A request begins.

        Args:
            name: of its route or method.
            headers: of HTTP, or the metadata of gRPC; a valid `traceparent` says what it is a part of.
            facts: more of the same, under names of OpenTelemetry.
        """
        ...

    def stages(self, worker: str, stages: Stages) -> None:
        """What a worker says of a traced request; it may be over."""
        ...

    def close(self) -> None:
        """Send what is left, within a deadline."""
        ...


class NoTracing:
    """Tracing is off, and so is every span."""

    is_sampled = False

    def __init__(self) -> None:
        self.on_dropped: Callable[[int], None] = lambda count: None

    def request(self, name: str, headers: Headers, facts: dict[str, str]) -> "RequestSpan":
        return self

    def opened(self, answer: Answer) -> None:
        pass

    def sent(self, request: Request) -> None:
        pass

    def end(self, outcome: str) -> None:
        pass

    def stages(self, worker: str, stages: Stages) -> None:
        pass

    def close(self) -> None:
        pass

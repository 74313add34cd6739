"""Engines that do not come up: why, how often, and how long the next one waits before it tries.

Serve tries again at once and without end. What keeps one engine from starting (no room on a GPU, a file that
cannot be read) mostly keeps the next one too, and each try reads weights and takes a place.
"""

import re
from dataclasses import dataclass

_FIRST_SECONDS = 1.0  # before the second try; twice as long before each one after it
_LONGEST_SECONDS = 60.0


_EXCEPTION = re.compile(r"[\w.]+(Error|Exception|Kernel|Failed): .")  # the line of a stack that names it


def reasons_in(text: str) -> list[str]:
    """What exceptions say in the text of one of Ray's, without the stacks of where they were raised."""
    lines = [line.strip() for line in text.splitlines()]
    named = [line for line in lines if _EXCEPTION.match(line) and "Traceback" not in line]
    return list(dict.fromkeys(line for line in named if not line.startswith("ray.")))


def reason_of(error: Exception) -> str:
    """Why something did not come up, in one line."""
    return (reasons_in(str(error)) or [str(error).strip().rpartition("\n")[2] or type(error).__name__])[-1]


@dataclass(frozen=True)
class FailedStart:
    """Why an engine did not come up; `at` as of `time.time`, and how many there were in a row with it."""

    at: float
    why: str
    in_a_row: int


class Starts:
    """Of the engines of one role; the supervisor keeps it."""

    def __init__(self) -> None:
        self.num_failed = 0
        self.last_failure: FailedStart | None = None

    @property
    def wait_seconds(self) -> float:
        """How long an engine that is to start now should wait."""
        if not self.last_failure:
            return 0.0
        doublings = min(self.last_failure.in_a_row - 1, 30)
        return float(min(_FIRST_SECONDS * 2**doublings, _LONGEST_SECONDS))

    def failed(self, why: str, at: float) -> None:
        """One did not come up."""
        before = self.last_failure.in_a_row if self.last_failure else 0
        self.num_failed += 1
        self.last_failure = FailedStart(at, why, before + 1)

    def succeeded(self) -> None:
        """One came up: whatever was in the way is gone, or is in one place only."""
        self.last_failure = None

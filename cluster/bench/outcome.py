"""What became of one request."""

from array import array
from dataclasses import dataclass

from cluster.bench.reading import Failed, Reading

TOO_MANY_OPEN = "too many open"
HISTORY_LOST = "earlier turn failed"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One request. Moments are seconds from the beginning of the run.

    Attributes:
        session, turn: which it was.
        planned: when it was due.
        sent: when it was sent; None where it never was.
        moments: of each event that brought text.
        ended: of the answer's last event, or of the failure.
        asked_tokens: `max_tokens`.
        prompt_tokens, cached_tokens, answer_tokens: as the server counts them; None where it does not say.
        error: what kind of failure; None for a whole answer.
        detail: of the failure, for people.
        retry_after: seconds after which the server says that a later try is worth while.
    """

    session: int
    turn: int
    planned: float
    sent: float | None
    moments: "array[float]"
    ended: float
    asked_tokens: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    answer_tokens: int | None = None
    error: str | None = None
    detail: str = ""
    retry_after: float | None = None

    @classmethod
    def of(
        cls, session: int, turn: int, planned: float, sent: float, origin: float, asked_tokens: int,
        reading: Reading, failed: Failed | None, now: float,
    ) -> "Outcome":  # fmt: skip
        """From a reading.

        Args:
            planned: seconds from `origin`.
            sent, origin, now: on the clock of the reading.
        """
        if failed is None and not reading.moments:
            failed = Failed("empty", "the answer ended without any text")
        ended = now if failed or reading.ended is None else reading.ended
        return cls(
            session=session,
            turn=turn,
            planned=planned,
            sent=sent - origin,
            moments=array("d", (moment - origin for moment in reading.moments)),
            ended=ended - origin,
            asked_tokens=asked_tokens,
            prompt_tokens=reading.prompt_tokens,
            cached_tokens=reading.cached_tokens,
            answer_tokens=reading.answer_tokens,
            error=failed.kind if failed else None,
            detail=failed.detail if failed else "",
            retry_after=failed.retry_after if failed else None,
        )

    @classmethod
    def unsent(cls, session: int, turn: int, planned: float, asked_tokens: int, error: str) -> "Outcome":
        """Of a request that was due and never sent."""
        return cls(
            session=session,
            turn=turn,
            planned=planned,
            sent=None,
            moments=array("d"),
            ended=planned,
            asked_tokens=asked_tokens,
            error=error,
        )

    @property
    def tokens(self) -> int:
        """Tokens of the answer; where the server does not count them, its events with text."""
        return len(self.moments) if self.answer_tokens is None else self.answer_tokens

    @property
    def late(self) -> float | None:
        """Seconds between when it was due and when it was sent."""
        return None if self.sent is None else self.sent - self.planned

    @property
    def ttft(self) -> float | None:
        """Seconds from sending to the first event with text."""
        return self.moments[0] - self.sent if self.moments and self.sent is not None else None

    @property
    def e2e(self) -> float | None:
        """Seconds from sending to the end of a whole answer."""
        return self.ended - self.sent if self.error is None and self.sent is not None else None

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first, of a whole answer of two tokens or more."""
        if self.e2e is None or self.ttft is None or self.tokens < 2:
            return None
        return (self.e2e - self.ttft) / (self.tokens - 1)

"""What runs in a step: a function of values, host data only."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate

from workers.sequence import Sequence


@dataclass(frozen=True)
class Share:
    """The rows of one sequence in a step: its next `num_known` known tokens, then its drafts."""

    sequence: Sequence
    num_known: int
    drafts: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        return self.num_known + len(self.drafts)

    @property
    def is_last_chunk(self) -> bool:
        """Whether the step reaches the end of what is known, so that a token is drawn."""
        return self.num_known == self.sequence.num_pending

    @property
    def token_ids(self) -> list[int]:
        start = self.sequence.num_cached
        return [*self.sequence.tokens[start : start + self.num_known], *self.drafts]


@dataclass(frozen=True)
class Batch:
    """One step's work."""

    shares: tuple[Share, ...]

    @property
    def num_rows(self) -> int:
        return sum(share.num_rows for share in self.shares)

    @property
    def is_decode(self) -> bool:
        """Whether no prompt is in it; after the step that has changed."""
        return all(share.sequence.phase == "decode" for share in self.shares)

    def parts(self, count: int) -> "tuple[Batch, ...]":
        """Runs of shares with rows as equal as whole sequences allow; fewer where there are fewer shares."""
        parts, shares = [], self.shares
        for left in range(count, 1, -1):
            if len(shares) < 2:
                break
            rows = sum(share.num_rows for share in shares)
            before = accumulate(share.num_rows for share in shares[:-1])
            distances = [abs(left * taken - rows) for taken in before]
            cut = 1 + distances.index(min(distances))
            parts.append(Batch(shares[:cut]))
            shares = shares[cut:]
        return (*parts, Batch(shares))


def schedule(running: Iterable[Sequence], max_rows: int) -> Batch:
    """Decode first, then chunks of prompts in order of arrival, within `max_rows` rows in all.

    Every decoding sequence gets its rows even where they alone exceed the budget: a token late is worse than
    a step long.
    """
    running = list(running)
    shares = [
        Share(sequence, sequence.num_pending, tuple(sequence.drafts))
        for sequence in running
        if sequence.phase == "decode"
    ]
    budget = max_rows - sum(share.num_rows for share in shares)
    for sequence in running:
        if sequence.phase == "prefill" and budget > 0:
            num_known = min(sequence.num_pending, budget)
            shares.append(Share(sequence, num_known, ()))
            budget -= num_known
    return Batch(tuple(shares))


def schedule_ahead(batch: Batch, running: Iterable[Sequence]) -> Batch | None:
    """What runs after a batch, as far as that can be told before its tokens are known.

    That is one row of each sequence which goes on, or nothing: if a prompt begins or goes on, if drafts are
    verified, or if somebody wants to see a token before the next one is drawn.
    """
    going = {id(sequence) for sequence in running}
    if not going <= {id(share.sequence) for share in batch.shares}:
        return None
    if any(share.num_rows > 1 or share.sequence.phase == "prefill" for share in batch.shares):
        return None
    params = [share.sequence.request.params for share in batch.shares]
    if any(each.has_penalties or each.logprobs is not None for each in params):
        return None
    shares = [share for share in batch.shares if id(share.sequence) in going and share.sequence.room > 1]
    return Batch(tuple(shares)) if shares else None

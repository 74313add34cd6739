"""Drafting with the MTP module, and the count of what became of the drafts.

A draft costs nothing but time: the model verifies it by drawing its own token at that place, with the same
noise, and comparing. So the answer is the same with any number of drafts. The host need not know a draft
before it knows the model's own token, so drafts stay on the device where the next step can take them there.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.graphs import StepRows
from model.sampling import Drawing, NonFiniteLogits
from model.transfer import take
from workers.runner import Runner
from workers.sequence import Sequence

UNKNOWN = -1  # in place of a draft that only the device knows
MAX_DRAFTS = 3  # one MTP module fed back on itself: acceptance decays fast after the first draft

_DECAY = 0.05  # weight of the newest measurement
_RUN_STEPS = 8
_EXPLORE_RUNS = 16


@dataclass
class Acceptance:
    """Drafts verified and accepted, by their place behind the known tokens."""

    drafted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)
    accepted: list[int] = field(default_factory=lambda: [0] * MAX_DRAFTS)

    def count(self, num_drafts: int, num_accepted: int) -> None:
        """A draft is judged only if all before it were accepted."""
        for place in range(min(num_drafts, num_accepted + 1)):
            self.drafted[place] += 1
            self.accepted[place] += place < num_accepted

    def rates(self) -> list[float]:
        """Share accepted of those judged, for each place that was tried."""
        pairs = zip(self.accepted, self.drafted, strict=True)
        return [accepted / drafted for accepted, drafted in pairs if drafted]


class DraftPolicy:
    """How many drafts pay, learnt while running: they cost rows, and are worth what the model accepts.

    A step of S sequences with d drafts yields S (1 + a1 + a1 a2 + ..) tokens, a being acceptance by place.
    What it takes depends on the machine and on S, so it is measured, for S in powers of two. A choice is kept
    for some steps: drafts made in one step are verified in the next, so only a run of them shows their price.

    Args:
        most: drafts at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._accepted = [1.0] * most  # decayed means; hopeful, so that every place is tried
        self._prices: dict[int, dict[int, float]] = {}  # load -> drafts -> seconds of a step
        self._current, self._load, self._left, self._runs = most, 0, 0, 0

    def choose(self, num_sequences: int) -> int:
        """Drafts for each of so many sequences."""
        load = num_sequences.bit_length()
        if load != self._load or not self._left:
            self._load, self._left = load, _RUN_STEPS
            self._current = self._best(self._prices.setdefault(load, {}))
        self._left -= 1
        return self._current

    def judge(self, num_drafts: int, num_accepted: int) -> None:
        """Learn from a verified sequence."""
        for place in range(min(num_drafts, num_accepted + 1)):
            self._accepted[place] += _DECAY * ((place < num_accepted) - self._accepted[place])

    def pay(self, num_sequences: int, num_drafts: int, seconds: float) -> None:
        """Learn from a step in which every sequence verified and made so many drafts."""
        prices = self._prices.setdefault(num_sequences.bit_length(), {})
        old = prices.get(num_drafts, seconds)
        prices[num_drafts] = old + _DECAY * (seconds - old)

    def _best(self, prices: dict[int, float]) -> int:
        untried = [d for d in range(self.most, -1, -1) if d not in prices]
        if untried:
            return untried[0]
        self._runs += 1
        best = max(prices, key=lambda d: self._worth(d) / prices[d])
        if self._runs % _EXPLORE_RUNS:
            return best
        # A neighbour of the best: acceptance and price drift with what is being generated.
        return min(max(best + (1 if self._runs // _EXPLORE_RUNS % 2 else -1), 0), self.most)

    def _worth(self, num_drafts: int) -> float:
        worth = reach = 1.0
        for rate in self._accepted[:num_drafts]:
            reach *= rate
            worth += reach
        return worth


@dataclass(frozen=True)
class DraftShare:
    """Rows of one sequence for the MTP module: positions [start, start + num_rows), whose hidden states begin
    at `first`.

    `num_drafts` is 0 for a chunk of a prompt, which only fills the MTP layer's pages.
    """

    sequence: Sequence
    start: int
    num_rows: int
    first: int
    num_drafts: int


class Drafts:
    """Drafts that lie on the device. Until they are read, `UNKNOWN` stands for each in its sequence."""

    def __init__(self) -> None:
        self._drawn: list[tuple[list[Sequence], Drawing]] = []  # by place

    def add(self, sequences: list[Sequence], drawn: Drawing) -> None:
        """The next draft of each of these."""
        self._drawn.append((sequences, drawn))
        for sequence in sequences:
            sequence.drafts.append(UNKNOWN)

    def tokens(self, sequences: Iterable[Sequence]) -> Tensor | None:
        """[N] int64, all drafts of these in order, or None where there are none."""
        owners = [(place, id(s)) for place, (drafted, _) in enumerate(self._drawn) for s in drafted]
        row_of = {owner: row for row, owner in enumerate(owners)}
        rows = [row_of[place, id(s)] for s in sequences for place in range(len(s.drafts))] if owners else []
        return take(torch.cat([drawn.tokens for _, drawn in self._drawn]), rows) if rows else None

    def read(self) -> None:
        """Bring them into their sequences. One that could not be drawn is no token, and never accepted."""
        for place, (sequences, drawn) in enumerate(self._drawn):
            for sequence, token_id in zip(sequences, drawn.read_tokens(wanted=()), strict=True):
                sequence.drafts[place] = token_id
        self._drawn = []


def draft(runner: Runner, hidden: Tensor, shares: list[DraftShare]) -> Drafts:
    """Fill the MTP layer's pages for rows that the main model has run, and leave drafts in the sequences.

    The row of position i carries token i + 1, which must be known.

    Args:
        hidden: [N, D] of the main model.

    Returns:
        What still has to be read.
    """
    drafts = Drafts()
    if not shares:
        return drafts
    rows = StepRows(
        [share.sequence.tokens[share.start + 1 : share.start + 1 + share.num_rows] for share in shares],
        [share.start for share in shares],
        [share.sequence.pages for share in shares],
    )
    last = runner.draft(rows, hidden, [share.first for share in shares])
    for share in shares:
        share.sequence.drafts = []
    _draft_on(runner, shares, last, drafts)
    return drafts


def _draft_on(runner: Runner, shares: list[DraftShare], last: Tensor, drafts: Drafts) -> None:
    """Draw drafts from each sequence's last MTP state [S, D], feeding it back while more are wanted."""
    # A penalty counts the drafts before it.
    at_once = not runner.can_run_ahead or any(s.sequence.request.params.has_penalties for s in shares)
    drawn: Drawing | None = None
    for place in range(MAX_DRAFTS):
        going = [i for i, share in enumerate(shares) if share.num_drafts > place]
        if not going:
            return
        shares, last = [shares[i] for i in going], take(last, going)
        sequences = [share.sequence for share in shares]
        if drawn:
            rows = StepRows(
                [sequence.drafts[-1:] for sequence in sequences],
                [sequence.num_tokens + place - 2 for sequence in sequences],
                [sequence.pages for sequence in sequences],
                None if at_once else take(drawn.tokens, going),
            )
            last = runner.draft(rows, last, list(range(len(sequences))))
        drawn = runner.draw(last, [sequence.next_row().after(sequence.drafts) for sequence in sequences])
        if not at_once:
            drafts.add(sequences, drawn)
            continue
        try:
            token_ids = drawn.read_tokens()
        except NonFiniteLogits:  # a step does without drafts; the model's own logits are judged elsewhere
            return
        for sequence, token_id in zip(sequences, token_ids, strict=True):
            sequence.drafts.append(token_id)

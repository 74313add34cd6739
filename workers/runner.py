"""Takes batches through the model: from host numbers to hidden states and drawn tokens, asking nothing back.

Decode steps run as graphs where there are any (`model/graphs.py`), all other batches eagerly. Either way a
launched step is a `Flight`; who wants its tokens waits for them.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from model.decoder import Decoder, MicroBatch
from model.graphs import DecodeGraphs, HiddenRows, StepRows
from model.inputs import MAX_DECODE_ROWS, ForwardInputs
from model.moe import ExpertSteps
from model.pages import PageCache
from model.sampling import Drawing, SampleResult, SampleRow
from model.transfer import take
from workers.schedule import Batch
from workers.sequence import Sequence
from workers.warm_up import WarmedUp, WarmUp

OnLayer = Callable[[Batch, int], None]
"""Told that a batch's rows lie in the pages of a layer; its sequences still say how far they were before."""


@dataclass(frozen=True)
class Flight:
    """A step that has been launched.

    Attributes:
        batch, is_decode: what runs; the latter changes with the sequences, so it is kept as it was.
        rows: hidden states of all rows.
        drawn: the model's own token after every row that needs one, or None where none does.
        places: of each share: its tokens in `drawn`, empty where its prompt goes on.
        started: when, by `time.perf_counter`.
        void: shares that went on from a wrong token; nothing of theirs counts.
    """

    batch: Batch
    is_decode: bool
    rows: HiddenRows
    drawn: Drawing | None
    places: list[range]
    started: float
    void: set[int] = field(default_factory=set)

    @property
    def late(self) -> list[Sequence]:
        """Sequences whose token is another than the next step took from the device; known once read."""
        rows = self.drawn.late if self.drawn else ()
        return [self.batch.shares[i].sequence for i in self.owners(rows)]

    def share_of(self, sequence: Sequence) -> int | None:
        """Which share is a sequence's."""
        return next((i for i, share in enumerate(self.batch.shares) if share.sequence is sequence), None)

    def owners(self, rows: Iterable[int]) -> list[int]:
        """The shares that some rows of `drawn` belong to."""
        return [i for i, places in enumerate(self.places) if not set(places).isdisjoint(rows)]

    def give_up(self, sequences: list[Sequence]) -> None:
        """These went on from a wrong token."""
        shares = map(self.share_of, sequences)
        self.void.update(share for share in shares if share is not None)

    def read(self, shares: list[int]) -> SampleResult:
        """Wait for what these shares have drawn; what the others drew means nothing.

        Raises:
            NonFiniteLogits: as `Drawing.read`.
        """
        if self.drawn is None:
            return SampleResult([], [])
        wanted = {row for share in shares if share not in self.void for row in self.places[share]}
        return self.drawn.read(wanted)

    def wait(self) -> None:
        """Until it has landed, whatever it drew."""
        if self.drawn:
            self.drawn.wait()
        elif self.rows.hidden.is_cuda:
            torch.cuda.current_stream(self.rows.hidden.device).synchronize()


class Runner:
    """A decoder and the pages it fills.

    Args:
        micro_batches: into how many parts an eager step is cut.
        graphs: of the same model and cache, or None: every step is eager.
        experts: are told of every pass.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PageCache,
        micro_batches: int,
        graphs: DecodeGraphs | None,
        experts: ExpertSteps,
    ) -> None:
        self._model, self._cache, self._micro_batches, self._graphs = model, cache, micro_batches, graphs
        self._experts = experts

    @property
    def can_run_ahead(self) -> bool:
        """Whether rows can be launched before the host knows their tokens."""
        return self._graphs is not None

    def warm_up(self, chunk: int, num_drafts: int, sequences: int, *, decodes: bool) -> WarmedUp | None:
        """Before anything lies in the pages; None where nothing is recorded, so that nothing would be gained.

        Args:
            chunk, num_drafts, sequences: as of `EngineConfig`.
            decodes: whether decode steps are to come.
        """
        if self._graphs is None:
            return None
        work = WarmUp(self._model, self._cache, self.draw, chunk, num_drafts, sequences, self._experts)
        return work.run(self._graphs if decodes else None)

    @property
    def can_go_on(self) -> bool:
        """Whether a step may be launched behind another one, with the experts of that."""
        return self._experts.is_current

    def launch(self, batch: Batch, on_layer: OnLayer | None, drafts: Tensor | None = None) -> Flight:
        """Run a batch while nothing else is under way.

        Args:
            on_layer: is told of batches with prompts in them; decode steps may be graphs.
            drafts: [N], those that the host does not know (`speculate.UNKNOWN`), in order.

        Raises:
            Exception: of `ExpertSteps.prepare`; nothing has begun.
        """
        self._experts.prepare()
        started = time.perf_counter()
        places: list[range] = []
        logit_rows: list[int] = []
        sample_rows: list[SampleRow] = []
        rows = self._forward(batch, on_layer, drafts)
        for share, first in zip(batch.shares, rows.firsts, strict=True):
            before = len(logit_rows)
            if share.is_last_chunk:
                logit_rows.extend(range(first + share.num_known - 1, first + share.num_rows))
                row = share.sequence.next_row()
                sample_rows.extend(row.after(share.drafts[:place]) for place in range(len(share.drafts) + 1))
            places.append(range(before, len(logit_rows)))
        drawn = self.draw(take(rows.hidden, logit_rows), sample_rows) if logit_rows else None
        return Flight(batch, batch.is_decode, rows, drawn, places, started)

    def launch_ahead(self, batch: Batch, before: Flight) -> Flight:
        """Run a batch of `schedule_ahead` behind a step that still runs, with what that one draws."""
        assert self._graphs
        assert before.drawn
        started, sequences = time.perf_counter(), [share.sequence for share in batch.shares]
        pairs = zip(before.batch.shares, before.places, strict=True)
        place_of = {id(share.sequence): places.start for share, places in pairs}
        step = StepRows(
            [[-1]] * len(sequences),
            [sequence.num_cached + 1 for sequence in sequences],
            [sequence.pages for sequence in sequences],
            take(before.drawn.tokens, [place_of[id(sequence)] for sequence in sequences]),
        )
        rows = self._graphs.forward(step)
        sample_rows = [sequence.next_row().after((0,)) for sequence in sequences]
        drawn = self.draw(take(rows.hidden, rows.firsts), sample_rows)
        places = [range(i, i + 1) for i in range(len(sequences))]
        return Flight(batch, True, rows, drawn, places, started)

    def confirm(self, flight: Flight) -> None:
        """Wait for a step as far as its results depend on others.

        Raises:
            Exception: of `ExpertSteps.check`; they mean nothing.
        """
        self._experts.check(flight.wait)

    def draft(self, step: StepRows, hidden: Tensor, firsts: list[int]) -> Tensor:
        """Run the MTP module, filling its pages.

        Args:
            step: rows of each sequence, here in any number; the row of position i carries token i + 1.
            hidden: [N, D], and where in it the first row of each sequence is; the others follow.

        Returns:
            [S, D] behind the last row of each sequence.
        """
        counts = step.counts
        if self._graphs and max(counts) <= MAX_DECODE_ROWS:
            out = self._graphs.draft(step, hidden, firsts)
        else:
            runs = [range(first, first + count) for first, count in zip(firsts, counts, strict=True)]
            rows = take(hidden, [row for run in runs for row in run])
            starts = list(accumulate(counts[:-1], initial=0))
            with self._experts.announce((len(rows),), is_draft=True, captured=False):
                out = HiddenRows(self._model.draft(self._inputs(step), rows, self._cache), starts)
        return take(out.hidden, [first + count - 1 for first, count in zip(out.firsts, counts, strict=True)])

    def draw(self, hidden: Tensor, rows: list[SampleRow]) -> Drawing:
        """Begin to draw a token behind each of the hidden states [R, D]."""
        return Drawing(self._model.logits(hidden), rows, backend=self._model.backend)

    def _forward(self, batch: Batch, on_layer: OnLayer | None, drafts: Tensor | None) -> HiddenRows:
        if self._graphs and batch.is_decode:
            return self._graphs.forward(replace(_rows_of(batch), drawn=drafts))
        assert drafts is None, "they are read before a prompt runs beside them"
        parts = [
            MicroBatch(self._inputs(_rows_of(part)), on_layer=partial(on_layer, part) if on_layer else None)
            for part in batch.parts(self._micro_batches)
        ]
        counts = tuple(part.inputs.num_rows for part in parts)
        with self._experts.announce(counts, is_draft=False, captured=False):
            found = self._model.forward_in_turn(parts, self._cache)
        hidden = found[0] if len(found) == 1 else torch.cat(found)
        return HiddenRows(
            hidden, list(accumulate((share.num_rows for share in batch.shares[:-1]), initial=0))
        )

    def _inputs(self, rows: StepRows) -> ForwardInputs:
        assert rows.drawn is None, "what runs eagerly knows its tokens"
        return ForwardInputs.build(rows.token_ids, rows.starts, rows.pages, self._model.device)


def _rows_of(batch: Batch) -> StepRows:
    return StepRows(
        [share.token_ids for share in batch.shares],
        [share.sequence.num_cached for share in batch.shares],
        [share.sequence.pages for share in batch.shares],
    )

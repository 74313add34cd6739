"""Decode steps as captured graphs: what the host launches with one call instead of hundreds a step.

A decode step asks the host nothing between its first kernel and its last, so it can be recorded once for a
`Bucket`, a shape that many steps fit when they are filled up, and replayed with other numbers in its buffers.
Graphs end with the hidden states: what is drawn from them differs from row to row, is a few launches, and
these are made while the graph still runs.

A row that fills up has position -1, so that it sees nothing, and slot -1, so that it writes nothing. All of
them carry token 0 and become alike, so that they ask for one row's experts.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from model.config import ModelConfig
from model.decoder import Decoder, MicroBatch
from model.inputs import MAX_DECODE_ROWS, PAGE_SIZE, ForwardInputs, PackedRows, Segment, slots_of_run
from model.moe import ExpertSteps, NoSteps
from model.pages import PageCache
from model.transfer import put, to_device

MOST_RECORDED = 64  # of each kind; one of 256 sequences of 4 rows over 160K tokens holds 33 MiB of buffers

Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], object], Tensor]]
"""Records what a function does; gives what does it again, and the tensor that then holds its result."""


@dataclass(frozen=True)
class Bucket:
    """A shape of decode steps: so many sequences of so many rows, and no context longer than `context`."""

    num_sequences: int
    rows_per_sequence: int
    context: int

    @classmethod
    def of(cls, num_sequences: int, most_rows: int, longest: int, config: ModelConfig) -> "Bucket":
        """The smallest that holds a step. Whether attention chooses keys is as without filling up."""
        assert 1 <= most_rows <= MAX_DECODE_ROWS, most_rows
        context = config.index_topk
        if longest > context:
            context = min(1 << (longest - 1).bit_length(), config.max_position_embeddings)
        step = 1 << max(0, (num_sequences - 1).bit_length() - 3)  # at most a quarter is filled up
        return cls(-(-num_sequences // step) * step, most_rows, context)

    @property
    def num_rows(self) -> int:
        return self.num_sequences * self.rows_per_sequence

    def fill_up(self, runs: Sequence[Sequence[int]], filler: int) -> list[int]:
        """[T] numbers of its rows, from a run for each sequence."""
        numbers = [filler] * self.num_rows
        for row, run in zip(range(0, self.num_rows, self.rows_per_sequence), runs, strict=False):
            numbers[row : row + len(run)] = run
        return numbers


@dataclass(frozen=True)
class StepRows:
    """The new rows of some sequences, host data; one entry a sequence.

    Attributes:
        token_ids: the new tokens; -1 stands for one that lies on the device.
        starts: position of each sequence's first row.
        pages: that hold its context; never changed in place.
        drawn: [N] int64, the tokens that lie there, in order of rows. What is below 0 is none: its row means
            nothing, nor do those behind it in its sequence.
    """

    token_ids: list[list[int]]
    starts: list[int]
    pages: list[list[int]]
    drawn: Tensor | None = None

    @property
    def counts(self) -> list[int]:
        """Rows of each sequence."""
        return [len(tokens) for tokens in self.token_ids]

    def bucket(self, config: ModelConfig) -> Bucket:
        """The smallest that holds them."""
        counts = self.counts
        longest = max(start + count for start, count in zip(self.starts, counts, strict=True))
        return Bucket.of(len(counts), max(counts), longest, config)


@dataclass(frozen=True)
class HiddenRows:
    """[T, D] hidden states, and which is each sequence's first; its others follow.

    Those of a graph are overwritten by the next step of the same bucket.
    """

    hidden: Tensor
    firsts: list[int]


class DecodeGraphs:
    """The decode steps of a model over a cache, each bucket recorded when it first comes.

    Those used last are kept. All share one pool of memory and must follow one another on one stream.

    Args:
        capture: how a function is recorded that has run before; None for CUDA graphs.
        experts: are told of every pass, also of those that are run to be recorded.
        micro_batches: into how many parts a step is cut, which are at the experts in turn.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PageCache,
        capture: Capture | None = None,
        experts: ExpertSteps | None = None,
        micro_batches: int = 1,
    ) -> None:
        self._model, self._cache, self._micro_batches = model, cache, micro_batches
        self._capture = capture or CudaCapture()
        self._experts = experts or NoSteps()
        self._steps: dict[Bucket, _Recorded] = {}
        self._drafts: dict[Bucket, _Recorded] = {}
        self._experts.on_parting(self.forget)

    def forget(self) -> None:
        """Drop all recordings; none of them is running."""
        self._steps.clear()
        self._drafts.clear()

    @torch.inference_mode()
    def warm_up(self, num_sequences: int, longest: int, most_rows: int = 1) -> None:
        """Record what steps of such a shape take, those of the draft module too where they verify drafts."""
        config = self._model.config
        self._experts.prepare()
        self._forward_of(Bucket.of(num_sequences, most_rows, longest, config))
        if most_rows > 1:
            for num_rows in (most_rows, 1):  # what was verified, then a draft from a draft
                self._draft_of(Bucket.of(num_sequences, num_rows, longest, config))

    def forward(self, step: StepRows) -> HiddenRows:
        """As `Decoder.forward`."""
        bucket = step.bucket(self._model.config)
        return self._run(self._forward_of(bucket), step)

    def draft(self, step: StepRows, hidden: Tensor, firsts: Sequence[int]) -> HiddenRows:
        """As `Decoder.draft`.

        Args:
            hidden: [N, D] as `forward` or this gave it, or copies of such rows.
            firsts: which of them goes with the first row of each sequence; the others follow it.
        """
        bucket = step.bucket(self._model.config)
        recorded = self._draft_of(bucket)
        assert recorded.hidden is not None
        runs = [range(first, first + count) for first, count in zip(firsts, step.counts, strict=True)]
        rows = bucket.fill_up(runs, 0)
        recorded.hidden.copy_(hidden.index_select(0, to_device(rows, torch.int64, hidden.device)))
        return self._run(recorded, step)

    def _run(self, recorded: "_Recorded", step: StepRows) -> HiddenRows:
        recorded.rows.fill(step)
        with self._announced(recorded.rows, recorded.hidden):
            recorded.replay()
        stride = recorded.rows.bucket.rows_per_sequence
        return HiddenRows(recorded.result, [i * stride for i in range(len(step.starts))])

    def _announced(self, rows: "_StaticRows", hidden: Tensor | None) -> AbstractContextManager[None]:
        is_draft = hidden is not None
        counts = (rows.bucket.num_rows,) if is_draft else rows.part_sizes
        return self._experts.announce(counts, is_draft=is_draft, captured=True)

    def _forward_of(self, bucket: Bucket) -> "_Recorded":
        return _recorded(self._steps, bucket, self._record_forward)

    def _draft_of(self, bucket: Bucket) -> "_Recorded":
        return _recorded(self._drafts, bucket, self._record_draft)

    def _record_forward(self, bucket: Bucket) -> "_Recorded":
        rows = _StaticRows(bucket, self._model.device, self._micro_batches)
        return self._record(rows, None, partial(_forward, self._model, rows, self._cache))

    def _record_draft(self, bucket: Bucket) -> "_Recorded":
        model, rows = self._model, _StaticRows(bucket, self._model.device)
        width = model.config.hidden_size
        hidden = torch.zeros(bucket.num_rows, width, dtype=model.dtype, device=model.device)
        return self._record(rows, hidden, partial(_draft, model, rows, hidden, self._cache))

    def _record(self, rows: "_StaticRows", hidden: Tensor | None, run: Callable[[], Tensor]) -> "_Recorded":
        with self._announced(rows, hidden):
            run()  # kernels are compiled and make what they keep between launches: not while recording
        return _Recorded(rows, hidden, *self._capture(run))


def _recorded(
    kept: dict[Bucket, "_Recorded"], bucket: Bucket, record: Callable[[Bucket], "_Recorded"]
) -> "_Recorded":
    """One of those kept, in order of last use, or a new one for which the first of them gives way."""
    found = kept.pop(bucket, None)
    if found is None:
        if len(kept) == MOST_RECORDED:
            del kept[next(iter(kept))]  # its memory serves those that run after it on the stream
        found = record(bucket)
    kept[bucket] = found
    return found


def _forward(model: Decoder, rows: "_StaticRows", cache: PageCache) -> Tensor:
    parts = [MicroBatch(part) for part in rows.parts()]
    if len(parts) == 1:
        return model.forward(parts[0].inputs, cache)
    return torch.cat(model.forward_in_turn(parts, cache))


def _draft(model: Decoder, rows: "_StaticRows", hidden: Tensor, cache: PageCache) -> Tensor:
    return model.draft(rows.inputs(), hidden, cache)


class CudaCapture:
    """Records into CUDA graphs that share a pool of memory; of one function after it has run."""

    def __init__(self) -> None:
        self._keeper = torch.cuda.CUDAGraph()  # a pool ends with the last graph that uses it
        with torch.cuda.graph(self._keeper, capture_error_mode="relaxed"):
            torch.zeros(1, device="cuda")

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Relaxed: other threads of the process may use the device meanwhile, and NCCL does in ours.
        with torch.cuda.graph(graph, pool=self._keeper.pool(), capture_error_mode="relaxed"):
            result = run()
        return graph.replay, result


@dataclass(frozen=True)
class _Recorded:
    """A bucket's buffers, how to run it, and where its result then lies; `hidden` [T, D] for drafts."""

    rows: "_StaticRows"
    hidden: Tensor | None
    replay: Callable[[], object]
    result: Tensor


class _StaticRows:
    """A bucket's inputs: numbers are laid out in pinned memory, and one copy brings them to the device."""

    def __init__(self, bucket: Bucket, device: torch.device, micro_batches: int = 1) -> None:
        self.bucket = bucket
        cuts = [bucket.num_sequences * i // micro_batches for i in range(micro_batches + 1)]
        self._parts = [range(*cut) for cut in pairwise(cuts) if cut[0] < cut[1]]  # of sequences
        on_gpu = device.type == "cuda"
        self._packed = PackedRows(bucket.num_rows, bucket.num_sequences, -(-bucket.context // PAGE_SIZE))
        host = torch.zeros(self._packed.size, dtype=torch.int64, pin_memory=on_gpu)
        self._host, self._views = host, [view.numpy() for view in self._packed.split(host)]
        self._views[1][:] = self._views[2][:] = -1
        self._device = host.to(device, copy=True)
        self._token_ids = self._packed.split(self._device)[0]
        self._copied = torch.cuda.Event() if on_gpu else None
        self._pages: list[list[int] | None] = [None] * bucket.num_sequences  # as they stand in the table

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Rows of each micro-batch."""
        return tuple(len(part) * self.bucket.rows_per_sequence for part in self._parts)

    def parts(self) -> list[ForwardInputs]:
        """As `inputs`, for each micro-batch."""
        inputs, stride = self.inputs(), self.bucket.rows_per_sequence
        return [inputs.part(part, range(part.start * stride, part.stop * stride)) for part in self._parts]

    def inputs(self) -> ForwardInputs:
        """Made anew for whoever records: what follows from them must be recorded too."""
        n, longest = self.bucket.rows_per_sequence, self.bucket.context
        segments = tuple(Segment(row, row + n, longest) for row in range(0, self.bucket.num_rows, n))
        return self._packed.inputs(self._device, segments)

    def fill(self, step: StepRows) -> None:
        """Bring a step's numbers to the device."""
        if self._copied:
            self._copied.synchronize()  # of the step before, which began long ago
        token_ids, positions, slots, table = self._views
        runs = [range(start, start + count) for start, count in zip(step.starts, step.counts, strict=True)]
        taken = [slots_of_run(held, run.start, run.stop) for held, run in zip(step.pages, runs, strict=True)]
        tokens = self.bucket.fill_up(step.token_ids, 0)
        token_ids[:] = [max(token, 0) for token in tokens]
        positions[:] = self.bucket.fill_up(runs, -1)
        slots[:] = self.bucket.fill_up(taken, -1)
        for i, held in enumerate(step.pages):
            if self._pages[i] is not held:  # most sequences were here in the last step too
                shown = held[: table.shape[1]]
                table[i, : len(shown)], self._pages[i] = shown, held
        self._device.copy_(self._host, non_blocking=True)
        if step.drawn is not None:
            places = [row for row, token in enumerate(tokens) if token < 0]
            put(self._token_ids, places, step.drawn.clamp(min=0))
        if self._copied:
            self._copied.record()

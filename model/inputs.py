"""What one forward pass is given: tokens of several sequences, part of whose context lies in pages."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from model.transfer import to_device

PAGE_SIZE = 64  # tokens a page; the planar index page fixes it
MAX_DECODE_ROWS = 4  # that a sequence contributes while it decodes: its last token and three drafts


@dataclass(frozen=True)
class Segment:
    """The rows that one sequence contributes; host numbers, known to the scheduler without asking a device.

    Rows `start` to `stop` are the sequence's last tokens; its whole context is `kv_len` long, them included.
    """

    start: int
    stop: int
    kv_len: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class DecodeRows:
    """Rows that go through the paged kernels together: n of each of S sequences, T = S * n.

    Attributes:
        rows: which of the batch's.
        page_table: [S, max_pages]; visible: [T].
        rows_per_sequence: n.
        max_visible: the longest context among them, known to the host.
    """

    rows: slice | Tensor
    page_table: Tensor
    visible: Tensor
    rows_per_sequence: int
    max_visible: int


@dataclass(frozen=True)
class ForwardInputs:
    """One ragged batch. T rows of S sequences.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64; a row sees the keys at positions up to its own, so one of -1 sees nothing.
        slots: [T] int64, where each row's latent and index key go: page * PAGE_SIZE + offset; -1: nowhere.
        page_table: [S, max_pages] int64, the pages of each sequence in order; filler is never read.
        segments: one a sequence, in order of rows.
    """

    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    page_table: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def build(
        cls,
        token_ids: list[list[int]],
        starts: list[int],
        pages: list[list[int]],
        device: torch.device | str = "cpu",
    ) -> "ForwardInputs":
        """Make the tensors of a batch from host lists, one entry a sequence.

        Args:
            token_ids: the new tokens.
            starts: position of the first new token, i.e. how many tokens already lie in pages.
            pages: page ids that hold the context, new tokens included.
        """
        segments: list[Segment] = []
        positions: list[int] = []
        slots: list[int] = []
        row = 0
        for tokens, start, held in zip(token_ids, starts, pages, strict=True):
            stop = start + len(tokens)
            segments.append(Segment(row, row + len(tokens), stop))
            positions.extend(range(start, stop))
            slots.extend(slots_of_run(held, start, stop))
            row += len(tokens)
        width = max(len(held) for held in pages)
        flat = [token for tokens in token_ids for token in tokens]
        table = [page for held in pages for page in (*held, *[0] * (width - len(held)))]
        parts = [flat, positions, slots, table]
        packed = PackedRows(len(flat), len(pages), width)
        numbers = [number for part in parts for number in (*part, *[0] * (len(part) % 2))]
        return packed.inputs(to_device(numbers, torch.int64, torch.device(device)), tuple(segments))

    @cached_property
    def visible(self) -> Tensor:
        """[T] int64: how many keys each row sees."""
        return self.positions + 1

    @cached_property
    def decode_rows(self) -> DecodeRows | None:
        """Rows of sequences with at most `MAX_DECODE_ROWS`, or None where there are none."""
        return _decode_rows(self)

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def part(self, sequences: range, rows: range) -> "ForwardInputs":
        """Some of the sequences, whose rows these are: views."""
        here = slice(rows.start, rows.stop)
        return ForwardInputs(
            self.token_ids[here],
            self.positions[here],
            self.slots[here],
            self.page_table[sequences.start : sequences.stop],
            tuple(
                Segment(segment.start - rows.start, segment.stop - rows.start, segment.kv_len)
                for segment in self.segments[sequences.start : sequences.stop]
            ),
        )

    def pages_of(self, sequence: int) -> Tensor:
        """[N] int64: the pages that hold one sequence's context."""
        num_pages = -(-self.segments[sequence].kv_len // PAGE_SIZE)
        return self.page_table[sequence, :num_pages]

    def slots_of(self, sequence: int) -> Tensor:
        """[kv_len] int64: the slot of every position of one sequence."""
        offsets = torch.arange(PAGE_SIZE, device=self.slots.device)
        slots = self.pages_of(sequence).unsqueeze(1) * PAGE_SIZE + offsets
        return slots.flatten()[: self.segments[sequence].kv_len]


@dataclass(frozen=True)
class PackedRows:
    """Where the numbers of a `ForwardInputs` stand in one run of int64, so that one copy brings them all.

    Each part begins at a multiple of 16 bytes: kernels are compiled for pointers that do, or that need not.
    """

    num_rows: int
    num_sequences: int
    width: int

    @property
    def size(self) -> int:
        return 3 * self._padded + self.num_sequences * self.width

    @property
    def _padded(self) -> int:
        return self.num_rows + self.num_rows % 2

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Token ids, positions and slots [T], and the page table [S, width]: views of packed [size]."""
        rows = packed[: 3 * self._padded].view(3, self._padded)[:, : self.num_rows]
        table = packed[3 * self._padded :][: self.num_sequences * self.width]
        return rows[0], rows[1], rows[2], table.view(self.num_sequences, self.width)

    def inputs(self, packed: Tensor, segments: tuple[Segment, ...]) -> ForwardInputs:
        return ForwardInputs(*self.split(packed), segments)


def slots_of_run(pages: list[int], start: int, stop: int) -> list[int]:
    """The slots of positions start to stop of a sequence that holds these pages."""
    assert len(pages) * PAGE_SIZE >= stop, "a sequence was given fewer pages than its tokens need"
    return [pages[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, stop)]


def _decode_rows(inputs: ForwardInputs) -> DecodeRows | None:
    chosen = [i for i, segment in enumerate(inputs.segments) if segment.num_rows <= MAX_DECODE_ROWS]
    if not chosen:
        return None
    segments = [inputs.segments[i] for i in chosen]
    longest = max(segment.kv_len for segment in segments)
    counts = {segment.num_rows for segment in segments}
    neighbours = chosen[-1] - chosen[0] + 1 == len(chosen)
    if len(counts) == 1 and neighbours:
        rows = slice(segments[0].start, segments[-1].stop)
        table = inputs.page_table[chosen[0] : chosen[-1] + 1]
        return DecodeRows(rows, table, inputs.visible[rows], counts.pop(), longest)
    device = inputs.slots.device
    places = [row for segment in segments for row in range(segment.start, segment.stop)]
    owners = [i for i, segment in zip(chosen, segments, strict=True) for _ in range(segment.num_rows)]
    rows_T = to_device(places, torch.int64, device)
    table = inputs.page_table[to_device(owners, torch.int64, device)]
    return DecodeRows(rows_T, table, inputs.visible[rows_T], 1, longest)

"""What one forward pass is given: tokens of several sequences, part of whose context lies in pages."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

PAGE_SIZE = 64  # tokens a page; the planar index page fixes it


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
class ForwardInputs:
    """One ragged batch. T rows of S sequences.

    Attributes:
        token_ids: [T] int64.
        positions: [T] int64; a row sees the keys at positions up to its own.
        slots: [T] int64, where each row's latent and index key go: page * PAGE_SIZE + offset.
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
            assert len(held) * PAGE_SIZE >= stop, "a sequence was given fewer pages than its tokens need"
            segments.append(Segment(row, row + len(tokens), stop))
            positions.extend(range(start, stop))
            slots.extend(held[p // PAGE_SIZE] * PAGE_SIZE + p % PAGE_SIZE for p in range(start, stop))
            row += len(tokens)
        width = max(len(held) for held in pages)
        table = [held + [0] * (width - len(held)) for held in pages]
        flat = [token for tokens in token_ids for token in tokens]
        return cls(
            token_ids=torch.tensor(flat, device=device),
            positions=torch.tensor(positions, device=device),
            slots=torch.tensor(slots, device=device),
            page_table=torch.tensor(table, device=device),
            segments=tuple(segments),
        )

    @cached_property
    def visible(self) -> Tensor:
        """[T] int64: how many keys each row sees."""
        return self.positions + 1

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    def pages_of(self, sequence: int) -> Tensor:
        """[N] int64: the pages that hold one sequence's context."""
        num_pages = -(-self.segments[sequence].kv_len // PAGE_SIZE)
        return self.page_table[sequence, :num_pages]

    def slots_of(self, sequence: int) -> Tensor:
        """[kv_len] int64: the slot of every position of one sequence."""
        offsets = torch.arange(PAGE_SIZE, device=self.slots.device)
        slots = self.pages_of(sequence).unsqueeze(1) * PAGE_SIZE + offsets
        return slots.flatten()[: self.segments[sequence].kv_len]

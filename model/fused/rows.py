"""Which rows of a batch run together through the paged kernels: those of sequences that decode."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.inputs import ForwardInputs

MAX_DECODE_ROWS = 4  # a sequence's last token and three drafts


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


def decode_rows(inputs: ForwardInputs) -> DecodeRows | None:
    """Those of sequences with at most `MAX_DECODE_ROWS`, or None where there are none."""
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
    rows_T = torch.tensor(places, device=device)
    table = inputs.page_table[torch.tensor(owners, device=device)]
    return DecodeRows(rows_T, table, inputs.visible[rows_T], 1, longest)

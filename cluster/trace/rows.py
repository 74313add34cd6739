"""The rows that are kept in full: which ones, and what they say."""

from dataclasses import replace

import numpy as np
from torch import Tensor

from cluster.trace.recorder import Pass
from cluster.trace.report import Row
from cluster.trace.tally import RoutingTally


class Rows:
    """Keeps up to `max_rows` rows: the prompt's last, the answer's in order, the prompt's from its end.

    Args:
        index_topk: rows that see no more positions than this read all of them; None for dense attention.
    """

    def __init__(self, num_prompt: int, max_rows: int, index_topk: int | None, routing: RoutingTally) -> None:
        self._num_prompt, self._max_rows = num_prompt, max_rows
        self._index_topk, self._routing = index_topk, routing
        self._rows: dict[int, Row] = {}

    def add(self, run: Pass, num_valid: int) -> None:
        """A pass of the decoder, of which the first rows stand."""
        for row in range(num_valid):
            if self._may_be_shown(run.start + row):
                self._rows[run.start + row] = self._row(run, row)

    def complete(self, run: Pass, num_valid: int) -> None:
        """A pass of the MTP module, whose layer comes last in the rows that are there already."""
        for row in range(num_valid):
            if known := self._rows.get(run.start + row):
                more = self._row(run, row)
                self._rows[run.start + row] = replace(
                    known,
                    selected=known.selected + more.selected,
                    experts=known.experts + more.experts,
                    weights=known.weights + more.weights,
                    nodes=known.nodes + more.nodes,
                )

    def chosen(self) -> tuple[Row, ...]:
        """The rows that are shown, in order of position."""
        last_of_prompt = self._num_prompt - 1
        answer = sorted(position for position in self._rows if position > last_of_prompt)
        prompt = sorted((position for position in self._rows if position < last_of_prompt), reverse=True)
        positions = [last_of_prompt, *answer, *prompt][: self._max_rows]
        return tuple(self._rows[position] for position in sorted(positions))

    def _may_be_shown(self, position: int) -> bool:
        """However long the answer becomes."""
        return self._num_prompt - self._max_rows <= position < self._num_prompt + self._max_rows - 1

    def _row(self, run: Pass, row: int) -> Row:
        position = run.start + row
        has_choice = self._index_topk is not None and position >= self._index_topk
        experts = [routed.experts[row] for routed in run.routed]
        return Row(
            position=position,
            selected=tuple(_gaps(layer[row]) if has_choice else None for layer in run.selected),
            experts=tuple(tuple(chosen.tolist()) for chosen in experts),
            weights=tuple(
                tuple(round(weight, 4) for weight in routed.weights[row].tolist()) for routed in run.routed
            ),
            nodes=tuple(self._routing.nodes_of(chosen.numpy()) for chosen in experts),
        )


def _gaps(selected: Tensor) -> tuple[int, ...]:
    """The first of some ascending positions [index_topk] and the distances between them; -1 is filler."""
    positions = selected[selected >= 0].numpy()
    return tuple(np.diff(positions, prepend=0).tolist())

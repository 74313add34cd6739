"""Running counts over the rows of a request: what the indexers selected, and where the gates sent tokens.

Rows come in a pass at a time and are counted at once: a long prompt leaves counts behind and not rows.
Shapes: T rows, k experts a token, E experts.
"""

import math
from collections import Counter, defaultdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cluster.trace.recorder import Routed
from cluster.trace.report import Copies, Node, Routing
from model.config import ModelConfig
from workers.placement import ExpertPlacement, TooManyNodes

MAX_BUCKETS = 256


class SelectionTally:
    """How often each key was selected, by layer, over rows that had to choose.

    Args:
        index_topk: rows that see no more keys than this choose nothing.
        context: positions there may be.
    """

    def __init__(self, index_topk: int, context: int) -> None:
        self._index_topk, self._context = index_topk, context
        self._hits: dict[int, npt.NDArray[np.int64]] = {}
        self._rows: dict[int, npt.NDArray[np.int64]] = {}

    def add(self, layer: int, start: int, selected: Tensor) -> None:
        """Count rows of positions from `start` on: [T, index_topk] positions."""
        first = max(0, self._index_topk - start)  # the first row that sees more than index_topk keys
        chosen = selected[first:]
        if layer not in self._hits:
            self._hits[layer], self._rows[layer] = np.zeros((2, self._context), dtype=np.int64)
        self._hits[layer] += torch.bincount(chosen.flatten(), minlength=self._context).numpy()
        self._rows[layer][start + first : start + len(selected)] += 1

    def shares(self, layer: int, bucket: int, length: int) -> tuple[float | None, ...]:
        """For each bucket of positions the share selected of the pairs of row and key; None for no pair."""
        if layer not in self._hits:
            return (None,) * math.ceil(length / bucket)
        # A key is seen by every row at its position or behind it.
        seen = self._rows[layer][::-1].cumsum()[::-1]
        starts = np.arange(0, length, bucket)
        hits = np.add.reduceat(self._hits[layer][:length], starts)
        pairs = np.add.reduceat(seen[:length], starts)
        return tuple(
            round(hit / pair, 4) if pair else None
            for hit, pair in zip(hits.tolist(), pairs.tolist(), strict=True)
        )


class RoutingTally:
    """Which experts and how many nodes the tokens needed, by MoE layer."""

    def __init__(self, config: ModelConfig, placement: ExpertPlacement) -> None:
        self._config, self._placement = config, placement
        self._prompt: dict[int, npt.NDArray[np.int64]] = defaultdict(self._no_load)
        self._answer: dict[int, npt.NDArray[np.int64]] = defaultdict(self._no_load)
        self._nodes: dict[int, Counter[int]] = defaultdict(Counter)
        self._unrestricted: dict[int, Counter[int]] = defaultdict(Counter)

    def add(self, layer: int, routed: Routed, rows: slice, *, of_prompt: bool) -> None:
        """Count some rows of one layer.

        Raises:
            TooManyNodes: the gate did not keep to `topk_group`.
        """
        experts = routed.experts[rows].numpy()
        load = (self._prompt if of_prompt else self._answer)[layer]
        load += np.bincount(experts.ravel(), minlength=self._config.n_routed_experts)
        needed = self._num_nodes(experts)
        if needed.max(initial=0) > self._config.topk_group:
            row = int(needed.argmax())
            raise TooManyNodes(row, int(needed[row]), self._config.topk_group)
        self._nodes[layer].update(needed.tolist())
        self._unrestricted[layer].update(self._num_nodes(routed.unrestricted[rows].numpy()).tolist())

    def nodes_of(self, experts: npt.NDArray[np.int64]) -> tuple[int, ...]:
        """The nodes that hold one token's experts."""
        return tuple(np.unique(self._placement.share_of_expert[experts]).tolist())

    def routing(self, itemsize: int, rejected_rows: int) -> Routing:
        """The counts, for activations of so many bytes a number."""
        layers = sorted(self._nodes)
        size = self._placement.group_size
        nodes = tuple(
            Node(
                share.peer,
                (share.groups.start, share.groups.stop),
                (share.groups.start * size, share.groups.stop * size),
            )
            for share in self._placement.shares
        )
        k = self._config.num_experts_per_tok
        copies = Copies(
            sent=_mean(self._nodes),
            unrestricted=_mean(self._unrestricted),
            one_an_expert=k,
            bytes_each=self._config.hidden_size * itemsize + k * (2 + 4),  # experts in int16, weights in fp32
        )
        return Routing(
            nodes=nodes,
            layers=tuple(layers),
            prompt_load=tuple(tuple(self._prompt[layer].tolist()) for layer in layers),
            answer_load=tuple(tuple(self._answer[layer].tolist()) for layer in layers),
            nodes_per_token=tuple(self._histogram(self._nodes[layer]) for layer in layers),
            unrestricted_nodes_per_token=tuple(
                self._histogram(self._unrestricted[layer]) for layer in layers
            ),
            copies=copies,
            rejected_rows=rejected_rows,
        )

    def _no_load(self) -> npt.NDArray[np.int64]:
        return np.zeros(self._config.n_routed_experts, dtype=np.int64)

    def _num_nodes(self, experts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """[T] from [T, k]: experts of one node stand for one."""
        nodes = np.sort(self._placement.share_of_expert[experts], axis=1)
        counts: npt.NDArray[np.int64] = 1 + (np.diff(nodes, axis=1) > 0).sum(axis=1)
        return counts

    def _histogram(self, counts: Counter[int]) -> tuple[int, ...]:
        return tuple(counts[number] for number in range(len(self._placement.shares) + 1))


def _mean(counts: dict[int, Counter[int]]) -> float:
    total: Counter[int] = sum(counts.values(), Counter())
    return round(sum(number * rows for number, rows in total.items()) / max(1, total.total()), 4)

"""The attention's end between GPUs: routed experts that are elsewhere, without asking the host anything.

`CarrierExperts` sends the rows of a layer to the GPUs that hold its experts and adds what they answer in the
tree of groups. It only puts work on the current stream, so a decode step with its experts elsewhere can be
captured whole in a CUDA graph. The other end, and what travels, is in `gpu_experts.py`.

Built is: every peer gets every row once, and answers all of them, with zeros where a row has no expert there.
So a message's size is known when a graph is captured. With 2 nodes it costs 4 % more than it needs to, with 8
it is 2.5 times as much. Not built is sending only the rows that a node needs, at most `topk_group` nodes a
row: `RoutedRows` has them listed by group on the device (`node_tokens`, `node_counts`), to be gathered to the
front of a slot of fixed capacity, with their count, and the sums to be scattered back. That is to come with
carriers between hosts, where bytes are what a hop costs.

Shapes: T rows of a micro-batch, D width, k experts a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.block_sum import block_sum
from kernels.group_tree import blocks_of
from kernels.list_rows import RoutedRows
from kernels.quantize_rows import quantize_rows
from model.config import ModelConfig
from model.fused.feed_forward import Quantized
from model.moe import DispatchPlan, PendingSum
from workers.gpu_experts import StepPlan, pack_rows, sums_parcel
from workers.transport.carrier import Carrier


@dataclass(frozen=True)
class ExpertPeer:
    """A GPU that holds groups of experts: how rows get there, and how its host is told of a step."""

    carrier: Carrier
    groups: range
    tell: Callable[[StepPlan], None]


class CarrierExperts:
    """The `Experts` of a fused model whose experts are on other GPUs. Owns the carriers to them.

    A step is `announce`, then the model's pass (or the replay of a graph of it), then, when its stream is
    idle, `check`. Micro-batches go through the layers in turn, so that the n-th of them always has slot n.
    """

    def __init__(
        self, config: ModelConfig, peers: Sequence[ExpertPeer], *, num_slots: int, backend: Backend
    ) -> None:
        """
        Args:
            peers: in ascending order of their groups; together each group once.
            num_slots: micro-batches that may be at the experts at once; the carriers have as many slots.
        """
        held = [group for peer in peers for group in peer.groups]
        assert held == list(range(config.n_group)), f"the peers hold groups {held}"
        self._config, self._peers, self._backend = config, tuple(peers), backend
        self._free = list(range(num_slots))  # a heap

    @property
    def listed(self) -> range:
        """As `QuantizedExperts.listed`. The other end lists its rows itself."""
        return range(self._config.n_routed_experts)

    def announce(self, plan: StepPlan) -> None:
        """Tell every peer which step comes, before any of its rows are sent."""
        for peer in self._peers:
            peer.tell(plan)

    def check(self) -> None:
        """Whether all answers of the steps so far have come; their results mean nothing before.

        Raises:
            CarrierFailed: they have not. The carriers are good for `close` only.
        """
        for peer in self._peers:
            peer.carrier.check()

    def abort(self, reason: str) -> None:
        """Let all waits end, now and later, from any thread: a step is thrown away."""
        for peer in self._peers:
            peer.carrier.abort(reason)

    def close(self) -> None:
        """Give the carriers back. Graphs that hold their messages are gone, the stream is idle."""
        for peer in self._peers:
            peer.carrier.close()

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """As `Experts.submit`, for rows of another gate, which are quantised first."""
        quantized = quantize_rows(x, backend=self._backend)
        return self._send(quantized, plan.experts.int(), plan.weights, lambda: None, torch.float32)

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        """As `QuantizedExperts.submit_quantized`."""
        return self._send(x, plan.experts, plan.weights, shared, torch.bfloat16)

    def _send(
        self,
        x: Quantized,
        experts: Tensor,
        weights: Tensor,
        shared: Callable[[], Tensor | None],
        dtype: torch.dtype,
    ) -> "_Pending":
        assert self._free, "more micro-batches than slots"
        slot = heappop(self._free)
        rows = pack_rows(x, experts, weights)
        for peer in self._peers:
            peer.carrier.post_send(slot, rows)
        return _Pending(self, slot, len(experts), shared(), dtype)

    def take(self, pending: "_Pending") -> Tensor:
        """As `PendingSum.result`."""
        parts: list[tuple[range, Tensor]] = []
        for peer in self._peers:
            parcel = sums_parcel(self._config, peer.groups, pending.num_rows)
            sums = peer.carrier.post_wait(pending.slot, parcel)
            parts.extend(zip(blocks_of(peer.groups), sums, strict=True))
        total = block_sum(parts, pending.shared, dtype=pending.dtype, backend=self._backend)
        heappush(self._free, pending.slot)
        return total


@dataclass
class _Pending:
    """The rows of one micro-batch at the experts of a layer."""

    owner: CarrierExperts
    slot: int
    num_rows: int
    shared: Tensor | None
    dtype: torch.dtype
    is_taken: bool = False

    def result(self) -> Tensor:
        """As `PendingSum.result`; the host waits for nothing."""
        self.is_taken = True
        return self.owner.take(self)

    def drop(self) -> None:
        """As `PendingSum.drop`. The ends are out of step then, so the carriers are aborted."""
        if not self.is_taken:
            self.is_taken = True
            self.owner.abort("a step was given up")

"""Attention and experts on the same GPUs: what an engine without a split does, to compare the split with.

Every GPU has its own sequences and some groups of the experts. In each layer it sends its rows to all others,
runs its experts over everybody's rows at once, so that their weights are read once, sends the sums back, and
adds those of its own rows. Nothing asks the host, so a step can be captured whole in a CUDA graph.

Shapes: T rows, the same number on every GPU, N GPUs, D width.
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
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts, Quantized
from model.moe import PendingSum
from workers.gpu_experts import pack_rows, rows_parcel, sums_parcel, unpack_rows
from workers.transport.carrier import Carrier


@dataclass(frozen=True)
class Member:
    """Another GPU: the carrier to it, and the groups it holds."""

    carrier: Carrier
    groups: range


class ColocatedExperts:
    """As `QuantizedExperts`. A micro-batch takes two slots of each carrier: whose sums have come has read the
    rows, and whose next rows have come has read the sums."""

    def __init__(
        self,
        config: ModelConfig,
        own: FusedExperts,
        others: Sequence[Member],
        *,
        num_slots: int,
        backend: Backend,
    ) -> None:
        self._config, self._own, self._others, self._backend = config, own, tuple(others), backend
        self._free = list(range(num_slots))  # a heap

    @property
    def listed(self) -> range:
        """As `QuantizedExperts.listed`; what is listed is not used."""
        return range(self._config.n_routed_experts)

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        """As `QuantizedExperts.submit_quantized`: the rows go out."""
        slot = heappop(self._free)
        for member in self._others:
            member.carrier.post_send(2 * slot, pack_rows(x, plan.experts, plan.weights))
        return _Pending(self, layer, slot, x, plan, shared())

    def take(self, pending: "_Pending") -> Tensor:
        """[T, D] bf16: compute for all, send, and add."""
        config, slot, plan = self._config, pending.slot, pending.plan
        num_rows = len(plan.experts)
        parcel = rows_parcel(config, num_rows)
        everybody = [(pending.x, plan.experts, plan.weights)]
        for member in self._others:
            everybody.append(unpack_rows(member.carrier.post_wait(2 * slot, parcel)))
        sums = self._compute(pending.layer, everybody)
        parts = _by_block(self._own.groups, [part[:num_rows] for part in sums])
        for i, member in enumerate(self._others, start=1):
            share = [part[i * num_rows : (i + 1) * num_rows] for part in sums]
            member.carrier.post_send(2 * slot + 1, share)
        for member in self._others:
            parcel = sums_parcel(config, member.groups, num_rows)
            parts += _by_block(member.groups, member.carrier.post_wait(2 * slot + 1, parcel))
        heappush(self._free, slot)
        parts.sort(key=lambda part: part[0].start)
        return block_sum(parts, pending.shared, dtype=torch.bfloat16, backend=self._backend)

    def _compute(self, layer: int, everybody: list[tuple[Quantized, Tensor, Tensor]]) -> list[Tensor]:
        """[N * T, D] bf16 for each block of our groups."""
        xs, experts, weights = zip(*everybody, strict=True)
        values = torch.cat([values.view(torch.uint8) for values, _ in xs]).view(xs[0][0].dtype)
        scales = torch.cat([scales.t() for _, scales in xs], dim=1).t()
        plan = self._own.list_rows(torch.cat(experts), torch.cat(weights))
        return self._own.block_sums(layer, (values, scales), plan)


def _by_block(groups: range, sums: Sequence[Tensor]) -> list[tuple[range, Tensor]]:
    return list(zip(blocks_of(groups), sums, strict=True))


@dataclass(frozen=True)
class _Pending:
    """Rows of a micro-batch on their way to the others."""

    owner: ColocatedExperts
    layer: int
    slot: int
    x: Quantized
    plan: RoutedRows
    shared: Tensor

    def result(self) -> Tensor:
        return self.owner.take(self)

    def drop(self) -> None:
        raise NotImplementedError("a benchmark's step does not fail half-way")

"""The feed-forward parts: dense FFN, gate, routed experts and the shared expert.

The gate makes a `DispatchPlan`; whoever holds the experts returns one weighted sum a token, in expert order.
In one process that is `LocalExperts`; on a cluster it is the expert pool. Shapes: T tokens, D width, I inner
width, E experts, k experts a token.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.gate_topk import gate_topk
from kernels.group_tree import add_all, blocks_of
from kernels.grouped_gemm import grouped_experts
from kernels.linear import linear, linear_fp32, stable
from kernels.swiglu import swiglu
from model.checkpoint import Weights
from model.config import ModelConfig


@dataclass(frozen=True)
class DispatchPlan:
    """Where each token goes: experts [T, k] int64, ascending in a row, and their weights [T, k] float32."""

    experts: Tensor
    weights: Tensor


class PendingSum(Protocol):
    """[T, D] of a layer that others may still be computing."""

    def result(self) -> Tensor:
        """Wait for it and take it; may be called once, and the tensor is the caller's own."""
        ...

    def drop(self) -> None:
        """Nobody will take it; where it was taken already, nothing happens."""
        ...


class Experts(Protocol):
    """Whoever computes the routed experts of all layers."""

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """Begin with the rows of x [T, D]; x and plan must stay as they are until the result is taken.

        The result is float32: for each token the weighted sum of its experts, in the tree of groups.
        """
        ...


@runtime_checkable
class ExpertSteps(Protocol):
    """Experts that must be told of every pass before it is launched, as nobody asks the host on its way."""

    def prepare(self) -> None:
        """Before a step: make sure that all experts can be reached. What was recorded may be forgotten.

        Raises:
            Exception: they cannot; a later step tries again.
        """
        ...

    @property
    def is_current(self) -> bool:
        """Whether the next step needs no `prepare`."""
        ...

    def announce(
        self, rows: tuple[int, ...], *, is_draft: bool, captured: bool
    ) -> AbstractContextManager[None]:
        """Within it a pass is launched; where that fails, nobody goes on waiting for it.

        Args:
            rows: of each micro-batch.
            is_draft: it is the MTP layer's, not that of all others.
            captured: passes of the same addresses will come again.
        """
        ...

    def check(self, landed: Callable[[], None]) -> None:
        """Make sure that the experts have answered; results mean nothing before.

        Args:
            landed: waits until the passes in question are over.

        Raises:
            Exception: they have not.
        """
        ...

    def on_parting(self, forget: Callable[[], None]) -> None:
        """Call this before the addresses that passes hold are given back."""
        ...


class NoSteps:
    """As `ExpertSteps`, for experts that need not be told of anything."""

    is_current = True

    def prepare(self) -> None: ...

    def announce(
        self, rows: tuple[int, ...], *, is_draft: bool, captured: bool
    ) -> AbstractContextManager[None]:
        return nullcontext()

    def check(self, landed: Callable[[], None]) -> None: ...

    def on_parting(self, forget: Callable[[], None]) -> None: ...


def steps_of(experts: object) -> ExpertSteps:
    """Who is to be told of passes through these experts."""
    return experts if isinstance(experts, ExpertSteps) else NoSteps()


@dataclass(frozen=True)
class Done:
    """As `PendingSum`, of what is there already."""

    value: Tensor

    def result(self) -> Tensor:
        return self.value

    def drop(self) -> None:
        pass


class FeedForward:
    """SwiGLU: W_down(silu(W_gate x) * (W_up x))."""

    def __init__(self, weights: Weights, prefix: str, backend: Backend) -> None:
        self._backend = backend
        gate_up = torch.cat(
            [weights.take(f"{prefix}.gate_proj.weight"), weights.take(f"{prefix}.up_proj.weight")]
        )
        self._gate_up = stable(gate_up, backend=backend)
        self._down = stable(weights.take(f"{prefix}.down_proj.weight"), backend=backend)

    def forward(self, x: Tensor) -> Tensor:
        """[T, D] to [T, D]."""
        inner = swiglu(linear(x, self._gate_up, backend=self._backend), backend=self._backend)
        return linear(inner, self._down, backend=self._backend)


class Gate:
    """The router of a MoE layer."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, backend: Backend) -> None:
        self._config, self._backend = config, backend
        self._weight = stable(weights.take(f"{prefix}.weight"), backend=backend)
        self._bias = weights.take(f"{prefix}.e_score_correction_bias")

    def forward(self, x: Tensor) -> DispatchPlan:
        """Route [T, D]; scores in fp32 whatever x is."""
        config = self._config
        experts, weights = gate_topk(
            linear_fp32(x, self._weight, backend=self._backend),
            self._bias,
            num_groups=config.n_group,
            topk_group=config.topk_group,
            k=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            backend=self._backend,
        )
        return DispatchPlan(experts, weights)


class LocalExperts:
    """Whole groups of the routed experts of every MoE layer, in this process.

    Sums are made in the tree of groups (`kernels/group_tree.py`), so the bits are those of any split.
    """

    def __init__(self, config: ModelConfig, weights: Weights, groups: range, backend: Backend) -> None:
        self.groups, self._group_size, self._backend = groups, config.group_size, backend
        self._gate_up: dict[int, Tensor] = {}  # layer -> [e, 2 I, D]
        self._down: dict[int, Tensor] = {}  # layer -> [e, D, I]
        experts = experts_of(config, groups)
        for layer in range(config.num_cached_layers):
            if config.is_dense(layer):
                continue
            names = [f"model.layers.{layer}.mlp.experts.{expert}" for expert in experts]
            self._gate_up[layer] = torch.stack(
                [
                    torch.cat(
                        [weights.take(f"{name}.gate_proj.weight"), weights.take(f"{name}.up_proj.weight")]
                    )
                    for name in names
                ]
            )
            self._down[layer] = torch.stack([weights.take(f"{name}.down_proj.weight") for name in names])
            stable(self._gate_up[layer][0], backend=backend)
            stable(self._down[layer][0], backend=backend)

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter(self._gate_up.values())).device

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """As `Experts.submit`; nobody else is there to do it meanwhile, so it is done at once."""
        return Done(self.forward(layer, x, plan))

    def forward(self, layer: int, x: Tensor, plan: DispatchPlan) -> Tensor:
        """[T, D] float32: the share of the weighted sum that the groups held here make."""
        sums = self.block_sums(layer, x, plan, self.groups)
        return add_all(zip(blocks_of(self.groups), sums.unbind(), strict=True), torch.add)

    def block_sums(self, layer: int, x: Tensor, plan: DispatchPlan, groups: range) -> Tensor:
        """[S, T, D] float32: the sums of the blocks of the tree that these groups, held here, fall into."""
        assert groups.start >= self.groups.start, "groups that are not held here"
        assert groups.stop <= self.groups.stop, "groups that are not held here"
        start = (groups.start - self.groups.start) * self._group_size
        held = slice(start, start + len(groups) * self._group_size)
        return grouped_experts(
            x,
            plan.experts,
            plan.weights,
            self._gate_up[layer][held],
            self._down[layer][held],
            groups.start * self._group_size,
            self._group_size,
            backend=self._backend,
        )


def experts_of(config: ModelConfig, groups: range) -> range:
    """The experts of a run of groups."""
    return range(groups.start * config.group_size, groups.stop * config.group_size)


class MoE:
    """Gate, shared expert, and the routed experts wherever they are."""

    def __init__(
        self, config: ModelConfig, weights: Weights, layer: int, experts: Experts, backend: Backend
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
        self._layer, self._experts = layer, experts
        self.gate = Gate(config, weights, f"{prefix}.gate", backend)
        self._shared = FeedForward(weights, f"{prefix}.shared_experts", backend)

    def submit(self, x: Tensor, routed: list[Tensor] | None = None) -> PendingSum:
        """[T, D] to [T, D], of x's type, as soon as the experts have answered.

        Args:
            routed: where given, receives the experts [T, k] int64 of each token.
        """
        plan = self.gate.forward(x)
        if routed is not None:
            routed.append(plan.experts)
        pending = self._experts.submit(self._layer, x, plan)
        shared = self._shared.forward(x)  # runs while the rows are on their way
        return WithShared(pending, shared)


@dataclass(frozen=True)
class WithShared:
    """The routed experts' sum, to which the shared expert's [T, D] is added."""

    pending: PendingSum
    shared: Tensor

    def result(self) -> Tensor:
        return self.pending.result().add_(self.shared.float()).to(self.shared.dtype)

    def drop(self) -> None:
        self.pending.drop()

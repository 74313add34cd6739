"""The feed-forward parts for GPUs: FP8 weights, and routed experts as two grouped products.

Shapes: T tokens, D width, I inner width, e experts held here, k experts a token, R = T * k routed rows.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kernels.backend import Backend, require
from kernels.bf16_gemm import bf16_gemm
from kernels.dispatch_plan import dispatch_plan
from kernels.expert_sum import expert_sum
from kernels.group_tree import blocks_of
from kernels.grouped_fp8_gemm import grouped_fp8_gemm
from kernels.list_rows import RoutedRows, list_rows
from kernels.quantize_rows import quantize_rows
from kernels.swiglu_quantize import swiglu_quantize
from model.checkpoint import Weights
from model.config import ModelConfig
from model.fused.operations import Operations
from model.fused.weights import Fp8Matrix
from model.moe import DispatchPlan, Done, Experts, PendingSum, WithShared, experts_of

Quantized = tuple[Tensor, Tensor]
"""Rows [T, K] e4m3 and their scales [T, K / 128] float32."""


@runtime_checkable
class QuantizedExperts(Protocol):
    """Experts that take a fused layer's rows as they are: here (`FusedExperts`), or on other GPUs."""

    @property
    def listed(self) -> range:
        """The experts whose rows a plan lists for `submit_quantized`."""
        ...

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        """Begin with T rows; x and plan must stay as they are until the result is taken.

        Args:
            shared: computes the shared expert's rows [T, D] bf16; called once, when the others have begun.

        Returns:
            [T, D] bf16: for each token the weighted sum of its experts, and of the shared one.
        """
        ...


class FusedFeedForward:
    """SwiGLU: W_down(silu(W_gate x) * (W_up x)), in three launches."""

    def __init__(self, weights: Weights, prefix: str, backend: Backend, ops: Operations) -> None:
        self._backend, self._ops = backend, ops
        self._gate_up = Fp8Matrix.take(weights, f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight")
        self._down = Fp8Matrix.take(weights, f"{prefix}.down_proj.weight")

    def forward(self, x: Quantized) -> Tensor:
        """[T, D] to [T, D] bf16."""
        gate_up = self._ops.fp8_gemm(*x, self._gate_up.values, self._gate_up.scales)
        inner = swiglu_quantize(gate_up, backend=self._backend)
        return self._ops.fp8_gemm(*inner, self._down.values, self._down.scales)


class FusedExperts:
    """All routed experts of every MoE layer, in this process; as `LocalExperts`, for FP8 checkpoints."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        groups: range,
        backend: Backend,
        layers: Iterable[int] | None = None,
    ) -> None:
        """Take over what is held here: whole groups, of all MoE layers unless `layers` names some."""
        self.groups, self._backend = groups, backend
        self._config = config
        experts = experts_of(config, groups)
        self.first, self.num_held = experts.start, len(experts)
        self._gate_up: dict[int, Fp8Matrix] = {}  # layer -> [e, 2 I, D]
        self._down: dict[int, Fp8Matrix] = {}  # layer -> [e, D, I]
        for layer in range(config.num_cached_layers) if layers is None else layers:
            if config.is_dense(layer):
                continue
            names = [f"model.layers.{layer}.mlp.experts.{expert}" for expert in experts]
            self._gate_up[layer] = _stacked(
                [Fp8Matrix.take(weights, f"{n}.gate_proj.weight", f"{n}.up_proj.weight") for n in names]
            )
            self._down[layer] = _stacked([Fp8Matrix.take(weights, f"{n}.down_proj.weight") for n in names])

    @property
    def listed(self) -> range:
        """As `QuantizedExperts.listed`: those held here."""
        return range(self.first, self.first + self.num_held)

    def submit(self, layer: int, x: Tensor, plan: DispatchPlan) -> PendingSum:
        """As `Experts.submit`, for rows of another gate; a `FusedMoE` here calls `submit_quantized`."""
        quantized = quantize_rows(x, backend=self._backend)
        rows = self.list_rows(plan.experts.int(), plan.weights)
        return Done(self.forward(layer, quantized, rows, None, torch.float32))

    def submit_quantized(
        self, layer: int, x: Quantized, plan: RoutedRows, shared: Callable[[], Tensor]
    ) -> PendingSum:
        """As `QuantizedExperts`; nobody else is there to do it meanwhile, so it is done at once."""
        return Done(self.forward(layer, x, plan, shared()))

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return next(iter(self._gate_up.values())).values.device

    def warm_up(self, max_rows: int) -> None:
        """Compile what batches of up to so many rows take: their number decides the tiles."""
        config, device = self._config, self.device
        layer = next(iter(self._gate_up))
        sizes = [1 << i for i in range(max_rows.bit_length())]
        for num_rows in {*sizes, max_rows}:
            # Not random numbers: while another thread captures a graph they cannot be had.
            x = torch.ones(num_rows, config.hidden_size, dtype=torch.bfloat16, device=device)
            first = min(self.first, config.n_routed_experts - config.num_experts_per_tok)
            chosen = torch.arange(first, first + config.num_experts_per_tok, device=device)
            experts = chosen.int().repeat(num_rows, 1)
            weights = torch.ones_like(experts, dtype=torch.float32)
            plan = self.list_rows(experts, weights)
            self.block_sums(layer, quantize_rows(x, backend=self._backend), plan)

    def holds(self, layer: int) -> bool:
        """Whether a layer's experts are here."""
        return layer in self._gate_up

    def list_rows(self, experts: Tensor, weights: Tensor) -> RoutedRows:
        """The rows of the experts held here, of somebody else's choice [T, k] int32 and its weights."""
        return list_rows(
            experts,
            weights,
            all_experts=self._config.n_routed_experts,
            num_groups=self._config.n_group,
            first_expert=self.first,
            num_experts=self.num_held,
            backend=self._backend,
        )

    def forward(
        self,
        layer: int,
        x: Quantized,
        plan: RoutedRows,
        shared: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> Tensor:
        """[T, D] of dtype: each token's weighted sum of its experts here, and of the shared one.

        Args:
            shared: [T, D], the shared expert's rows, or None.
        """
        return self._sum(self._outputs(layer, x, plan), plan, self.groups, shared, dtype)

    def block_sums(self, layer: int, x: Quantized, plan: RoutedRows) -> list[Tensor]:
        """[T, D] bf16 for each block of the tree that the groups held here fall into (one at full size)."""
        outputs = self._outputs(layer, x, plan)
        return [self._sum(outputs, plan, block, None, torch.bfloat16) for block in blocks_of(self.groups)]

    def _outputs(self, layer: int, x: Quantized, plan: RoutedRows) -> Tensor:
        """[R, D] bf16: what each expert here makes of each of its rows, in the plan's order."""
        gate_up, down = self._gate_up[layer], self._down[layer]
        # Rows an expert gets on average decide the tiles; who gets how many is known on the device alone.
        expected = max(1, plan.rows.numel() // self._config.n_routed_experts)
        multiply = partial(grouped_fp8_gemm, expected_rows=expected, backend=self._backend)
        both = multiply(*x, gate_up.values, gate_up.scales, plan.offsets, plan.rows)
        inner = swiglu_quantize(both, num_valid=plan.offsets[-1:], backend=self._backend)
        return multiply(*inner, down.values, down.scales, plan.offsets, None)

    def _sum(
        self, outputs: Tensor, plan: RoutedRows, groups: range, shared: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        return expert_sum(
            outputs,
            plan.places,
            plan.experts,
            plan.weights,
            group_size=self._config.group_size,
            first_group=groups.start,
            num_groups=len(groups),
            shared=shared,
            dtype=dtype,
            backend=self._backend,
        )


def _stacked(parts: list[Fp8Matrix]) -> Fp8Matrix:
    values = torch.stack([part.values.view(torch.uint8) for part in parts]).view(parts[0].values.dtype)
    return Fp8Matrix(values, torch.stack([part.scales for part in parts]))


class FusedMoE:
    """Gate, shared expert, and the routed experts: here, on other GPUs, or wherever `experts` has them."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        layer: int,
        experts: Experts,
        backend: Backend,
        ops: Operations,
    ) -> None:
        prefix = f"model.layers.{layer}.mlp"
        self._config, self._layer, self._experts, self._backend = config, layer, experts, backend
        self._quantized = experts if isinstance(experts, QuantizedExperts) else None
        self._listed = self._quantized.listed if self._quantized else range(config.n_routed_experts)
        gate = weights.take(f"{prefix}.gate.weight")
        self._gate = gate.to(torch.bfloat16)
        require(
            torch.equal(self._gate.float(), gate),
            "gate",
            "its weight is stored in more than bf16: use 'reference'",
        )
        self._bias = weights.take(f"{prefix}.gate.e_score_correction_bias")
        self._shared = FusedFeedForward(weights, f"{prefix}.shared_experts", backend, ops)

    def submit(self, x: Quantized, normed: Tensor, routed: list[Tensor] | None = None) -> PendingSum:
        """[T, D] to [T, D] bf16.

        Args:
            x, normed: the same rows, quantised and as they are.
            routed: where given, receives the experts [T, k] of each token.
        """
        plan = self._plan(normed)
        if routed is not None:
            routed.append(plan.experts.long())
        shared = partial(self._shared.forward, x)
        if self._quantized:
            return self._quantized.submit_quantized(self._layer, x, plan, shared)
        pending = self._experts.submit(self._layer, normed, DispatchPlan(plan.experts.long(), plan.weights))
        return WithShared(pending, shared())

    def _plan(self, normed: Tensor) -> RoutedRows:
        config = self._config
        return dispatch_plan(
            bf16_gemm(normed, self._gate, backend=self._backend),
            self._bias,
            num_groups=config.n_group,
            topk_group=config.topk_group,
            k=config.num_experts_per_tok,
            normalize=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
            first_expert=self._listed.start,
            num_experts=len(self._listed),
            backend=self._backend,
        )

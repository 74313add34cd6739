"""The router's choice and everything that follows from it for whoever runs the experts, without the host.

The choice is that of `gate_topk.py`: sigmoid, bias, the best groups, the k best experts, ties to the lower
index. From it follow, for the experts held here, the tokens of each in ascending order, and for every group
of experts the tokens that go to it. Few tokens are listed by one more launch, many by two.
Shapes: T tokens, E experts, e of them held here, G groups, k experts a token.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.gate_topk import gate_topk_reference
from kernels.list_rows import (
    ListConfig,
    RoutedRows,
    empty_lists,
    launch_lists,
    list_config,
    list_rows_reference,
)


@dataclass(frozen=True)
class _Config:
    """Tokens of a program that chooses, and its warps; how rows are listed."""

    gate_tokens: int
    gate_warps: int
    lists: ListConfig


def dispatch_plan(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_group: int,
    k: int,
    normalize: bool,
    scale: float,
    first_expert: int,
    num_experts: int,
    backend: Backend,
) -> RoutedRows:
    """Choose experts and list the rows.

    Args:
        logits: [T, E] float32, contiguous.
        bias: [E] float32, `e_score_correction_bias`.
        first_expert, num_experts: the experts held here, e of them.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others; for `triton` E and G are powers of two.
    """
    require_triton_or_reference(backend, "dispatch_plan")
    all_experts = logits.shape[1]
    require(
        logits.dtype == bias.dtype == torch.float32,
        "dispatch_plan",
        f"logits must be float32: {logits.dtype}",
    )
    require(
        bias.shape == (all_experts,), "dispatch_plan", f"{tuple(bias.shape)} biases, {all_experts} experts"
    )
    require(
        all_experts % num_groups == 0 and all_experts // num_groups >= 2,
        "dispatch_plan",
        f"{all_experts} experts, {num_groups} groups",
    )
    require(
        0 < k <= topk_group * (all_experts // num_groups) and topk_group <= num_groups,
        "dispatch_plan",
        f"{topk_group} groups of {all_experts // num_groups} have no {k} experts",
    )
    require(
        first_expert >= 0 and num_experts > 0 and first_expert + num_experts <= all_experts,
        "dispatch_plan",
        f"experts {first_expert} and {num_experts} more are not among {all_experts}",
    )
    gate = _GateSettings(num_groups, topk_group, k, normalize, scale, first_expert, num_experts)
    if backend == "reference":
        return dispatch_plan_reference(logits, bias, **asdict(gate))
    require(
        all_experts & (all_experts - 1) == 0 == num_groups & (num_groups - 1),
        "dispatch_plan",
        f"{all_experts} experts in {num_groups} groups are no powers of two",
    )
    require(logits.is_contiguous() and bias.is_contiguous(), "dispatch_plan", "logits must be contiguous")
    return _launch(logits, bias, gate, _config_for(logits.shape[0]))


@dataclass(frozen=True)
class _GateSettings:
    """The numbers of a call, as `dispatch_plan` names them."""

    num_groups: int
    topk_group: int
    k: int
    normalize: bool
    scale: float
    first_expert: int
    num_experts: int


def dispatch_plan_reference(
    logits: Tensor,
    bias: Tensor,
    *,
    num_groups: int,
    topk_group: int,
    k: int,
    normalize: bool,
    scale: float,
    first_expert: int,
    num_experts: int,
) -> RoutedRows:
    experts, weights = gate_topk_reference(
        logits.sigmoid(),
        bias,
        num_groups=num_groups,
        topk_group=topk_group,
        k=k,
        normalize=normalize,
        scale=scale,
    )
    return list_rows_reference(
        experts,
        weights,
        all_experts=logits.shape[1],
        num_groups=num_groups,
        first_expert=first_expert,
        num_experts=num_experts,
    )


def _config_for(num_tokens: int) -> _Config:
    """From the sweep of 2026-11-22 on an H100. A warp chooses for one token, so that it finds the best of all
    experts without waiting for another."""
    return _Config(gate_tokens=1, gate_warps=1, lists=list_config(num_tokens))


def _launch(logits: Tensor, bias: Tensor, gate: _GateSettings, config: _Config) -> RoutedRows:
    num_tokens, all_experts = logits.shape
    num_experts, k = gate.num_experts, gate.k
    routed = empty_lists(
        torch.empty(num_tokens, k, dtype=torch.int32, device=logits.device),
        torch.empty(num_tokens, k, dtype=torch.float32, device=logits.device),
        gate.num_groups,
        num_experts,
    )
    if num_tokens == 0:
        return routed
    # The choice once more, as narrow as it can be; what is read beside it is not used.
    choices = torch.empty(
        config.lists.readable(num_tokens, k),
        dtype=torch.uint8 if all_experts <= 256 else torch.int16,
        device=logits.device,
    )
    _choose[(triton.cdiv(num_tokens, config.gate_tokens),)](
        logits,
        bias,
        routed.experts,
        routed.weights,
        routed.places,
        choices,
        num_tokens,
        gate.scale,
        gate.first_expert,
        E=all_experts,
        G=gate.num_groups,
        TOPK_GROUP=gate.topk_group,
        K=k,
        NORMALIZE=gate.normalize,
        NUM_EXPERTS=num_experts,
        GATE_TOKENS=config.gate_tokens,
        num_warps=config.gate_warps,
    )
    launch_lists(choices, routed, all_experts, gate.first_expert, config.lists, is_choice=False)
    return routed


@triton.jit
def _ordered(x):
    """int32 that compare as the floats do, all above the lowest one; its own inverse."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.maximum(bits ^ ((bits >> 31) & 0x7FFFFFFF), -0x7FFFFFFF)


@triton.jit
def _float_of(ordered):
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _is_first_best(keys, index, axis: tl.constexpr):
    """Where along the axis the greatest key stands, at its lowest index, and that key."""
    best = tl.max(keys, axis=axis, keep_dims=True)
    first = tl.min(tl.where(keys == best, index, 0x7FFFFFFF), axis=axis, keep_dims=True)
    return index == first, best


@triton.jit
def _choose(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E]
    experts_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    places_ptr,  # [T, K]: those of experts that are not held here are written here
    choices_ptr,  # [T, K] uint8 or int16
    num_tokens,
    scale,
    first_expert,
    E: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GATE_TOKENS: tl.constexpr,
):
    lowest: tl.constexpr = -0x80000000
    group_size: tl.constexpr = E // G
    tokens = tl.program_id(0) * GATE_TOKENS + tl.arange(0, GATE_TOKENS)
    experts = tl.arange(0, E)[None, :]
    valid = (tokens < num_tokens)[:, None]
    logits = tl.load(logits_ptr + tokens.to(tl.int64)[:, None] * E + experts, mask=valid, other=0.0)
    scores = tl.sigmoid(logits)
    keys = _ordered(scores + tl.load(bias_ptr + experts))

    by_group = tl.reshape(keys, [GATE_TOKENS, G, group_size])
    in_group = tl.arange(0, group_size)[None, None, :]
    is_best, best = _is_first_best(by_group, in_group, 2)
    second = tl.max(tl.where(is_best, lowest, by_group), axis=2)
    group_keys = _ordered(_float_of(tl.reshape(best, [GATE_TOKENS, G])) + _float_of(second))
    groups = tl.arange(0, G)
    mine, theirs = group_keys[:, :, None], group_keys[:, None, :]
    is_lower = (groups[None, :] < groups[:, None])[None, :, :]
    ahead = (theirs > mine) | ((theirs == mine) & is_lower)
    kept = tl.sum(ahead.to(tl.int32), axis=2) < TOPK_GROUP  # [T, G]
    keys = tl.reshape(tl.where(kept[:, :, None], by_group, lowest), [GATE_TOKENS, E])
    chosen = tl.zeros([GATE_TOKENS, E], dtype=tl.int1)
    for _ in tl.static_range(K):
        is_best, _ = _is_first_best(keys, experts, 1)
        chosen |= is_best
        keys = tl.where(is_best, lowest, keys)

    if NORMALIZE:
        total = tl.sum(tl.where(chosen, scores, 0.0), axis=1)[:, None]
        weights = scores / (total + 1e-20) * scale
    else:
        weights = scores * scale
    chosen &= valid
    ones = chosen.to(tl.int32)
    out = tokens[:, None] * K + tl.cumsum(ones, axis=1) - ones  # the token's j-th, ascending
    experts = tl.broadcast_to(experts, [GATE_TOKENS, E])
    tl.store(experts_ptr + out, experts, mask=chosen)
    tl.store(weights_ptr + out, weights, mask=chosen)
    tl.store(choices_ptr + out, experts.to(choices_ptr.dtype.element_ty), mask=chosen)
    if NUM_EXPERTS < E:
        held = (experts >= first_expert) & (experts < first_expert + NUM_EXPERTS)
        tl.store(places_ptr + out, -1, mask=chosen & ~held)

"""The router's choice and everything that follows from it for whoever runs the experts, without the host.

The choice is that of `gate_topk.py`: sigmoid, bias, the best groups, the k best experts, ties to the lower
index. From it follow, for the experts held here, the tokens of each in ascending order, and for every group
of experts the tokens that go to it. Few tokens take one launch, whose last program to finish the choice makes
the lists; many take a second. Shapes: T tokens, E experts, e of them held here, G groups, k experts a token.
"""

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.dispatch_lists import list_all, list_rows
from kernels.gate_topk import gate_topk_reference

_ALIGNED_TOKENS = 16  # marks are bytes, read 16 at a time


@dataclass(frozen=True)
class RoutedRows:
    """Where each token goes, and where its rows stand; all int32 but the weights.

    Attributes:
        experts: [T, k], global numbers, ascending in a row; weights: [T, k] float32.
        offsets: [e + 1]; the rows of the i-th expert held here are offsets[i] to offsets[i + 1].
        rows: [T * k], tokens by expert, ascending for each; only the first offsets[e] are written.
        places: [T, k], where in `rows` a token stands for its j-th expert; -1 where that is not held here.
        node_counts: [G], how many tokens have an expert in each group.
        node_tokens: [G, T], which, ascending; only the first node_counts[g] of a row are written.
    """

    experts: Tensor
    weights: Tensor
    offsets: Tensor
    rows: Tensor
    places: Tensor
    node_counts: Tensor
    node_tokens: Tensor


@dataclass(frozen=True)
class _Config:
    """Tokens of one program that chooses; tokens and experts that are listed at once; warps of either."""

    one_launch: bool
    gate_tokens: int
    plan_tokens: int
    plan_experts: int
    gate_warps: int
    plan_warps: int  # with one launch nobody asks


def new_ticket(device: torch.device | str) -> Tensor:
    """What `dispatch_plan` counts its finished programs in: zero before and after every call."""
    return torch.zeros(1, dtype=torch.int32, device=device)


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
    ticket: Tensor,
    backend: Backend,
) -> RoutedRows:
    """Choose experts and list the rows.

    Args:
        logits: [T, E] float32, contiguous.
        bias: [E] float32, `e_score_correction_bias`.
        first_expert, num_experts: the experts held here, e of them.
        ticket: of `new_ticket`; calls that can run at the same time need one each.
    """
    require_triton_or_reference(backend, "dispatch_plan")
    all_experts = logits.shape[1]
    require(
        logits.dtype == bias.dtype == torch.float32,
        "dispatch_plan",
        f"logits must be float32: {logits.dtype}",
    )
    require(
        all_experts % num_groups == 0 and all_experts // num_groups >= 2,
        "dispatch_plan",
        f"{all_experts} experts, {num_groups} groups",
    )
    require(
        k <= topk_group * (all_experts // num_groups) and topk_group <= num_groups,
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
    return _launch(logits, bias, gate, ticket, _config_for(logits.shape[0], num_experts))


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
    """Needs no ticket."""
    num_tokens = logits.shape[0]
    experts, weights = gate_topk_reference(
        logits.sigmoid(),
        bias,
        num_groups=num_groups,
        topk_group=topk_group,
        k=k,
        normalize=normalize,
        scale=scale,
    )
    local = (experts - first_expert).flatten()
    held = (local >= 0) & (local < num_experts)
    order = torch.where(held, local, num_experts).argsort(stable=True)
    counts = torch.bincount(local[held], minlength=num_experts)
    num_held = int(counts.sum())
    rows = torch.full((num_tokens * k,), -1, dtype=torch.int32, device=logits.device)
    rows[:num_held] = (order[:num_held] // k).int()
    places = torch.full_like(rows, -1)
    places[order[:num_held]] = torch.arange(num_held, dtype=torch.int32, device=logits.device)
    nodes = torch.zeros(num_tokens, num_groups, dtype=torch.bool, device=logits.device)
    nodes.scatter_(1, experts // (logits.shape[1] // num_groups), True)
    node_tokens = nodes.t().int().argsort(dim=1, descending=True, stable=True).int()
    return RoutedRows(
        experts=experts.int(),
        weights=weights,
        offsets=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int(),
        rows=rows,
        places=places.view(num_tokens, k),
        node_counts=nodes.sum(0).int(),
        node_tokens=node_tokens,
    )


def _config_for(num_tokens: int, num_experts: int) -> _Config:
    """One program lists up to 256 tokens, 16 marks a thread at a time, which is what registers hold; beyond,
    lists are made by many programs after a second launch, which the choice's programs have counted for."""
    if num_tokens > 256:
        return _Config(False, 8, 128, 32, gate_warps=4, plan_warps=8)
    plan_tokens = max(_ALIGNED_TOKENS, triton.next_power_of_2(num_tokens))
    block_experts = triton.next_power_of_2(num_experts)
    warps = 16 if plan_tokens * block_experts > 8192 else 8
    experts = min(512 * warps // plan_tokens, block_experts)
    return _Config(True, 4, plan_tokens, experts, gate_warps=warps, plan_warps=warps)


def _launch(logits: Tensor, bias: Tensor, gate: _GateSettings, ticket: Tensor, config: _Config) -> RoutedRows:
    num_tokens, all_experts = logits.shape
    num_groups, num_experts, k = gate.num_groups, gate.num_experts, gate.k

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=logits.device)

    routed = RoutedRows(
        experts=empty(num_tokens, k),
        weights=empty(num_tokens, k, dtype=torch.float32),
        offsets=empty(num_experts + 1),
        rows=empty(num_tokens * k),
        places=empty(num_tokens, k),
        node_counts=empty(num_groups),
        node_tokens=empty(num_groups, num_tokens),
    )
    if num_tokens == 0:
        routed.offsets.zero_()
        routed.node_counts.zero_()
        return routed
    # Marks are by expert, so that the tokens of one stand side by side; those that were added are zero.
    padded = triton.cdiv(num_tokens, _ALIGNED_TOKENS) * _ALIGNED_TOKENS
    programs = triton.cdiv(padded, config.gate_tokens)
    marks = empty(all_experts, padded, dtype=torch.uint8)
    node_marks = empty(num_groups, padded, dtype=torch.uint8)
    counts = None if config.one_launch else empty(programs, all_experts, dtype=torch.uint8)
    node_counts = None if config.one_launch else empty(programs, num_groups, dtype=torch.uint8)
    _choose[(programs,)](
        logits,
        bias,
        routed.experts,
        routed.weights,
        routed.places,
        marks,
        node_marks,
        counts,
        node_counts,
        routed.offsets,
        routed.rows,
        routed.node_counts,
        routed.node_tokens,
        ticket,
        num_tokens,
        padded,
        gate.scale,
        gate.first_expert,
        E=all_experts,
        G=num_groups,
        TOPK_GROUP=gate.topk_group,
        K=k,
        BLOCK_K=triton.next_power_of_2(k),
        NORMALIZE=gate.normalize,
        NUM_EXPERTS=num_experts,
        GATE_TOKENS=config.gate_tokens,
        PLAN_TOKENS=config.plan_tokens,
        PLAN_EXPERTS=config.plan_experts,
        ONE_LAUNCH=config.one_launch,
        num_warps=config.gate_warps,
    )
    if not config.one_launch:
        expert_tiles = triton.cdiv(num_experts, config.plan_experts)
        list_rows[(triton.cdiv(num_tokens, config.plan_tokens), expert_tiles + 1)](
            marks,
            node_marks,
            counts,
            node_counts,
            routed.offsets,
            routed.rows,
            routed.places,
            routed.node_counts,
            routed.node_tokens,
            num_tokens,
            padded,
            programs,
            gate.first_expert,
            E=all_experts,
            G=num_groups,
            K=k,
            NUM_EXPERTS=num_experts,
            BLOCK_EXPERTS=triton.next_power_of_2(num_experts),
            PLAN_TOKENS=config.plan_tokens,
            PLAN_EXPERTS=config.plan_experts,
            PARTS=config.plan_tokens // config.gate_tokens,
            num_warps=config.plan_warps,
        )
    return routed


@triton.jit
def _ordered(x):
    """int32 that compare as the floats do; it is its own inverse on bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _with_index(x, index, size: tl.constexpr):
    """int64 that compare as the floats do, equal ones by the lower index: no two are the same."""
    return (_ordered(x).to(tl.int64) << 32) | (size - 1 - index).to(tl.int64)


@triton.jit
def _float_of(key):
    ordered = (key >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _choose(
    logits_ptr,  # [T, E]
    bias_ptr,  # [E]
    experts_ptr,  # [T, K]
    weights_ptr,  # [T, K]
    places_ptr,  # [T, K]
    marks_ptr,  # [E, padded]: 1 + j where the expert is the token's j-th, else 0
    node_marks_ptr,  # [G, padded]: 1 where the token has an expert in the group
    part_counts_ptr,  # [programs, E], with two launches
    part_node_counts_ptr,  # [programs, G], with two launches
    offsets_ptr,  # [NUM_EXPERTS + 1]
    rows_ptr,  # [T * K]
    node_counts_ptr,  # [G]
    node_tokens_ptr,  # [G, T]
    ticket_ptr,  # [1]
    num_tokens,
    padded,
    scale,
    first_expert,
    E: tl.constexpr,
    G: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    GATE_TOKENS: tl.constexpr,
    PLAN_TOKENS: tl.constexpr,
    PLAN_EXPERTS: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
):
    lowest: tl.constexpr = -(1 << 63)
    group_size: tl.constexpr = E // G
    tokens = tl.program_id(0) * GATE_TOKENS + tl.arange(0, GATE_TOKENS)
    experts = tl.arange(0, E)[None, :]
    groups = tl.arange(0, G)[None, :]
    valid = (tokens < num_tokens)[:, None]
    logits = tl.load(logits_ptr + tokens.to(tl.int64)[:, None] * E + experts, mask=valid, other=0.0)
    scores = tl.sigmoid(logits)
    keys = _with_index(scores + tl.load(bias_ptr + experts), experts, E)

    by_group = tl.reshape(keys, [GATE_TOKENS, G, group_size])
    best = tl.max(by_group, axis=2)
    second = tl.max(tl.where(by_group == best[:, :, None], lowest, by_group), axis=2)
    group_keys = _with_index(_float_of(best) + _float_of(second), groups, G)  # [T, G]
    left = group_keys
    for _ in tl.static_range(TOPK_GROUP):
        left = tl.where(left == tl.max(left, axis=1)[:, None], lowest, left)
    kept = (group_keys != left)[:, :, None]
    keys = tl.reshape(tl.where(kept, by_group, lowest), [GATE_TOKENS, E])
    left = keys
    for _ in tl.static_range(K):
        left = tl.where(left == tl.max(left, axis=1)[:, None], lowest, left)
    chosen = (keys != left) & valid

    if NORMALIZE:
        total = tl.sum(tl.where(chosen, scores, 0.0), axis=1)[:, None]
        weights = scores / (total + 1e-20) * scale
    else:
        weights = scores * scale
    ones = chosen.to(tl.int32)
    slots = tl.cumsum(ones, axis=1) - ones  # the token's j-th, ascending
    out = tokens[:, None] * K + slots
    tl.store(experts_ptr + out, tl.broadcast_to(experts, [GATE_TOKENS, E]), mask=chosen)
    tl.store(weights_ptr + out, weights, mask=chosen)
    in_marks = (tokens < padded)[:, None]
    marks = tl.where(chosen, slots + 1, 0).to(tl.uint8)
    columns = tokens.to(tl.int64)[:, None]
    tl.store(marks_ptr + experts * padded.to(tl.int64) + columns, marks, mask=in_marks)
    in_node = (tl.sum(tl.reshape(ones, [GATE_TOKENS, G, group_size]), axis=2) > 0).to(tl.int32)
    tl.store(node_marks_ptr + groups * padded.to(tl.int64) + columns, in_node.to(tl.uint8), mask=in_marks)
    # Those of experts held here are written again below, by a program that comes after every store here.
    j = tl.arange(0, BLOCK_K)[None, :]
    tl.store(places_ptr + tokens[:, None] * K + j, -1, mask=(tokens < num_tokens)[:, None] & (j < K))

    if ONE_LAUNCH:
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
            tl.store(ticket_ptr, 0)
            list_all(
                marks_ptr, node_marks_ptr, offsets_ptr, rows_ptr, places_ptr, node_counts_ptr,
                node_tokens_ptr, num_tokens, padded, first_expert, G, K, NUM_EXPERTS, PLAN_TOKENS,
                PLAN_EXPERTS,
            )  # fmt: skip
    else:
        part = tl.program_id(0)
        tl.store(part_counts_ptr + part * E + tl.arange(0, E), tl.sum(ones, axis=0).to(tl.uint8))
        tl.store(part_node_counts_ptr + part * G + tl.arange(0, G), tl.sum(in_node, axis=0).to(tl.uint8))

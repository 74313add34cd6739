"""Cases of the gate with the dispatch plan, and of the weighted sum of experts, beside vLLM's."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels_inputs import HIDDEN, Case, Made, Peers, generator, randn, relative

_EXPERTS, _GROUPS, _TOPK_GROUP, _CHOSEN = 256, 8, 4, 8
_SCALE = 2.5
_ALIGNED = 64  # rows of a tile in the peer's plan


def cases() -> list[Case]:
    return [*(_plan(tokens) for tokens in (1, 32, 128, 4096)), *(_sum(tokens) for tokens in (128, 4096))]


def _plan(num_tokens: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.dispatch_plan import dispatch_plan
        from kernels.gate_topk import gate_topk_reference
        from kernels.list_rows import RoutedRows

        logits = randn(num_tokens, _EXPERTS, dtype=torch.float32)
        bias = 0.1 * torch.rand(_EXPERTS, generator=generator(), device="cuda")
        gate = {"num_groups": _GROUPS, "topk_group": _TOPK_GROUP, "k": _CHOSEN, "normalize": True}
        expected, expected_weights = gate_topk_reference(logits.sigmoid(), bias, scale=_SCALE, **gate)
        expected, order = expected.sort(-1)

        def check(plan: RoutedRows) -> float:
            """The share of wrong choices or the weights' error; NaN where the lists do not follow."""
            tokens = torch.arange(num_tokens, device="cuda").unsqueeze(1)
            counts = torch.bincount(plan.experts.flatten().long(), minlength=_EXPERTS)
            if not torch.equal(plan.rows[plan.places.long()], tokens.expand_as(plan.places).int()):
                return float("nan")
            if not torch.equal(plan.offsets.diff().long(), counts):
                return float("nan")
            wrong = (plan.experts != expected).any(-1)
            right = ~wrong
            error = relative(plan.weights[right], expected_weights.gather(1, order)[right])
            return max(float(wrong.double().mean()), error)

        made = Made(
            lambda: dispatch_plan(
                logits,
                bias,
                **gate,
                scale=_SCALE,
                first_expert=0,
                num_experts=_EXPERTS,
                backend="triton",
            ),
            check,
            1e-3,
            peer_checked=False,
        )
        if peers.has_vllm:
            made.peer = _choose_and_align(logits, bias)
        return made

    floats = num_tokens * (_EXPERTS + 4 * _CHOSEN)
    return Case(
        "dispatch_plan",
        f"{num_tokens} tokens, {_EXPERTS} experts",
        0.0,
        4.0 * floats,
        make,
        1.0 if num_tokens == 128 else None,
        recorded=("vLLM grouped_topk + moe_align_block_size", f"{num_tokens} tokens"),
    )


def _choose_and_align(logits: Tensor, bias: Tensor) -> Any:
    padded = logits.shape[0] * _CHOSEN + _EXPERTS * (_ALIGNED - 1)
    rows = torch.empty(padded, dtype=torch.int32, device="cuda")
    experts_of_tiles = torch.empty(-(-padded // _ALIGNED), dtype=torch.int32, device="cuda")
    total = torch.empty(1, dtype=torch.int32, device="cuda")

    def peer() -> None:
        _, experts = torch.ops._moe_C.grouped_topk(
            logits, _GROUPS, _TOPK_GROUP, _CHOSEN, True, _SCALE, bias, 1
        )
        torch.ops._moe_C.moe_align_block_size(
            experts, _EXPERTS, _ALIGNED, rows, experts_of_tiles, total, None
        )

    return peer


def _sum(num_tokens: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.expert_sum import expert_sum

        outputs = randn(num_tokens * _CHOSEN, HIDDEN)
        random = generator()
        drawn = torch.rand(num_tokens, _EXPERTS, generator=random, device="cuda")
        experts = drawn.topk(_CHOSEN).indices.sort(-1).values.int()
        places = torch.randperm(num_tokens * _CHOSEN, generator=random, device="cuda")
        places = places.view(num_tokens, _CHOSEN).int()
        expert_weights = torch.rand(num_tokens, _CHOSEN, generator=random, device="cuda")
        expected = torch.einsum(
            "tkd,tk->td", outputs[places[:64].long()].double(), expert_weights[:64].double()
        )
        made = Made(
            lambda: expert_sum(
                outputs,
                places,
                experts,
                expert_weights,
                group_size=_EXPERTS // _GROUPS,
                first_group=0,
                num_groups=_GROUPS,
                shared=None,
                dtype=torch.bfloat16,
                backend="triton",
            ),
            lambda out: relative(out[:64], expected),
            4e-3,
            peer_checked=False,
        )
        if peers.has_vllm:
            stacked, out = outputs.view(num_tokens, _CHOSEN, HIDDEN), outputs.new_empty(num_tokens, HIDDEN)
            made.peer = lambda: torch.ops._moe_C.moe_sum(stacked, out)
        return made

    return Case(
        "expert_sum",
        f"{num_tokens} x {_CHOSEN} x {HIDDEN}",
        0.0,
        2.0 * num_tokens * (_CHOSEN + 1) * HIDDEN,
        make,
        recorded=("vLLM moe_sum", f"{num_tokens} x {_CHOSEN} x {HIDDEN}"),
    )

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.dispatch_lists
import kernels.dispatch_plan
from kernels.backend import Backend, UnsupportedKernel
from kernels.dispatch_lists import list_rows
from kernels.dispatch_plan import (
    RoutedRows,
    _choose,
    _Config,
    _config_for,
    _GateSettings,
    _launch,
    dispatch_plan,
    new_ticket,
)
from tests.kernels.compiled import Compiled, compile_for_hopper
from tests.kernels.exact_interpreter import exact_interpreter  # noqa: F401
from tests.kernels.fused import GPU, interpret

pytestmark = pytest.mark.usefixtures("exact_interpreter")
CPU = torch.device("cpu")
DEMO: dict[str, Any] = {"num_groups": 8, "topk_group": 4, "k": 4, "normalize": True, "scale": 2.5}
FULL_SIZE = DEMO | {"k": 8}


def route(
    num_tokens: int, num_experts: int, generator: torch.Generator, ties: bool = False
) -> tuple[Tensor, Tensor]:
    logits = torch.randn(num_tokens, num_experts, generator=generator)
    bias = torch.randn(num_experts, generator=generator) / 8
    return (logits.round(), bias.mul(4).round().div(4)) if ties else (logits, bias)


def assert_consistent(plan: RoutedRows, first: int, held: int, group_size: int) -> None:
    """Everything that follows from the choice, written out in loops."""
    experts = plan.experts.tolist()
    rows: list[int] = []
    places = [[-1] * len(chosen) for chosen in experts]
    for expert in range(first, first + held):
        assert plan.offsets[expert - first] == len(rows)
        for token, chosen in enumerate(experts):
            if expert in chosen:
                places[token][chosen.index(expert)] = len(rows)
                rows.append(token)
    assert plan.offsets[held] == len(rows)
    assert plan.rows[: len(rows)].tolist() == rows
    assert plan.places.tolist() == places
    for group, count in enumerate(plan.node_counts.tolist()):
        tokens = [t for t, chosen in enumerate(experts) if any(e // group_size == group for e in chosen)]
        assert count == len(tokens)
        assert plan.node_tokens[group, :count].tolist() == tokens


def check(
    logits: Tensor, bias: Tensor, gate: dict[str, Any], held: range, backend: Backend = "triton"
) -> RoutedRows:
    options = gate | {"first_expert": held.start, "num_experts": len(held)}
    ticket = new_ticket(logits.device)
    plan = dispatch_plan(logits, bias, **options, ticket=ticket, backend=backend)
    expected = dispatch_plan(logits, bias, **options, ticket=ticket, backend="reference")
    assert torch.equal(plan.experts, expected.experts)
    torch.testing.assert_close(plan.weights, expected.weights, rtol=1e-5, atol=0)
    assert_consistent(plan, held.start, len(held), logits.shape[1] // gate["num_groups"])
    assert ticket.item() == 0
    assert all(part.dtype == torch.int32 for part in (plan.experts, plan.offsets, plan.rows, plan.places))
    return plan


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "held"), [(0, range(32)), (1, range(32)), (21, range(8, 20)), (33, range(32))]
)
def test_interpreted_equals_reference(
    num_tokens: int, held: range, ties: bool, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpret(interpreted, kernels.dispatch_plan, kernels.dispatch_lists)
    check(*route(num_tokens, 32, generator, ties), DEMO, held)


def test_interpreted_in_two_launches(generator: torch.Generator, interpreted: Callable[..., None]) -> None:
    interpret(interpreted, kernels.dispatch_plan, kernels.dispatch_lists)
    check(*route(258, 32, generator, True), DEMO | {"normalize": False}, range(4, 28))


def test_interpreted_configs_agree(generator: torch.Generator, interpreted: Callable[..., None]) -> None:
    interpret(interpreted, kernels.dispatch_plan, kernels.dispatch_lists)
    logits, bias = route(37, 64, generator, True)
    gate = _GateSettings(8, 4, 6, True, 2.5, 16, 24)
    expected = _launch(logits, bias, gate, new_ticket(CPU), _config_for(37, 24))
    for config in (
        _Config(True, 2, 64, 8, 4, 4),
        _Config(False, 4, 16, 16, 4, 4),
        _Config(False, 8, 8, 32, 4, 4),
    ):
        plan = _launch(logits, bias, gate, new_ticket(CPU), config)
        assert_consistent(plan, 16, 24, 8)
        assert torch.equal(plan.experts, expected.experts)


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_reference_is_consistent(num_tokens: int, generator: torch.Generator) -> None:
    check(*route(num_tokens, 32, generator, True), DEMO, range(4, 16), "reference")


def test_refusals() -> None:
    logits, bias, ticket = torch.zeros(2, 32), torch.zeros(32), new_ticket("cpu")
    options = {"first_expert": 0, "num_experts": 32, "ticket": ticket, "backend": "triton"}
    with pytest.raises(UnsupportedKernel, match="float32"):
        dispatch_plan(logits.bfloat16(), bias, **DEMO, **options)
    with pytest.raises(UnsupportedKernel, match="have no 17 experts"):
        dispatch_plan(logits, bias, **(DEMO | {"k": 17}), **options)
    with pytest.raises(UnsupportedKernel, match="not among"):
        dispatch_plan(logits, bias, **DEMO, **(options | {"first_expert": 4}))
    with pytest.raises(UnsupportedKernel, match="powers of two"):
        dispatch_plan(logits[:, :24], bias[:24], **DEMO, **(options | {"num_experts": 24}))


def compile_choice(num_tokens: int, held: int) -> Compiled:
    config = _config_for(num_tokens, held)
    outputs = ("experts", "places", "offsets", "rows", "node_counts", "node_tokens", "ticket")
    counts = ("part_counts_ptr", "part_node_counts_ptr")
    arguments = {f"{name}_ptr": "*i32" for name in outputs}
    arguments |= {f"{name}_ptr": "*fp32" for name in ("logits", "bias", "weights")}
    arguments |= {"marks_ptr": "*u8", "node_marks_ptr": "*u8", "scale": "fp32"}
    arguments |= dict.fromkeys(("num_tokens", "padded", "first_expert"), "i32")
    constants = {"E": 256, "G": 8, "TOPK_GROUP": 4, "K": 8, "BLOCK_K": 8, "NORMALIZE": True}
    constants |= {"NUM_EXPERTS": held, "GATE_TOKENS": config.gate_tokens, "ONE_LAUNCH": config.one_launch}
    constants |= {"PLAN_TOKENS": config.plan_tokens, "PLAN_EXPERTS": config.plan_experts}
    if config.one_launch:
        constants |= dict.fromkeys(counts)
    else:
        arguments |= dict.fromkeys(counts, "*u8")
    return compile_for_hopper(
        _choose, arguments, constants, num_warps=config.gate_warps, aligned=("padded", "first_expert")
    )


@pytest.mark.parametrize(("num_tokens", "held"), [(1, 256), (128, 256), (128, 32), (256, 256), (4096, 256)])
def test_compiled_choice_spills_nothing(num_tokens: int, held: int) -> None:
    assert compile_choice(num_tokens, held).spilled == 0


def test_compiled_lists_spill_nothing() -> None:
    config = _config_for(4096, 256)
    marks = ("marks_ptr", "node_marks_ptr", "part_counts_ptr", "part_node_counts_ptr")
    lists = ("offsets_ptr", "rows_ptr", "places_ptr", "node_counts_ptr", "node_tokens_ptr")
    compiled = compile_for_hopper(
        list_rows,
        dict.fromkeys(marks, "*u8")
        | dict.fromkeys(lists, "*i32")
        | dict.fromkeys(("num_tokens", "padded", "num_parts", "first_expert"), "i32"),
        {"E": 256, "G": 8, "K": 8, "NUM_EXPERTS": 256, "BLOCK_EXPERTS": 256}
        | {"PLAN_TOKENS": config.plan_tokens, "PLAN_EXPERTS": config.plan_experts}
        | {"PARTS": config.plan_tokens // config.gate_tokens},
        num_warps=config.plan_warps,
        aligned=("padded", "first_expert"),
    )
    assert compiled.spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 63, 128, 256, 2049])
@pytest.mark.parametrize("held", [range(256), range(32, 64)])
def test_gpu(num_tokens: int, held: range, generator: torch.Generator) -> None:
    # Logits on a coarse grid: equal ones are equal whoever takes the sigmoid, others far apart.
    logits = torch.randint(-64, 64, (num_tokens, 256), generator=generator) / 16
    check(logits.to(GPU), torch.zeros(256, device=GPU), FULL_SIZE, held)


@pytest.mark.gpu
def test_gpu_repeats_itself(generator: torch.Generator) -> None:
    """The program that makes the lists is another one every time, and sees what all others wrote."""
    logits, bias = (part.to(GPU) for part in route(128, 256, generator))
    gate = _GateSettings(8, 4, 8, True, 2.5, 0, 256)
    ticket = new_ticket(GPU)
    plans = [_launch(logits, bias, gate, ticket, _config_for(128, 256)) for _ in range(200)]
    assert_consistent(plans[0], 0, 256, 32)
    for plan in plans[1:]:
        for one, other in zip(astuple(plan)[:6], astuple(plans[0])[:6], strict=True):
            assert torch.equal(one, other)

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.dispatch_lists
import kernels.dispatch_plan
import kernels.list_rows
from kernels.backend import Backend, UnsupportedKernel
from kernels.dispatch_lists import count_parts, list_all, list_parts
from kernels.dispatch_plan import (
    _choose,
    _Config,
    _config_for,
    _GateSettings,
    _launch,
    dispatch_plan,
)
from kernels.list_rows import ListConfig, RoutedRows, list_config, list_rows
from tests.kernels.compiled import Compiled, compile_for_hopper
from tests.kernels.fused import GPU

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
    plan = dispatch_plan(logits, bias, **options, backend=backend)
    expected = dispatch_plan(logits, bias, **options, backend="reference")
    assert torch.equal(plan.experts, expected.experts)
    torch.testing.assert_close(plan.weights, expected.weights, rtol=1e-5, atol=0)
    assert_consistent(plan, held.start, len(held), logits.shape[1] // gate["num_groups"])
    assert all(part.dtype == torch.int32 for part in (plan.experts, plan.offsets, plan.rows, plan.places))
    return plan


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(
    ("num_tokens", "held"), [(0, range(32)), (1, range(32)), (21, range(8, 20)), (33, range(32))]
)
def test_interpreted_equals_reference(
    num_tokens: int, held: range, ties: bool, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.dispatch_plan, kernels.list_rows, kernels.dispatch_lists)
    check(*route(num_tokens, 32, generator, ties), DEMO, held)


def test_interpreted_not_normalized(generator: torch.Generator, interpreted: Callable[..., None]) -> None:
    interpreted(kernels.dispatch_plan, kernels.list_rows, kernels.dispatch_lists)
    check(*route(19, 32, generator, True), DEMO | {"normalize": False}, range(4, 28))


def test_interpreted_configs_agree(generator: torch.Generator, interpreted: Callable[..., None]) -> None:
    interpreted(kernels.dispatch_plan, kernels.list_rows, kernels.dispatch_lists)
    logits, bias = route(37, 64, generator, True)
    gate = _GateSettings(8, 4, 6, True, 2.5, 16, 24)
    expected = _launch(logits, bias, gate, _config_for(37))
    for config in (
        _config_for(4096),
        _Config(2, 1, ListConfig(0, 4)),
        _Config(4, 4, ListConfig(16, 4)),
        _Config(1, 1, ListConfig(4, 1)),
    ):
        plan = _launch(logits, bias, gate, config)
        assert_consistent(plan, 16, 24, 8)
        assert torch.equal(plan.experts, expected.experts)


@pytest.mark.parametrize("num_tokens", [0, 1, 50])
def test_reference_is_consistent(num_tokens: int, generator: torch.Generator) -> None:
    check(*route(num_tokens, 32, generator, True), DEMO, range(4, 16), "reference")


def test_refusals() -> None:
    logits, bias = torch.zeros(2, 32), torch.zeros(32)
    options = {"first_expert": 0, "num_experts": 32, "backend": "triton"}
    with pytest.raises(UnsupportedKernel, match="float32"):
        dispatch_plan(logits.bfloat16(), bias, **DEMO, **options)
    with pytest.raises(UnsupportedKernel, match="have no 17 experts"):
        dispatch_plan(logits, bias, **(DEMO | {"k": 17}), **options)
    with pytest.raises(UnsupportedKernel, match="have no 0 experts"):
        dispatch_plan(logits, bias, **(DEMO | {"k": 0}), **options)
    with pytest.raises(UnsupportedKernel, match=r"\(31,\) biases, 32 experts"):
        dispatch_plan(logits, bias[:31], **DEMO, **options)
    with pytest.raises(UnsupportedKernel, match="not among"):
        dispatch_plan(logits, bias, **DEMO, **(options | {"first_expert": 4}))
    with pytest.raises(UnsupportedKernel, match="powers of two"):
        dispatch_plan(logits[:, :24], bias[:24], **DEMO, **(options | {"num_experts": 24}))


def compile_choice(num_tokens: int, held: int) -> Compiled:
    config = _config_for(num_tokens)
    arguments = {f"{name}_ptr": "*i32" for name in ("experts", "places")}
    arguments |= {f"{name}_ptr": "*fp32" for name in ("logits", "bias", "weights")}
    arguments |= {"choices_ptr": "*u8", "scale": "fp32", "num_tokens": "i32", "first_expert": "i32"}
    constants = {"E": 256, "G": 8, "TOPK_GROUP": 4, "K": 8, "NORMALIZE": True}
    constants |= {"NUM_EXPERTS": held, "GATE_TOKENS": config.gate_tokens}
    return compile_for_hopper(_choose, arguments, constants, num_warps=config.gate_warps)


@pytest.mark.parametrize(("num_tokens", "held"), [(1, 256), (128, 32), (4096, 256)])
def test_compiled_choice_takes_one_warp(num_tokens: int, held: int) -> None:
    assert _config_for(num_tokens).gate_warps == 1
    compiled = compile_choice(num_tokens, held)
    assert compiled.spilled == 0
    assert "redux.sync" in compiled.ptx, "the best of 256 in one instruction"


@pytest.mark.parametrize("is_choice", [False, True])
@pytest.mark.parametrize("num_tokens", [128, 256, 4096])
def test_compiled_lists_spill_nothing(num_tokens: int, is_choice: bool) -> None:
    config = list_config(num_tokens)
    lists = ("offsets_ptr", "rows_ptr", "places_ptr", "node_counts_ptr", "node_tokens_ptr")
    counts = ("part_counts_ptr", "part_node_counts_ptr")
    kinds = dict.fromkeys(lists, "*i32") | dict.fromkeys(counts, "*u8")
    kinds["choices_ptr"] = "*i32" if is_choice else "*u8"
    kinds |= dict.fromkeys(("num_tokens", "num_parts", "parts_stride", "first_expert"), "i32")
    constants = {"E": 256, "G": 8, "GROUP_SIZE": 32, "K": 8, "BLOCK_K": 8, "NUM_EXPERTS": 256}
    constants |= {"TOKENS": config.part_tokens or num_tokens, "IS_CHOICE": is_choice}
    for kernel in (count_parts, list_parts) if config.part_tokens else (list_all,):
        names = kernel.arg_names
        counts_or_lists = {"counts_ptr": "*u8", "node_counts_ptr": "*u8"} if kernel is count_parts else {}
        compiled = compile_for_hopper(
            kernel,
            {name: kind for name, kind in (kinds | counts_or_lists).items() if name in names},
            {name: value for name, value in constants.items() if name in names},
            num_warps=config.num_warps,
            aligned=("parts_stride",) if "parts_stride" in names else (),
        )
        assert compiled.spilled == 0


def check_choice(
    num_tokens: int,
    held: range,
    backend: Backend,
    generator: torch.Generator,
    device: torch.device = CPU,
) -> None:
    """The lists of a choice that somebody else made."""
    keys = torch.rand(num_tokens, 32, generator=generator)
    experts = keys.topk(4).indices.sort(-1).values.int().to(device)
    plan = list_rows(
        experts,
        torch.ones(num_tokens, 4, device=device),
        all_experts=32,
        num_groups=8,
        first_expert=held.start,
        num_experts=len(held),
        backend=backend,
    )
    assert_consistent(plan, held.start, len(held), 4)


@pytest.mark.parametrize("held", [range(32), range(8, 20)])
@pytest.mark.parametrize("num_tokens", [0, 1, 21])
def test_interpreted_lists_of_a_choice(
    num_tokens: int,
    held: range,
    generator: torch.Generator,
    interpreted: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interpreted(kernels.list_rows, kernels.dispatch_lists)
    check_choice(num_tokens, held, "triton", generator)
    check_choice(num_tokens, held, "reference", generator)
    monkeypatch.setattr(kernels.list_rows, "list_config", lambda _: ListConfig(4, 1))
    check_choice(num_tokens, held, "triton", generator)


def test_refusals_of_a_choice() -> None:
    options: dict[str, Any] = {"all_experts": 32, "num_groups": 8, "first_expert": 0, "num_experts": 32}
    experts, weights = torch.zeros(2, 4, dtype=torch.int32), torch.ones(2, 4)
    with pytest.raises(UnsupportedKernel, match="int32"):
        list_rows(experts.long(), weights, **options, backend="triton")
    with pytest.raises(UnsupportedKernel, match="differ"):
        list_rows(experts, weights[:1], **options, backend="triton")
    with pytest.raises(UnsupportedKernel, match="not among"):
        list_rows(experts, weights, **(options | {"first_expert": 1}), backend="reference")
    with pytest.raises(UnsupportedKernel, match="powers of two"):
        list_rows(experts, weights, **(options | {"all_experts": 40}), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("held", [range(32), range(8, 20)])
@pytest.mark.parametrize("num_tokens", [128, 2049])
def test_gpu_lists_of_a_choice(num_tokens: int, held: range, generator: torch.Generator) -> None:
    check_choice(num_tokens, held, "triton", generator, GPU)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 63, 128, 256, 2049])
@pytest.mark.parametrize("held", [range(256), range(32, 64)])
def test_gpu(num_tokens: int, held: range, generator: torch.Generator) -> None:
    # Logits on a coarse grid: equal ones are equal whoever takes the sigmoid, others far apart.
    logits = torch.randint(-64, 64, (num_tokens, 256), generator=generator) / 16
    check(logits.to(GPU), torch.zeros(256, device=GPU), FULL_SIZE, held)


@pytest.mark.gpu
def test_gpu_repeats_itself(generator: torch.Generator) -> None:
    logits, bias = (part.to(GPU) for part in route(128, 256, generator))
    gate = _GateSettings(8, 4, 8, True, 2.5, 0, 256)
    plans = [_launch(logits, bias, gate, _config_for(128)) for _ in range(200)]
    assert_consistent(plans[0], 0, 256, 32)
    for plan in plans[1:]:
        for one, other in zip(astuple(plan)[:6], astuple(plans[0])[:6], strict=True):
            assert torch.equal(one, other)

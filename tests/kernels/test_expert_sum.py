from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.expert_sum
from kernels.backend import UnsupportedKernel
from kernels.expert_sum import _config_for, _expert_sum, expert_sum
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU

CPU = torch.device("cpu")


def rows_of(
    num_tokens: int, k: int, width: int, num_experts: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs, places, experts and weights; some experts are held by nobody here."""
    experts = torch.rand(num_tokens, num_experts, generator=generator).argsort(1)[:, :k].sort(1).values.int()
    places = torch.randperm(num_tokens * k, generator=generator).view(num_tokens, k).int()
    places[torch.rand(num_tokens, k, generator=generator) < 0.2] = -1
    outputs = torch.randn(num_tokens * k, width, generator=generator).bfloat16()
    return outputs, places, experts, torch.rand(num_tokens, k, generator=generator)


def check(
    num_tokens: int,
    width: int,
    groups: range,
    shared: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    device: torch.device,
) -> None:
    rows = [part.to(device) for part in rows_of(num_tokens, 6, width, 32, generator)]
    added = torch.randn(num_tokens, width, generator=generator).to(device, torch.bfloat16) if shared else None
    options = {"group_size": 4, "first_group": groups.start, "num_groups": len(groups), "shared": added}
    actual = expert_sum(*rows, **options, dtype=dtype, backend="triton")
    expected = expert_sum(*rows, **options, dtype=dtype, backend="reference")
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("groups", [range(8), range(4, 8), range(3, 4)])
@pytest.mark.parametrize(("shared", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_interpreted_equals_reference(
    groups: range,
    shared: bool,
    dtype: torch.dtype,
    generator: torch.Generator,
    interpreted: Callable[..., None],
) -> None:
    interpreted(kernels.expert_sum)
    for num_tokens in (0, 1, 5):
        check(num_tokens, 320, groups, shared, dtype, generator, CPU)


def test_interpreted_parts_make_the_whole(
    generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    """Bit for bit: two halves of the groups on two machines, then added, are all groups on one."""
    interpreted(kernels.expert_sum)
    rows = rows_of(7, 6, 256, 32, generator)

    def part(groups: range) -> Tensor:
        return expert_sum(
            *rows,
            group_size=4,
            first_group=groups.start,
            num_groups=len(groups),
            shared=None,
            dtype=torch.float32,
            backend="triton",
        )

    assert torch.equal(part(range(4)) + part(range(4, 8)), part(range(8)))
    assert torch.equal(part(range(4, 6)) + part(range(6, 8)), part(range(4, 8)))


def test_refusals(generator: torch.Generator) -> None:
    rows = rows_of(2, 4, 128, 32, generator)
    cases: list[tuple[int, int, Tensor | None, str]] = [
        *((first, num, None, "no block of the tree") for first, num in ((0, 3), (2, 4), (0, 0))),
        (0, 8, torch.zeros(1, 32), r"shared is \(1, 32\), for 2 tokens"),
    ]
    for first_group, num_groups, shared, rule in cases:
        with pytest.raises(UnsupportedKernel, match=rule):
            expert_sum(
                *rows,
                group_size=4,
                first_group=first_group,
                num_groups=num_groups,
                shared=shared,
                dtype=torch.float32,
                backend="triton",
            )


@pytest.mark.parametrize("num_groups", [1, 8])
def test_compiled_loads_all_rows_at_once(num_groups: int) -> None:
    config = _config_for(4096, 7168)
    compiled = compile_for_hopper(
        _expert_sum,
        {
            "outputs_ptr": "*bf16",
            "places_ptr": "*i32",
            "experts_ptr": "*i32",
            "weights_ptr": "*fp32",
            "shared_ptr": "*bf16",
            "out_ptr": "*bf16",
            "outputs_stride": "i32",
            "shared_stride": "i32",
            "width": "i32",
        },
        {
            "GROUP_SIZE": 32,
            "FIRST_GROUP": 0,
            "NUM_GROUPS": num_groups,
            "K": 8,
            "WIDTH": config.width,
            "HAS_SHARED": True,
        },
        num_warps=config.num_warps,
        aligned=("outputs_stride", "shared_stride", "width"),
    )
    assert compiled.spilled == 0
    vectors = config.width // (32 * config.num_warps * 8)  # of a thread, in each of nine rows
    assert compiled.ptx.count("ld.global.v4.b32") == 9 * vectors


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [range(8), range(6, 8)])
@pytest.mark.parametrize(("num_tokens", "width"), [(1, 256), (65, 7168), (2049, 2048)])
def test_gpu(groups: range, num_tokens: int, width: int, generator: torch.Generator) -> None:
    check(num_tokens, width, groups, True, torch.bfloat16, generator, GPU)
    check(num_tokens, width, groups, False, torch.float32, generator, GPU)

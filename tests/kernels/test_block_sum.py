from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

import kernels.block_sum
from kernels.backend import Backend, UnsupportedKernel
from kernels.block_sum import _block_sum, _order, block_sum
from kernels.group_tree import add_all, blocks_of
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU

CPU = torch.device("cpu")
HELD = [
    [range(8)],
    [range(4), range(4, 8)],
    [range(3), range(3, 8)],
    [range(g, g + 1) for g in range(8)],
    [range(5), range(5, 6)],
]  # groups of each peer


def parts_of(
    held: Sequence[range],
    num_tokens: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device,
) -> list[tuple[range, Tensor]]:
    blocks = [block for groups in held for block in blocks_of(groups)]
    return [(block, torch.randn(num_tokens, 96, generator=generator).to(device, dtype)) for block in blocks]


def check(
    held: Sequence[range],
    num_tokens: int,
    generator: torch.Generator,
    *,
    backend: Backend = "triton",
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Bit for bit the tree in fp32, with and without the shared rows; the parts stay as they were."""
    parts = parts_of(held, num_tokens, generator, torch.bfloat16, device)
    given = [(block, part.clone()) for block, part in parts]
    shared = torch.randn(num_tokens, 96, generator=generator).to(device, torch.bfloat16)
    tree: Tensor = add_all([(block, part.float()) for block, part in parts], torch.add)
    for also in (None, shared):
        found = block_sum(parts, also, dtype=dtype, backend=backend)
        assert torch.equal(found, (tree if also is None else tree + also.float()).to(dtype))
        assert found.data_ptr() != parts[0][1].data_ptr()
    assert all(torch.equal(part, before) for (_, part), (_, before) in zip(parts, given, strict=True))


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("num_tokens", [1, 21])
def test_interpreted_and_reference(
    held: list[range], num_tokens: int, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    check(held, num_tokens, generator, backend="reference")
    interpreted(kernels.block_sum)
    check(held, num_tokens, generator)


def test_the_order_is_that_of_the_tree() -> None:
    """(0 + 1) + (2 + 3) of four, and of three uneven ones the right first: 0 + (1 + 2)."""
    nothing = torch.zeros(1, 1)
    alike = [(range(2 * n, 2 * n + 2), nothing) for n in range(4)]
    assert _order(alike) == 0x10 | 0x32 << 8 | 0x20 << 16
    uneven = [(range(4), nothing), (range(4, 6), nothing), (range(6, 7), nothing)]
    assert _order(uneven) == 0x21 | 0x10 << 8


def test_refusals() -> None:
    part = torch.zeros(2, 8)
    with pytest.raises(UnsupportedKernel, match="9 blocks"):
        block_sum([(range(g, g + 1), part) for g in range(9)], None, dtype=part.dtype, backend="reference")
    with pytest.raises(UnsupportedKernel, match="one shape"):
        block_sum([(range(1), part)], part[:1], dtype=part.dtype, backend="triton")
    mixed = [(range(1), part), (range(1, 2), part.bfloat16())]
    with pytest.raises(UnsupportedKernel, match="one dtype"):
        block_sum(mixed, None, dtype=part.dtype, backend="triton")


@pytest.mark.parametrize("blocks", [1, 8])
def test_compiled_reads_vectors_and_spills_nothing(blocks: int) -> None:
    parts = [(range(g, g + 1), torch.zeros(1, 1)) for g in range(blocks)]
    arguments = {f"part{n}": "*bf16" for n in range(8)}
    arguments |= {"shared_ptr": "*bf16", "out_ptr": "*bf16", "size": "i32"}
    constants = {"BLOCKS": blocks, "ORDER": _order(parts), "HAS_SHARED": True, "WIDTH": 1024}
    compiled = compile_for_hopper(_block_sum, arguments, constants, num_warps=4, aligned=("size",))
    assert compiled.spilled == 0
    assert "ld.global.v4.b32" in compiled.ptx


@pytest.mark.gpu
@pytest.mark.parametrize("held", HELD)
def test_gpu(held: list[range], generator: torch.Generator) -> None:
    check(held, 200, generator, device=GPU, dtype=torch.bfloat16)

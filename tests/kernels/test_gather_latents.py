from collections.abc import Callable

import pytest
import torch

import kernels.gather_latents as module
from kernels.backend import UnsupportedKernel
from kernels.gather_latents import gather_latents
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.mla_cases import RANK, ROPE, latent_pages, widened


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 150])
def test_kernel_interpreted(
    length: int, interpreted: Callable[..., None], generator: torch.Generator
) -> None:
    interpreted(module)
    pages = latent_pages(4, True, generator)
    row = torch.tensor([3, 0, 2], dtype=torch.int32)
    out = module._launch(pages, row, length, RANK, ROPE, 16, 4)
    expected = widened(pages).unflatten(0, (4, 64))[row.long()].flatten(0, 1)[:length]
    assert torch.equal(out.double(), expected)  # powers of two times e4m3: nothing is rounded
    assert torch.equal(gather_latents(pages, row, length, RANK, backend="reference").double(), expected)


def test_refusals(generator: torch.Generator) -> None:
    pages, row = latent_pages(2, True, generator), torch.tensor([1])
    with pytest.raises(UnsupportedKernel, match="65 tokens, 1 pages of 64"):
        gather_latents(pages, row, 65, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="do not hold 512 channels"):
        gather_latents(pages, row, 5, 512, backend="triton")
    with pytest.raises(UnsupportedKernel, match="needs uint8 records"):
        gather_latents(pages.int(), row, 5, RANK, backend="triton")


def test_compiled_for_hopper() -> None:
    made = compile_for_hopper(
        module._gather,
        {"pages": "*u8", "page_row": "*i32", "out": "*bf16", "length": "i32"},
        {"C": 512, "R": 64, "RECORD": 656, "PAGE": 64, "TOKENS": 16},
    )
    assert made.spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (128, 32)])
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 2049])
def test_on_gpu(length: int, rank: int, rope: int) -> None:
    generator = torch.Generator().manual_seed(length)
    pages = latent_pages(40, True, generator, rank, rope).cuda()
    row = torch.randperm(40, generator=generator).cuda()
    out = gather_latents(pages, row, length, rank, backend="triton")
    expected = gather_latents(pages, row, length, rank, backend="reference")
    assert torch.equal(out, expected)

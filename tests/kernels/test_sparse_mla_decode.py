from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.latent_tiles as tiles
import kernels.sparse_mla_decode as module
from kernels.backend import UnsupportedKernel
from kernels.latent_tiles import TileConfig, choose_splits
from kernels.sparse_mla_decode import sparse_mla_decode, sparse_mla_decode_reference
from tests.kernels.compiled import Compiled, compile_for_hopper
from tests.kernels.mla_cases import RANK, ROPE, attend_exactly, latent_pages, widened

SCALE = 0.11
SMALL = TileConfig(16, 16, 4, 1)


def random_slots(num_rows: int, k: int, num_slots: int, generator: torch.Generator) -> Tensor:
    slots = torch.stack([torch.randperm(num_slots, generator=generator)[:k] for _ in range(num_rows)]).int()
    slots[torch.rand(slots.shape, generator=generator) < 0.2] = -1
    return slots


def exactly(q: Tensor, pages: Tensor, slots: Tensor, rank: int = RANK) -> Tensor:
    latents = widened(pages, rank)
    rows = zip(q, slots, strict=True)
    return torch.stack([attend_exactly(query, latents, row[row >= 0], SCALE, rank) for query, row in rows])


@pytest.mark.parametrize("fp8", [True, False])
def test_reference(fp8: bool, generator: torch.Generator) -> None:
    pages = latent_pages(2, fp8, generator)
    q = torch.randn(3, 5, RANK + ROPE, generator=generator)
    slots = random_slots(3, 40, 128, generator)
    slots[1] = -1
    out = sparse_mla_decode(q, pages, slots, SCALE, RANK, backend="reference")
    torch.testing.assert_close(out.double(), exactly(q, pages, slots), atol=1e-5, rtol=0)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("k", "splits"), [(1, 1), (16, 1), (49, 1), (49, 2), (64, 4)])
def test_kernel_interpreted(
    fp8: bool,
    k: int,
    splits: int,
    interpreted: Callable[..., None],
    generator: torch.Generator,
) -> None:
    interpreted(tiles, module)
    pages = latent_pages(2, fp8, generator)
    q = torch.randn(3, 20, RANK + ROPE, generator=generator)  # more heads than a block, not a multiple
    slots = random_slots(3, k, 128, generator)
    slots[1] = -1
    slots[2, : k // 2] = -1  # a whole split skipped
    out = module._launch(q, pages, slots, SCALE, RANK, SMALL, splits)
    assert (out[1] == 0).all()
    torch.testing.assert_close(out.double(), exactly(q, pages, slots), atol=2e-5, rtol=0)


def test_skipped_slots_take_nothing_from_slot_0(
    interpreted: Callable[..., None], generator: torch.Generator
) -> None:
    interpreted(tiles, module)
    pages = latent_pages(1, False, generator)
    pages[0, 0] = float("nan")
    q = torch.randn(1, 2, RANK + ROPE, generator=generator)
    slots = torch.tensor([[-1, 5, -1, 9]])
    out = module._launch(q, pages, slots, SCALE, RANK, SMALL)
    torch.testing.assert_close(out.double(), exactly(q, pages, slots), atol=2e-5, rtol=0)


def test_splits_fill_the_machine() -> None:
    assert choose_splits(256, 32, 132) == 1
    assert choose_splits(64, 32, 132) == 2
    assert choose_splits(2, 32, 132) >= 16
    assert choose_splits(5, 1, 132) == 1
    for programs in (1, 2, 7, 64, 100):
        splits = choose_splits(programs, 37, 132)
        assert -(-37 // -(-37 // splits)) == splits  # none is empty


def test_no_queries_and_no_slots(interpreted: Callable[..., None], generator: torch.Generator) -> None:
    interpreted(tiles, module)
    pages = latent_pages(1, True, generator)
    q = torch.randn(2, 4, RANK + ROPE, generator=generator)
    none = torch.zeros(2, 0, dtype=torch.int32)
    assert module._launch(q[:0], pages, none[:0], SCALE, RANK, SMALL).shape == (0, 4, RANK)
    assert (module._launch(q, pages, none, SCALE, RANK, SMALL) == 0).all()


def test_refusals(generator: torch.Generator) -> None:
    pages, q = latent_pages(1, True, generator), torch.zeros(2, 4, RANK + ROPE)
    slots = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(UnsupportedKernel, match="2 queries, 1 slot rows"):
        sparse_mla_decode(q, pages, slots[:1], SCALE, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="must be bfloat16"):
        sparse_mla_decode(q, pages, slots, SCALE, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="records of"):
        sparse_mla_decode(q[..., 1:], pages, slots, SCALE, RANK, backend="triton")
    with pytest.raises(UnsupportedKernel, match="'deterministic'"):
        sparse_mla_decode(q, pages, slots, SCALE, RANK, backend="deterministic")


def compiled(config: TileConfig, fp8: bool, split: bool) -> Compiled:
    out = "*fp32" if split else "*bf16"
    pages = "*u8" if fp8 else "*bf16"
    kinds = {"q": "*bf16", "pages": pages, "slots": "*i32", "out": out, "log_sums": out, "scale": "fp32"}
    integers = ("H", "K", "slots_stride", "splits", "split_keys")
    return compile_for_hopper(
        module._decode,
        kinds | dict.fromkeys(integers, "i32"),
        {
            "C": 512, "R": 64, "RECORD": 656 if fp8 else 0,
            "BLOCK_H": config.block_rows, "BLOCK_K": config.block_keys, "SPLIT": split,
        },
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        aligned=("H", "K", "slots_stride", "split_keys"),
    )  # fmt: skip


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("num_heads", [128, 64, 16, 8])
def test_compiled_for_hopper(num_heads: int, fp8: bool, split: bool) -> None:
    config = module._config_for(num_heads, fp8=fp8)
    made = compiled(config, fp8, split)
    assert made.shared <= 227 * 1024
    assert made.cp_async > 0
    if num_heads >= 64:
        assert made.wgmma > 0
        assert made.mma_sync == 0
    # Widening beside an accumulator of half the register file does not fit: Gluon is there for that.
    assert made.spilled <= (300 if fp8 and num_heads >= 64 else 0)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize("num_heads", [128, 64, 16])
@pytest.mark.parametrize("k", [1, 63, 64, 65, 2047, 2048, 2049])
def test_full_size(num_heads: int, fp8: bool, k: int) -> None:
    check_on_gpu(num_heads, fp8, k, 512, 64, spread=1.0)


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_demo_size_narrow_and_wide(spread: float) -> None:
    check_on_gpu(8, True, 256, 128, 32, spread)


def check_on_gpu(num_heads: int, fp8: bool, k: int, rank: int, rope: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(k)
    pages = latent_pages(40, fp8, generator, rank, rope)
    pages = (pages if fp8 else pages.bfloat16()).cuda()
    q = (torch.randn(3, num_heads, rank + rope, generator=generator) * spread).bfloat16().cuda()
    slots = random_slots(3, k, 40 * 64, generator).cuda()
    slots[1] = -1
    out = sparse_mla_decode(q, pages, slots, SCALE, rank, backend="triton")
    expected = exactly(q, pages.float() if not fp8 else pages, slots, rank)
    assert (out[1] == 0).all()
    error = (out.double() - expected).norm() / expected.norm().clamp_min(1e-9)
    assert error < 6e-3  # weights and results are rounded to bf16, 2^-9 of themselves
    same = sparse_mla_decode(q, pages, slots, SCALE, rank, backend="triton")
    assert torch.equal(same, out)
    reference = sparse_mla_decode_reference(q, pages, slots, SCALE, rank)
    torch.testing.assert_close(
        out.float(), reference.float(), atol=0.05 * float(expected.abs().max()), rtol=0
    )


@pytest.mark.parametrize("constants", [(8, 2, 256), (1, 16, 128)])
def test_combination_compiled_for_hopper(constants: tuple[int, int, int]) -> None:
    made = compile_for_hopper(
        tiles._combine,
        {"parts": "*fp32", "log_sums": "*fp32", "out": "*bf16", "total": "i32", "H": "i32", "splits": "i32"},
        dict(zip(("ROWS", "STEP", "CHANNELS"), constants, strict=True)) | {"C": 512},
        aligned=("H", "total"),
    )
    assert made.spilled == 0

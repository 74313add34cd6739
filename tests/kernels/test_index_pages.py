import struct

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.fp8_quant import FP8
from kernels.index_pages import planes, read_index_keys_fp8, write_index_keys_fp8

PAGE, DIM = 64, 128
PAGE_BYTES = PAGE * (DIM + 4)


def random_keys(num_tokens: int, dim: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    codes = torch.randint(0, 0x7F, (num_tokens, dim), generator=generator, dtype=torch.uint8)
    return codes.view(FP8), torch.rand(num_tokens, generator=generator)


def test_a_full_size_page_byte_by_byte(generator: torch.Generator) -> None:
    """8,192 bytes of values, token by token, then 256 bytes of scales: planar, no records of 132 bytes."""
    keys, scales = random_keys(PAGE, DIM, generator)
    pages = torch.full((1, PAGE_BYTES), 0xEE, dtype=torch.uint8)
    write_index_keys_fp8(pages, torch.arange(PAGE), keys, scales, PAGE, backend="reference")
    expected = b"".join(bytes(row) for row in keys.view(torch.uint8).tolist())
    expected += b"".join(struct.pack("<f", scale) for scale in scales.tolist())
    assert len(expected) == PAGE_BYTES == 8192 + 256
    assert bytes(pages[0].tolist()) == expected


def test_scattered_slots_and_nothing_else(generator: torch.Generator) -> None:
    slots = torch.tensor([PAGE * 2 + 63, 0, PAGE + 5, PAGE * 2, 63])
    keys, scales = random_keys(len(slots), DIM, generator)
    pages = torch.full((3, PAGE_BYTES), 0xEE, dtype=torch.uint8)
    expected = [bytearray(b"\xee" * PAGE_BYTES) for _ in range(3)]
    for slot, key, scale in zip(
        slots.tolist(), keys.view(torch.uint8).tolist(), scales.tolist(), strict=True
    ):
        page, offset = divmod(slot, PAGE)
        expected[page][offset * DIM : (offset + 1) * DIM] = bytes(key)
        struct.pack_into("<f", expected[page], PAGE * DIM + 4 * offset, scale)
    write_index_keys_fp8(pages, slots, keys, scales, PAGE, backend="reference")
    assert [bytes(page) for page in pages.tolist()] == [bytes(page) for page in expected]


@pytest.mark.parametrize("page_ids", [[2, 0], [1], [0, 1, 2], []])
def test_whole_pages_come_back_in_the_order_asked_for(
    page_ids: list[int], generator: torch.Generator
) -> None:
    keys, scales = random_keys(3 * PAGE, DIM, generator)
    pages = torch.zeros(3, PAGE_BYTES, dtype=torch.uint8)
    order = torch.randperm(3 * PAGE, generator=generator)
    write_index_keys_fp8(pages, order, keys[order], scales[order], PAGE, backend="reference")
    found_keys, found_scales = read_index_keys_fp8(
        pages, torch.tensor(page_ids, dtype=torch.int64), PAGE, backend="reference"
    )
    slots = [page * PAGE + offset for page in page_ids for offset in range(PAGE)]
    assert (found_keys.dtype, found_scales.dtype) == (FP8, torch.float32)
    assert found_keys.shape == (len(slots), DIM)
    assert torch.equal(found_keys.view(torch.uint8), keys.view(torch.uint8)[slots])
    assert torch.equal(found_scales, scales[slots])


def test_keys_and_scales_that_are_not_contiguous(generator: torch.Generator) -> None:
    keys, scales = random_keys(6, DIM, generator)
    plain, strided = (torch.zeros(1, PAGE_BYTES, dtype=torch.uint8) for _ in range(2))
    write_index_keys_fp8(
        plain, torch.arange(3), keys[::2].contiguous(), scales[::2].contiguous(), PAGE, backend="reference"
    )
    write_index_keys_fp8(strided, torch.arange(3), keys[::2], scales[::2], PAGE, backend="reference")
    assert torch.equal(plain, strided)


def test_planes_are_views() -> None:
    pages = torch.zeros(2, 4 * (8 + 4), dtype=torch.uint8)
    values, scales = planes(pages, 4)
    assert (values.shape, scales.shape) == ((2, 4, 8), (2, 4, 4))
    values.fill_(1)
    scales.fill_(2)
    assert pages.tolist() == [[1] * 32 + [2] * 16] * 2


def test_no_tokens() -> None:
    pages = torch.full((1, PAGE_BYTES), 7, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    write_index_keys_fp8(pages, none, torch.zeros(0, DIM).to(FP8), torch.zeros(0), PAGE, backend="reference")
    assert (pages == 7).all()


def test_refusals() -> None:
    keys, scales, slots = torch.zeros(1, DIM).to(FP8), torch.ones(1), torch.tensor([0])
    records = torch.zeros(1, PAGE, DIM + 4, dtype=torch.uint8)
    with pytest.raises(UnsupportedKernel, match=r"^write_index_keys_fp8: 132 bytes, not 8448$"):
        write_index_keys_fp8(records, slots, keys, scales, PAGE, backend="reference")
    pages = torch.zeros(1, PAGE_BYTES, dtype=torch.uint8)
    with pytest.raises(UnsupportedKernel, match=r"^write_index_keys_fp8: "):
        write_index_keys_fp8(pages, slots, keys, scales, PAGE, backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^read_index_keys_fp8: "):
        read_index_keys_fp8(pages, slots, PAGE, backend="triton")

import math
import struct

import pytest
import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel
from kernels.latent_pages import read_latents_fp8, record_bytes, write_latents_fp8
from tests.e4m3 import VALUES, nearest

RANK, ROPE, PAGE = 512, 64, 64


def record_by_hand(c: list[float], k_pe: Tensor) -> bytes:
    """e4m3 values | one fp32 power of two for each 128 of them | bf16 numbers, which are given as such."""
    values, scales = b"", b""
    for start in range(0, len(c), 128):
        group = c[start : start + 128]
        scale = 2.0 ** math.ceil(math.log2(max(*map(abs, group), 1e-4) / 448))
        values += bytes(nearest(x / scale) for x in group)
        scales += struct.pack("<f", scale)
    # A bf16 number is the upper half of the float32 of the same value.
    return values + scales + b"".join(struct.pack("<f", x)[2:] for x in k_pe.tolist())


def widened_by_hand(record: bytes, rank: int) -> list[float]:
    num_scales = math.ceil(rank / 128)
    scales = struct.unpack_from(f"<{num_scales}f", record, rank)
    c = [VALUES[record[i]] * scales[i // 128] for i in range(rank)]
    rope = record[rank + 4 * num_scales :]
    return c + [struct.unpack("<f", b"\0\0" + rope[i : i + 2])[0] for i in range(0, len(rope), 2)]


def random_latents(
    num_tokens: int, rank: int, rope: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    c = torch.randn(num_tokens, rank, generator=generator)
    c *= torch.exp(3 * torch.randn(num_tokens, 1, generator=generator))
    return c, torch.randn(num_tokens, rope, generator=generator).bfloat16()


def test_sizes_of_the_public_kernels() -> None:
    assert record_bytes(RANK, ROPE) == 512 + 16 + 128 == 656
    assert PAGE * record_bytes(RANK, ROPE) == 41_984


def test_a_full_size_record_byte_by_byte() -> None:
    """Numbers on the grid: group g holds 448 * 2^g and so has the scale 2^g."""
    c = torch.zeros(1, RANK)
    for group in range(4):
        c[0, 128 * group : 128 * group + 3] = torch.tensor([448.0, -1.5, 2.0**-9]) * 2.0**group
    k_pe = torch.arange(ROPE).float().unsqueeze(0) - 0.5
    pages = torch.full((1, PAGE, 656), 0xEE, dtype=torch.uint8)
    write_latents_fp8(pages, torch.tensor([5]), c, k_pe, backend="reference")
    group_bytes = bytes([0x7E, 0xBC, 0x01]) + bytes(125)
    expected = group_bytes * 4 + struct.pack("<4f", 1, 2, 4, 8)
    expected += b"".join(struct.pack("<f", i - 0.5)[2:] for i in range(ROPE))
    assert bytes(pages[0, 5].tolist()) == expected
    assert (pages[0, :5] == 0xEE).all()
    assert (pages[0, 6:] == 0xEE).all()
    read = read_latents_fp8(pages, torch.tensor([5]), RANK, backend="reference")
    assert torch.equal(read, torch.cat([c, k_pe], dim=-1))


@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (40, 16), (128, 2), (200, 8), (256, 4)])
def test_random_records_against_a_slow_one(rank: int, rope: int, generator: torch.Generator) -> None:
    """Ranks that are no multiple of 128 end in a short group with a scale of its own."""
    c, k_pe = random_latents(5, rank, rope, generator)
    slots = torch.tensor([2 * PAGE + 63, 0, PAGE, 63, PAGE + 17])
    pages = torch.full((3, PAGE, record_bytes(rank, rope)), 0xEE, dtype=torch.uint8)
    write_latents_fp8(pages, slots, c, k_pe, backend="reference")
    records = [record_by_hand(c[i].tolist(), k_pe[i]) for i in range(5)]
    found = pages.flatten(0, 1)
    assert [bytes(found[slot].tolist()) for slot in slots] == records
    untouched = torch.ones(3 * PAGE, dtype=torch.bool)
    untouched[slots] = False
    assert (found[untouched] == 0xEE).all()

    order = torch.tensor([3, 0, 0, 4])
    read = read_latents_fp8(pages, slots[order], rank, backend="reference")
    assert read.dtype == torch.float32
    assert read.tolist() == [widened_by_hand(records[i], rank) for i in order.tolist()]


def test_k_pe_is_rounded_to_bfloat16_and_not_quantised(generator: torch.Generator) -> None:
    c, k_pe = torch.zeros(2, RANK), torch.randn(2, ROPE, generator=generator) * 1e4
    pages = torch.zeros(1, PAGE, 656, dtype=torch.uint8)
    write_latents_fp8(pages, torch.tensor([0, 1]), c, k_pe, backend="reference")
    read = read_latents_fp8(pages, torch.tensor([0, 1]), RANK, backend="reference")
    assert torch.equal(read[:, RANK:], k_pe.bfloat16().float())


def test_no_tokens() -> None:
    pages = torch.full((1, PAGE, 656), 7, dtype=torch.uint8)
    none = torch.zeros(0, dtype=torch.int64)
    write_latents_fp8(pages, none, torch.zeros(0, RANK), torch.zeros(0, ROPE), backend="reference")
    assert (pages == 7).all()
    assert read_latents_fp8(pages, none, RANK, backend="reference").shape == (0, RANK + ROPE)


@pytest.mark.parametrize("rank", [44, 41, 42])
def test_one_record_of_any_rank(rank: int, generator: torch.Generator) -> None:
    """Its scales may begin where no fp32 can, and a slice of a single row counts as contiguous."""
    c, k_pe = random_latents(1, rank, 4, generator)
    pages = torch.zeros(1, PAGE, record_bytes(rank, 4), dtype=torch.uint8)
    write_latents_fp8(pages, torch.tensor([9]), c, k_pe, backend="reference")
    read = read_latents_fp8(pages, torch.tensor([9]), rank, backend="reference")
    assert read[0].tolist() == widened_by_hand(record_by_hand(c[0].tolist(), k_pe[0]), rank)


def test_refusals() -> None:
    pages, slots = torch.zeros(1, PAGE, 656, dtype=torch.uint8), torch.tensor([0])
    with pytest.raises(UnsupportedKernel, match=r"^write_latents_fp8: 656 bytes, not 654$"):
        write_latents_fp8(pages, slots, torch.zeros(1, 512), torch.zeros(1, 63), backend="reference")
    with pytest.raises(UnsupportedKernel, match=r"^write_latents_fp8: "):
        write_latents_fp8(pages, slots, torch.zeros(1, 512), torch.zeros(1, 64), backend="triton")
    with pytest.raises(UnsupportedKernel, match=r"^read_latents_fp8: "):
        read_latents_fp8(pages, slots, 512, backend="triton")

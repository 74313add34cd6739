"""The bytes of a message: round trips, pieces, and bytes that are none."""

import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.transport import message as module
from workers.transport.limits import MAX_RECORDS, Limits
from workers.transport.message import (
    ALIGNMENT,
    DTYPES,
    HEADER,
    MAGIC,
    RECORD,
    VERSION,
    Decoder,
    MalformedMessage,
    Message,
    encode,
)

LIMITS = Limits(message_bytes=2**16)


def a_message() -> Message:
    tensors = tuple(
        torch.arange(length, dtype=torch.uint8).repeat(dtype.itemsize).view(dtype)
        for length, dtype in enumerate(DTYPES, start=1)
    )
    return Message(3, tensors, epoch=2**40, step=5, sequence=2**63, layer=-1, budget_us=77)


def to_bytes(message: Message) -> bytes:
    return b"".join(encode(message, LIMITS))


def reader(data: bytes, sizes: list[int]) -> Callable[[memoryview], int]:
    """Gives the data in pieces of these sizes, then in one."""
    left = memoryview(data)
    pieces = iter(sizes)

    def read_into(view: memoryview) -> int:
        nonlocal left
        count = min(len(view), len(left), next(pieces, len(left)))
        view[:count] = left[:count]
        left = left[count:]
        return count

    return read_into


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def assert_same(found: Message | None, expected: Message) -> None:
    assert found is not None
    for field in ("kind", "epoch", "step", "sequence", "layer", "budget_us"):
        assert getattr(found, field) == getattr(expected, field)
    assert len(found.tensors) == len(expected.tensors)
    for one, other in zip(found.tensors, expected.tensors, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        assert torch.equal(bytes_of(one), bytes_of(other))


def test_layout_is_what_the_docstring_says() -> None:
    assert (HEADER.size, RECORD.size) == (64, 48)
    data = to_bytes(Message(3, (torch.tensor([[1, 2]], dtype=torch.int16),), epoch=9))
    assert data[:16] == MAGIC + struct.pack("<HHQ", VERSION, 3, 9)
    assert struct.unpack_from("<BB6x4QQ", data, 64) == (2, 2, 1, 2, 0, 0, 4)
    assert data[112:] == struct.pack("<2h", 1, 2).ljust(ALIGNMENT, b"\0")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.empty(3, 0, 5, dtype=torch.bfloat16),
        torch.tensor(2.5, dtype=torch.float64),
        torch.arange(24).view(2, 3, 4).transpose(0, 2),
        torch.arange(4096, dtype=torch.int16)[::3],
    ],
    ids=["empty", "empty 3d", "scalar", "transposed", "strided"],
)
def test_shapes(tensor: torch.Tensor) -> None:
    sent = Message(1, (tensor, tensor))
    assert_same(Decoder(LIMITS).pull(reader(to_bytes(sent), [])), sent)


def test_tensors_are_aligned_views_of_one_buffer() -> None:
    found = Decoder(LIMITS).pull(reader(to_bytes(a_message()), []))
    assert found is not None
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.tensors}) == 1
    assert all(tensor.data_ptr() % ALIGNMENT == 0 for tensor in found.tensors)


def test_contiguous_tensors_are_not_copied() -> None:
    tensor = torch.zeros(64)
    views = encode(Message(1, (tensor,)), LIMITS)
    tensor[0] = 1.0
    assert views[1][:4] == struct.pack("<f", 1.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=60), st.integers(1, 4))
def test_pieces_make_the_same_messages(sizes: list[int], count: int) -> None:
    decoder = Decoder(LIMITS)
    read_into = reader(to_bytes(a_message()) * count, sizes)
    for _ in range(count):
        assert_same(decoder.pull(read_into), a_message())
    assert decoder.pull(read_into) is None
    assert not decoder.has_staged


@pytest.mark.parametrize(
    "message",
    [
        Message(1, (torch.zeros(2**17),)),
        Message(1, (torch.zeros(1),) * (MAX_RECORDS + 1)),
        Message(1, (torch.zeros(1, dtype=torch.bool),)),
        Message(1, (torch.zeros(1, 1, 1, 1, 1),)),
        Message(1, (torch.zeros(1, device="meta"),)),
    ],
    ids=["bytes", "tensors", "dtype", "dimensions", "device"],
)
def test_what_cannot_travel_is_not_sent(message: Message) -> None:
    with pytest.raises(MalformedMessage):
        encode(message, LIMITS)


def with_field(offset: int, layout: str, value: int) -> bytes:
    data = bytearray(to_bytes(a_message()))
    struct.pack_into(layout, data, offset, value)
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        with_field(0, "<B", 0),
        with_field(4, "<H", VERSION + 1),
        with_field(36, "<H", MAX_RECORDS + 1),
        with_field(38, "<H", 1),
        with_field(40, "<Q", 2**16 + 64),
        with_field(40, "<Q", 2**63),
        with_field(56, "<Q", 1),
        with_field(64, "<B", len(DTYPES)),
        with_field(65, "<B", 5),
        with_field(66, "<B", 1),
        with_field(72, "<Q", 2**62),
        with_field(80, "<Q", 1),
        with_field(104, "<Q", 2),
    ],
)
def test_wrong_fields(data: bytes) -> None:
    with pytest.raises(MalformedMessage):
        Decoder(LIMITS).pull(reader(data, []))


def test_dimensions_beside_a_zero_are_bounded() -> None:
    """(0, 2**26, 2**26, 2**26) holds no bytes, and its strides overflow."""
    data = bytearray(to_bytes(Message(1, (torch.empty(0, 1, 1, 1),))))
    struct.pack_into("<4Q", data, 72, 0, 2**26, 2**26, 2**26)
    with pytest.raises(MalformedMessage):
        Decoder(LIMITS).pull(reader(bytes(data), []))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_fuzzed_bytes(data: st.DataObject) -> None:
    """Some bytes of the head are replaced: a message or the typed error, and no memory beyond the limit."""
    wire = bytearray(to_bytes(a_message()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, HEADER.size + 3 * RECORD.size))
        wire[place] = data.draw(st.integers(0, 255))
    taken: list[int] = []
    real_empty = torch.empty

    def counted(shape: Any, **options: Any) -> torch.Tensor:
        tensor = real_empty(shape, **options)
        taken.append(tensor.nbytes)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.torch, "empty", counted)
        try:
            Decoder(LIMITS).pull(reader(bytes(wire), []))
        except MalformedMessage:
            assert sum(taken) <= LIMITS.message_bytes
    assert sum(taken) <= LIMITS.message_bytes


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=400), st.booleans())
def test_noise(noise: bytes, has_header: bool) -> None:
    head = to_bytes(a_message())[:40] if has_header else b""
    decoder = Decoder(LIMITS)
    try:
        found = decoder.pull(reader(head + noise, []))
    except MalformedMessage:
        return
    assert found is None or found.num_bytes <= LIMITS.message_bytes

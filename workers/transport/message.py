"""A message and its bytes: a fixed header, a fixed record for each tensor, and the tensors.

Everything is little-endian. `kind`, `step`, `sequence` and `layer` are the users'; the transport only carries
them.

    header, 64 bytes                         record of a tensor, 48 bytes
    0   4  magic "8FLD"                      0   1  dtype code (`DTYPES`)
    4   2  version                           1   1  number of dimensions, 0 to 4
    6   2  kind                              2   6  zero
    8   8  epoch of the placement            8  32  4 x 8: shape, zero beyond its dimensions
    16  8  step                              40  8  bytes of data
    24  8  sequence (a reply repeats it)
    32  4  layer, signed                     then the data of each tensor in turn, each padded with
    36  2  number of tensors                 zeros to a multiple of 64 bytes
    38  2  zero
    40  8  bytes after the records
    48  8  budget: microseconds that the sender still has; 0: none given
    56  8  zero

A receiver believes nothing: every field is checked before memory is taken for it, and the memory is what the
header's own limit allows. Decoded tensors are views on one receive buffer, each aligned to 64 bytes.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from workers.transport.limits import MAX_RECORDS, Limits

VERSION = 1
MAGIC = b"8FLD"
HEADER = struct.Struct("<4sHHQQQiHHQQQ")
RECORD = struct.Struct("<BB6s4QQ")
MAX_DIMS = 4
ALIGNMENT = 64
STAGING_BYTES = 4096  # holds any header with its records, and whole messages that are small

# The codes are part of the format: append, never renumber. bool is missing because a byte that is neither 0
# nor 1 has no meaning there.
DTYPES: tuple[torch.dtype, ...] = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_CODES = {dtype: code for code, dtype in enumerate(DTYPES)}
_UNKNOWN_TO_NUMPY = frozenset({torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2})
_NO_PADDING = b"\0" * 6
_ZEROS = memoryview(bytes(ALIGNMENT))

ReadInto = Callable[[memoryview], int]
"""Fills the beginning of a view and says how many bytes; 0 when there is nothing now."""


class TransportError(Exception):
    """Base of what can go wrong between peers."""


class MalformedMessage(TransportError):
    """Bytes that are no message, or a message beyond the limits.

    Args:
        problem: the first field that was wrong.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(problem)
        self.problem = problem


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors and the numbers that say what they are for."""

    kind: int
    tensors: tuple[Tensor, ...] = ()
    epoch: int = 0
    step: int = 0
    sequence: int = 0
    layer: int = 0
    budget_us: int = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def check(message: Message, limits: Limits) -> int:
    """The bytes of a message's tensors with their padding.

    Raises:
        MalformedMessage: a tensor that cannot travel, or more than the limits allow.
    """
    if len(message.tensors) > min(limits.tensors, MAX_RECORDS):
        raise MalformedMessage(f"{len(message.tensors)} tensors, limit {limits.tensors}")
    total = 0
    for tensor in message.tensors:
        if tensor.dtype not in _CODES or tensor.ndim > MAX_DIMS or not tensor.is_cpu:
            raise MalformedMessage(f"cannot send {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
        size = tensor.nbytes
        total += size + -size % ALIGNMENT
    if total > limits.message_bytes:
        raise MalformedMessage(f"{total} bytes, limit {limits.message_bytes}")
    return total


def encode(message: Message, limits: Limits) -> list[memoryview]:
    """The bytes of a message as views in order; those of contiguous tensors are the tensors' own memory.

    Raises:
        MalformedMessage: as `check`.
    """
    total = check(message, limits)
    head = [
        HEADER.pack(
            MAGIC,
            VERSION,
            message.kind,
            message.epoch,
            message.step,
            message.sequence,
            message.layer,
            len(message.tensors),
            0,
            total,
            message.budget_us,
            0,
        )
    ]
    views: list[memoryview] = [_ZEROS]  # the first place is for header and records
    for tensor in message.tensors:
        size = tensor.nbytes
        shape = (*tensor.shape, 0, 0, 0, 0)[:MAX_DIMS]
        head.append(RECORD.pack(_CODES[tensor.dtype], tensor.ndim, _NO_PADDING, *shape, size))
        if size:
            views.append(_bytes_of(tensor))
            if padding := -size % ALIGNMENT:
                views.append(_ZEROS[:padding])
    views[0] = memoryview(b"".join(head))
    return views


def _bytes_of(tensor: Tensor) -> memoryview:
    """A tensor's memory, or that of a copy if it is not contiguous."""
    if not tensor.ndim or not tensor.is_contiguous():
        tensor = tensor.contiguous().view(-1)
    if tensor.dtype in _UNKNOWN_TO_NUMPY:
        tensor = tensor.view(torch.uint8)
    return tensor.numpy().data.cast("B")


_Place = tuple[torch.dtype, tuple[int, ...], int, int]
"""dtype, shape, first byte, bytes."""


class _Opened:
    """A message of which header and records are known."""

    __slots__ = ("_body", "_kind", "_numbers", "_places", "filled", "view")

    def __init__(self, kind: int, numbers: tuple[int, ...], places: list[_Place], total: int) -> None:
        self._kind, self._numbers, self._places = kind, numbers, places
        self._body = torch.empty(total, dtype=torch.uint8)
        self.view: memoryview = self._body.numpy().data
        self.filled = 0

    def finish(self) -> Message:
        return Message(self._kind, tuple([self._tensor(*place) for place in self._places]), *self._numbers)

    def _tensor(self, dtype: torch.dtype, shape: tuple[int, ...], start: int, size: int) -> Tensor:
        if not size:
            return torch.empty(shape, dtype=dtype)
        part = self._body if size == len(self.view) else self._body[start : start + size]
        return part.view(dtype).view(shape) if len(shape) != 1 else part.view(dtype)


class Decoder:
    """Messages out of a stream of bytes, whatever the pieces in which it comes."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._staging = memoryview(bytearray(STAGING_BYTES))
        self._start = self._stop = 0  # staged bytes that are not yet consumed
        self._opened: _Opened | None = None

    @property
    def has_staged(self) -> bool:
        """Whether the next message, or a piece of it, was read already."""
        return self._stop > self._start

    def pull(self, read_into: ReadInto) -> Message | None:
        """The next whole message, or None when the source has nothing more now.

        Raises:
            MalformedMessage: the stream is of no further use.
        """
        while True:
            opened = self._opened
            if opened is None:
                if not self._open():
                    count = read_into(self._staging[self._stop :])
                    if count == 0:
                        return None
                    self._stop += count
            elif opened.filled == len(opened.view):
                self._opened = None
                return opened.finish()
            else:
                count = read_into(opened.view[opened.filled :])
                if count == 0:
                    return None
                opened.filled += count

    def _open(self) -> bool:
        """Take header and records from the staged bytes, if they are all there."""
        staged = self._stop - self._start
        if staged >= HEADER.size and self._take_head(staged):
            return True
        if self._start:  # room for the rest of the header
            self._staging[:staged] = bytes(self._staging[self._start : self._stop])
            self._start, self._stop = 0, staged
        return False

    def _take_head(self, staged: int) -> bool:
        """Check a header and its records; whether the records are all there."""
        magic, version, kind, epoch, step, sequence, layer, num_tensors, zero, total, budget_us, zeros = (
            HEADER.unpack_from(self._staging, self._start)
        )
        if magic != MAGIC:
            raise MalformedMessage(f"magic {magic!r}")
        if version != VERSION:
            raise MalformedMessage(f"version {version}, this is {VERSION}")
        if num_tensors > min(self._limits.tensors, MAX_RECORDS):
            raise MalformedMessage(f"{num_tensors} tensors, limit {self._limits.tensors}")
        if total > self._limits.message_bytes:
            raise MalformedMessage(f"{total} bytes, limit {self._limits.message_bytes}")
        if zero or zeros:
            raise MalformedMessage("header bytes that should be zero")
        needed = HEADER.size + num_tensors * RECORD.size
        if staged < needed:
            return False
        places = self._read_records(num_tensors, total)
        opened = _Opened(kind, (epoch, step, sequence, layer, budget_us), places, total)
        start = self._start + needed
        count = min(self._stop - start, total)
        opened.view[:count] = self._staging[start : start + count]
        opened.filled = count
        self._opened, self._start = opened, start + count
        if self._start == self._stop:
            self._start = self._stop = 0
        return True

    def _read_records(self, num_tensors: int, total: int) -> list[_Place]:
        places: list[_Place] = []
        place, end = self._start + HEADER.size, 0
        for _ in range(num_tensors):
            code, num_dims, zeros, *numbers, size = RECORD.unpack_from(self._staging, place)
            place += RECORD.size
            if code >= len(DTYPES):
                raise MalformedMessage(f"dtype code {code}")
            if num_dims > MAX_DIMS or zeros != _NO_PADDING or any(numbers[num_dims:]):
                raise MalformedMessage(f"shape of {num_dims} dimensions")
            dtype, shape = DTYPES[code], tuple(numbers[:num_dims])
            count = extent = 1
            for length in shape:
                count *= length
                extent *= length or 1  # also beside a zero: torch multiplies all of them for its strides
            if extent * dtype.itemsize > self._limits.message_bytes:
                raise MalformedMessage(f"shape {shape}, limit {self._limits.message_bytes} bytes")
            if count * dtype.itemsize != size:
                raise MalformedMessage(f"shape {shape} of {dtype} does not take {size} bytes")
            places.append((dtype, shape, end, size))
            end += size + -size % ALIGNMENT
        if end != total:
            raise MalformedMessage(f"tensors take {end} bytes, the header says {total}")
        return places

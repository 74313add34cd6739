"""The header of one safetensors file, checked before a byte of its data is used.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, the header as JSON
(name -> dtype, shape, data_offsets), then the data that the offsets tile without gap or overlap.
"""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.config import parse_json, shown
from model.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_MAX_NAME_CHARS = 256
_MAX_DIMENSIONS = 8
_MAX_ELEMENTS = 1 << 48
_PICKLE_STARTS = (b"PK", b"\x80")  # torch.save's zip archive, and a bare pickle
_DTYPE_BITS = {
    "F8_E4M3": 8, "F8_E5M2": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the file's data.

    `data_start` is that start, counted from the start of the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    data_start: int

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Parse and check the header of one file.

    Raises:
        CheckpointError: naming the file, the tensor, what was expected and what was found.
    """
    name = path.name
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
            limit = min(size - 8, MAX_HEADER_BYTES)
            raw = file.read(length) if length <= limit else b""
    except OSError as error:
        raise CheckpointError(name, "", "a readable file", error.strerror or "an error") from None
    # A good header's length may start with the very bytes that pickles start with: the brace decides.
    if not raw.startswith(b"{") and prefix.startswith(_PICKLE_STARTS):
        raise CheckpointError(name, "", "a safetensors file", "a pickle, which is never loaded")
    if len(prefix) < 8:
        raise CheckpointError(name, "", "a header length of 8 bytes", f"{len(prefix)} bytes in all")
    if length > limit:
        found = f"{length} (truncated, or not a safetensors file)"
        raise CheckpointError(name, "", f"at most {limit} bytes of header", found)
    header = parse_json(name, raw)
    if not isinstance(header, dict):
        raise CheckpointError(name, "", "a JSON object as header", type(header).__name__)
    header.pop("__metadata__", None)
    tensors = {key: _entry(name, key, value, 8 + length) for key, value in header.items()}
    _check_tiling(name, tensors, size - 8 - length)
    return tensors


def check_name(file: str, name: str) -> None:
    """Refuse a tensor name that cannot stand in one line of a message."""
    if not name.isprintable() or not 0 < len(name) <= _MAX_NAME_CHARS:
        expected = f"tensor names of 1 to {_MAX_NAME_CHARS} printable characters"
        raise CheckpointError(file, "", expected, shown(name))


def _entry(file: str, name: str, entry: Any, data_start: int) -> StoredTensor:
    def is_sizes(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) <= _MAX_DIMENSIONS
            and all(type(size) is int and size >= 0 for size in value)
        )

    check_name(file, name)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(file, name, "dtype, shape and data_offsets", shown(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(file, name, f"a dtype out of {', '.join(_DTYPE_BITS)}", shown(dtype))
    if not is_sizes(shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise CheckpointError(file, name, "a shape of non-negative sizes", shown(shape))
    if not is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(file, name, "two data offsets", shown(offsets))
    expected = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        found = f"{shown(offsets[1] - offsets[0])} between its offsets"
        raise CheckpointError(file, name, f"{expected} bytes for {dtype} {shown(shape)}", found)
    return StoredTensor(file, dtype, tuple(shape), offsets[0], offsets[1], data_start)


def _check_tiling(file: str, tensors: dict[str, StoredTensor], data_bytes: int) -> None:
    cursor = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != cursor:
            found = f"{'an overlap' if tensor.begin < cursor else 'a hole'}: {shown(tensor.begin)}"
            raise CheckpointError(file, name, f"data that begins at byte {cursor}", found)
        cursor = tensor.end
    if cursor != data_bytes:
        raise CheckpointError(
            file, "", f"{cursor} bytes of data", f"{data_bytes} (truncated or not all described)"
        )

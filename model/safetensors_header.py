"""The header of one safetensors file, checked before a byte of its data is used.

Format (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, the header as JSON
(name -> dtype, shape, data_offsets), then the data that the offsets tile without gap or overlap.
"""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.errors import CheckpointError

MAX_HEADER_BYTES = 100_000_000
_MAX_ELEMENTS = 1 << 48
_DTYPE_BITS = {
    "F8_E4M3": 8, "F8_E5M2": 8, "BF16": 16, "F16": 16, "F32": 32, "F64": 64,
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `begin` and `end` count bytes from the start of the file's data."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

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
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix[:2] == b"PK" or prefix[:1] == b"\x80":
                raise CheckpointError(name, "", "a safetensors file", "a pickle, which is never loaded")
            if len(prefix) < 8:
                raise CheckpointError(name, "", "a header length of 8 bytes", f"{len(prefix)} bytes in all")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(size - 8, MAX_HEADER_BYTES):
                limit = f"at most {min(size - 8, MAX_HEADER_BYTES)} bytes of header"
                raise CheckpointError(name, "", limit, f"{length} (truncated, or not a safetensors file)")
            header = _parse(name, file.read(length))
    except OSError as error:
        raise CheckpointError(name, "", "a readable file", error.strerror or "an error") from None
    header.pop("__metadata__", None)
    tensors = {key: _entry(name, key, value) for key, value in header.items()}
    _check_tiling(name, tensors, size - 8 - length)
    return tensors


def _parse(file: str, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(file, twice, "each name once in the header", "the name twice")
        return result

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError):
        raise CheckpointError(file, "", "a header in JSON", f"bytes that start {raw[:16]!r}") from None
    if not isinstance(header, dict):
        raise CheckpointError(file, "", "a JSON object as header", type(header).__name__)
    return header


def _entry(file: str, name: str, entry: Any) -> StoredTensor:
    def is_sizes(value: Any) -> bool:
        return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(file, name, "dtype, shape and data_offsets", f"{json.dumps(entry)[:80]}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise CheckpointError(file, name, f"a dtype out of {', '.join(_DTYPE_BITS)}", f"{dtype!r}")
    if not is_sizes(shape) or math.prod(shape) > _MAX_ELEMENTS:
        raise CheckpointError(file, name, "a shape of non-negative sizes", f"{shape!r}"[:80])
    if not is_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(file, name, "two data offsets", f"{offsets!r}"[:80])
    expected = math.prod(shape) * _DTYPE_BITS[dtype] // 8
    if offsets[1] - offsets[0] != expected:
        found = f"{offsets[1] - offsets[0]} between its offsets"
        raise CheckpointError(file, name, f"{expected} bytes for {dtype} {shape}", found)
    return StoredTensor(file, dtype, tuple(shape), offsets[0], offsets[1])


def _check_tiling(file: str, tensors: dict[str, StoredTensor], data_bytes: int) -> None:
    cursor = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != cursor:
            kind = "an overlap" if tensor.begin < cursor else "a hole"
            raise CheckpointError(file, name, f"data that begins at byte {cursor}", f"{kind}: {tensor.begin}")
        cursor = tensor.end
    if cursor != data_bytes:
        raise CheckpointError(
            file, "", f"{cursor} bytes of data", f"{data_bytes} (truncated or not all described)"
        )

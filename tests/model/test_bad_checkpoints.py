"""Checkpoints whose files, headers or index are bad, each refused by a line that says what is wrong."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from tests.model.bad_checkpoints import (
    FIRST,
    INDEX,
    ITS_SHARD,
    NORM,
    SECOND,
    Bad,
    assert_refused,
    by_place,
    edit_json,
    only_file,
    promised_shard,
    raw,
    write,
    write_raw,
)
from tests.model.bad_checkpoints import directory as directory
from tests.model.bad_checkpoints import good as good

pytestmark = pytest.mark.usefixtures("one_thread")


# --- spoiling a shard and its header --------------------------------------------------------------


def truncate(file: str, keep: float) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / file, int((directory / file).stat().st_size * keep))


def header_length(length: int, grow_to: int = 0) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        header, data = raw(directory / FIRST)
        (directory / FIRST).write_bytes(struct.pack("<Q", length) + header + data)
        if grow_to:
            os.truncate(directory / FIRST, grow_to)  # a hole in the file: nothing is stored

    return spoil


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    header, data = raw(path)
    entries = json.loads(header)
    edit(entries)
    write_raw(path, json.dumps(entries).encode(), data)


def header(content: bytes) -> Callable[[Path], None]:
    return lambda directory: write_raw(directory / FIRST, content, raw(directory / FIRST)[1])


def duplicate_header_name(directory: Path) -> None:
    content, data = raw(directory / FIRST)
    name = by_place(json.loads(content))[0]
    entry = json.dumps(json.loads(content)[name])
    write_raw(directory / FIRST, f'{{"{name}": {entry}, '.encode() + content[1:], data)


def edit_entry(path: Path, position: int, **changes: Any) -> None:
    """Change the header's entry of the tensor at one place of the file's data."""

    def edit(entries: dict[str, Any]) -> None:
        entries[by_place(entries)[position]].update(changes)

    edit_header(path, edit)


def entry(position: int, **changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_entry(directory / FIRST, position, **changes)


def shift(position: int, num_bytes: int) -> Callable[[Path], None]:
    """One tensor's place moves, its size stays."""

    def spoil(directory: Path) -> None:
        def edit(entries: dict[str, Any]) -> None:
            begin, end = entries[by_place(entries)[position]]["data_offsets"]
            entries[by_place(entries)[position]]["data_offsets"] = [begin + num_bytes, end + num_bytes]

        edit_header(directory / FIRST, edit)

    return spoil


def swap_offsets(directory: Path) -> None:
    def edit(entries: dict[str, Any]) -> None:
        entries[by_place(entries)[0]]["data_offsets"].reverse()

    edit_header(directory / FIRST, edit)


def forget_shape(directory: Path) -> None:
    def edit(entries: dict[str, Any]) -> None:
        del entries[by_place(entries)[0]]["shape"]

    edit_header(directory / FIRST, edit)


def rename_tensor(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        def edit(entries: dict[str, Any]) -> None:
            entries[name] = entries.pop(by_place(entries)[0])

        edit_header(directory / FIRST, edit)

    return spoil


def append(directory: Path) -> None:
    with (directory / FIRST).open("ab") as file:
        file.write(b"\0" * 16)


# --- spoiling the index and what it names ---------------------------------------------------------


def rename_in_index(file: str) -> Callable[[Path], None]:
    """The index names another file in place of the first shard."""

    def spoil(directory: Path) -> None:
        def edit(index: dict[str, Any]) -> None:
            weights = index["weight_map"]
            index["weight_map"] = {name: file if held == FIRST else held for name, held in weights.items()}

        edit_json(directory / INDEX, edit)

    return spoil


def link_out(directory: Path) -> None:
    (directory / FIRST).rename(directory.parent / "elsewhere.safetensors")
    (directory / FIRST).symlink_to(directory.parent / "elsewhere.safetensors")


def in_both_shards(directory: Path) -> None:
    first = load_file(directory / FIRST)
    first[NORM] = torch.ones(160)
    second = load_file(directory / SECOND)
    second[NORM] = torch.ones(160)
    save_file(first, directory / FIRST)
    save_file(second, directory / SECOND)


def lost_from_its_shard(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        file = promised_shard(directory, name)
        held = load_file(directory / file)
        del held[name]
        save_file(held, directory / file)

    return spoil


def promised_to_the_other_shard(name: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        other = SECOND if promised_shard(directory, name) == FIRST else FIRST
        edit_json(directory / INDEX, lambda index: index["weight_map"].update({name: other}))

    return spoil


def promised_to_no_name(name: str) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / INDEX, lambda index: index["weight_map"].update({name: 3}))


# --- the bad ones ---------------------------------------------------------------------------------

BAD: dict[str, Bad] = {
    # The file as a whole
    "truncated data": Bad(
        truncate(FIRST, 0.5), FIRST, "", "bytes of data", "(truncated or not all described)"
    ),
    "truncated header": Bad(truncate(FIRST, 0.01), FIRST, "", "bytes of header", "(truncated, or"),
    "truncated length": Bad(write(FIRST, b"\x10\0\0"), FIRST, "", "a header length of 8 bytes", "3 bytes"),
    "empty file": Bad(write(FIRST, b""), FIRST, "", "a header length of 8 bytes", "0 bytes in all"),
    "bytes after the last tensor": Bad(append, FIRST, "", "bytes of data", "not all described"),
    "zip pickle under a good name": Bad(
        write(FIRST, b"PK\x03\x04" + b"\0" * 60), FIRST, "", "a safetensors file", "a pickle"
    ),
    "bare pickle under a good name": Bad(
        write(FIRST, b"\x80\x04\x95" + b"\xff" * 60), FIRST, "", "a safetensors file", "a pickle"
    ),
    "short pickle under a good name": Bad(
        write(FIRST, b"\x80\x02]."), FIRST, "", "a safetensors file", "a pickle"
    ),
    # The header
    "header longer than the file": Bad(
        header_length(1 << 40), FIRST, "", "at most ", f"{1 << 40} (truncated, or not a safetensors file)"
    ),
    "header over the cap": Bad(
        header_length(100_000_001, grow_to=200_000_000), FIRST, "", "at most 100000000 bytes", "100000001 ("
    ),
    "header not JSON": Bad(header(b"{" + b"\0" * 31), FIRST, "", "JSON", r"bytes that start b'{\x00"),
    "header not UTF-8": Bad(header(b'{"\xff": 1}'), FIRST, "", "JSON", "bytes that start"),
    "header empty": Bad(header(b""), FIRST, "", "JSON", "bytes that start b''"),
    "header a list": Bad(header(b"[1, 2]"), FIRST, "", "a JSON object as header", "list"),
    "header nested without end": Bad(header(b'{"a":' + b"[" * 50_000), FIRST, "", "JSON", "recursion"),
    "header with a huge number": Bad(header(b'{"a":' + b"9" * 5000 + b"}"), FIRST, "", "JSON", "4300 digits"),
    "name twice": Bad(duplicate_header_name, FIRST, "FIRST_TENSOR", "each name once", "the name twice"),
    "name of two lines": Bad(rename_tensor("a\nb"), FIRST, "", "printable characters", r'"a\nb"'),
    "name of a lone surrogate": Bad(rename_tensor("\ud800"), FIRST, "", "printable", r'"\ud800"'),
    "name without end": Bad(rename_tensor("a" * 5000), FIRST, "", "1 to 256 printable", "aaaaaa"),
    "name empty": Bad(rename_tensor(""), FIRST, "", "1 to 256 printable", '""'),
    "overlapping offsets": Bad(
        shift(1, -4), FIRST, "SECOND_TENSOR", "data that begins at byte", "an overlap"
    ),
    "hole between tensors": Bad(shift(1, 4), FIRST, "SECOND_TENSOR", "data that begins at byte", "a hole"),
    "hole before the first": Bad(shift(0, 4), FIRST, "FIRST_TENSOR", "begins at byte 0", "a hole: 4"),
    "offsets beyond the file": Bad(shift(0, 1 << 40), FIRST, "SECOND_TENSOR", "begins at byte 0", "a hole"),
    "negative offsets": Bad(
        entry(0, data_offsets=[-4, 4]), FIRST, "FIRST_TENSOR", "two data offsets", "[-4, 4]"
    ),
    "three offsets": Bad(entry(0, data_offsets=[0, 4, 8]), FIRST, "FIRST_TENSOR", "two data", "[0, 4, 8]"),
    "reversed offsets": Bad(swap_offsets, FIRST, "FIRST_TENSOR", "bytes for", "between its offsets"),
    "offsets that contradict the shape": Bad(
        entry(0, data_offsets=[0, 12]), FIRST, "FIRST_TENSOR", "bytes for", "12 between its offsets"
    ),
    "unknown dtype": Bad(entry(0, dtype="F4"), FIRST, "FIRST_TENSOR", "a dtype out of F8_E4M3", '"F4"'),
    "dtype not text": Bad(entry(0, dtype=[8]), FIRST, "FIRST_TENSOR", "a dtype out of F8_E4M3", "[8]"),
    "negative shape": Bad(entry(0, shape=[-1, 8]), FIRST, "FIRST_TENSOR", "non-negative sizes", "[-1, 8]"),
    "fractional shape": Bad(entry(0, shape=[1.5]), FIRST, "FIRST_TENSOR", "non-negative sizes", "[1.5]"),
    "boolean shape": Bad(entry(0, shape=[True]), FIRST, "FIRST_TENSOR", "non-negative sizes", "[true]"),
    "shape beyond all memory": Bad(
        entry(0, shape=[1 << 62, 1 << 62]), FIRST, "FIRST_TENSOR", "non-negative sizes", "[46116860"
    ),
    "shape without end": Bad(entry(0, shape=[1] * 500), FIRST, "FIRST_TENSOR", "non-negative", "[1, 1"),
    "no shape": Bad(forget_shape, FIRST, "FIRST_TENSOR", "dtype, shape and data_offsets", '{"dtype"'),
    "entry a number": Bad(header(b'{"a": 1}'), FIRST, "a", "dtype, shape and data_offsets", "1"),
    # The index, and the files that it names
    "index not JSON": Bad(write(INDEX, b"{"), INDEX, "", "JSON", "bytes that start b'{'"),
    "index a list": Bad(write(INDEX, b"[]"), INDEX, "weight_map", "an object", "null"),
    "index without a weight_map": Bad(write(INDEX, b"{}"), INDEX, "weight_map", "an object", "null"),
    "index of nothing": Bad(write(INDEX, b'{"weight_map": {}}'), INDEX, "weight_map", "the names", "none"),
    "index that names a tensor twice": Bad(
        write(INDEX, b'{"weight_map": {"a": "b", "a": "c"}}'), INDEX, "a", "each name once", "the name twice"
    ),
    "index with a number for a file": Bad(promised_to_no_name(NORM), INDEX, NORM, "the name of a", "3"),
    "index with a name of two lines": Bad(
        write(INDEX, b'{"weight_map": {"a\\nb": "c"}}'), INDEX, "", "printable characters", r'"a\nb"'
    ),
    "index naming an absent file": Bad(
        rename_in_index("model-00003-of-00002.safetensors"),
        "model-00003-of-00002.safetensors",
        "",
        "a shard that the index names",
        "no such file",
    ),
    "index leading upwards": Bad(
        rename_in_index(f"../checkpoint/{FIRST}"), INDEX, "weight_map", "plain file names", '"../checkpoint/'
    ),
    "index with an absolute path": Bad(
        rename_in_index("/etc/passwd"), INDEX, "weight_map", "plain file names", '"/etc/passwd"'
    ),
    "index naming the directory": Bad(rename_in_index(".."), INDEX, "weight_map", "plain file names", '".."'),
    "index naming a file of two lines": Bad(
        rename_in_index("a\nb.safetensors"), INDEX, "weight_map", "plain file names", r'"a\nb.safetensors"'
    ),
    "index naming a file with NUL": Bad(
        rename_in_index("a\0.safetensors"), INDEX, "weight_map", "plain file names", r'"a\u0000.safetensors"'
    ),
    "index naming a file too long for any disk": Bad(
        rename_in_index("é" * 200 + ".safetensors"), "é" * 200 + ".safetensors", "", "a shard", "no such file"
    ),
    "index naming a pickle": Bad(
        rename_in_index("pytorch_model.bin"), INDEX, "weight_map", "safetensors files", '"pytorch_model.bin"'
    ),
    "index promising what the shard lacks": Bad(
        lost_from_its_shard(NORM), ITS_SHARD, NORM, "a tensor that the index promises", "no such tensor"
    ),
    "index naming the wrong shard": Bad(
        promised_to_the_other_shard(NORM),
        ITS_SHARD,
        NORM,
        "a tensor that the index promises",
        "no such tensor",
    ),
    "tensor in two shards": Bad(
        in_both_shards, SECOND, NORM, "each tensor in one shard", f"it in {FIRST} too"
    ),
    "link out of the directory": Bad(
        link_out, FIRST, "", "a file of the checkpoint's directory", "a link that leads out of it"
    ),
    "only a pickle": Bad(
        only_file("pytorch_model.bin"),
        "checkpoint",
        "",
        f"{INDEX} or model.safetensors",
        '"pytorch_model.bin", a pickle, which is never loaded',
    ),
    "no weights": Bad(only_file(""), "checkpoint", "", f"{INDEX} or model.safetensors", "neither"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_refused(kind: str, directory: Path) -> None:
    assert_refused(BAD[kind], directory)


def test_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(tmp_path / "nowhere")
    assert str(caught.value) == "nowhere: expected a checkpoint directory, found no such directory"


def test_a_missing_tensor_of_a_single_file_names_that_file(directory: Path) -> None:
    tensors = {**load_file(directory / FIRST), **load_file(directory / SECOND)}
    del tensors[NORM]
    only_file("")(directory)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory)
    assert (caught.value.file, caught.value.what) == ("model.safetensors", NORM)

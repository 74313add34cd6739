"""Bad checkpoints, each refused before any forward pass by a line that says what is wrong; and good ones."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoint import (
    Checkpoint,
    Weights,
    all_but_routed_experts,
    everything,
    routed_experts,
)
from model.errors import CheckpointError
from model.layout import TensorSpec, layout
from model.safetensors_header import read_header
from tests.checkpoints import DEMO, facts, fp8_facts, write_checkpoint, write_tensors
from tests.e4m3 import VALUES

pytestmark = pytest.mark.usefixtures("one_thread")

INDEX, SUMS = "model.safetensors.index.json", "SHA256SUMS"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MATRIX = "model.layers.1.self_attn.q_a_proj.weight"  # e4m3, with scales
SCALES = f"{MATRIX}_scale_inv"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
NORM = "model.norm.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MTP = "model.layers.2"
ITS_SHARD = "the shard that holds the tensor"

SMALL = {
    "vocab_size": 40,
    "hidden_size": 160,  # one whole block of 128 and a short one
    "num_hidden_layers": 2,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 2 layers and an MTP layer in e4m3 blocks, in two shards. Not to be written to."""
    return write_checkpoint(tmp_path_factory.mktemp("good") / "checkpoint", fp8_facts(**SMALL))


@pytest.fixture
def directory(good: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(good, tmp_path / "checkpoint")


# --- spoiling files -------------------------------------------------------------------------------


def raw(path: Path) -> tuple[bytes, bytes]:
    """A shard's header and data."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    return content[8 : 8 + length], content[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    header, data = raw(path)
    entries = json.loads(header)
    edit(entries)
    write_raw(path, json.dumps(entries).encode(), data)


def edit_entry(path: Path, position: int, **changes: Any) -> None:
    """Change the header's entry of the tensor at one place of the file's data."""

    def edit(entries: dict[str, Any]) -> None:
        entries[by_place(entries)[position]].update(changes)

    edit_header(path, edit)


def by_place(entries: dict[str, Any]) -> list[str]:
    names = [name for name in entries if name != "__metadata__"]
    return sorted(names, key=lambda name: entries[name]["data_offsets"])


def name_at(directory: Path, position: int) -> str:
    return by_place(json.loads(raw(directory / FIRST)[0]))[position]


def edit_json(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def promised_shard(directory: Path, name: str) -> str:
    """Where the index says that a tensor is."""
    file: str = json.loads((directory / INDEX).read_text())["weight_map"][name]
    return file


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Write all shards and the index again, with other tensors."""
    tensors = {**load_file(directory / FIRST), **load_file(directory / SECOND)}
    edit(tensors)
    write_tensors(directory, tensors)


def drop(*parts: str) -> Callable[[Path], None]:
    """Every tensor whose name contains one of the parts is missing."""

    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if any(part in name for part in parts)]:
                del tensors[name]

        edit_tensors(directory, edit)

    return spoil


def double(part: str, copied: str) -> Callable[[Path], None]:
    """Every tensor whose name contains `part` stands there twice, as `copied` too."""

    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if part in name]:
                tensors[name.replace(part, copied)] = tensors[name].clone()

        edit_tensors(directory, edit)

    return spoil


def replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        def edit(tensors: dict[str, Tensor]) -> None:
            tensors[name] = change(tensors[name]).contiguous()

        edit_tensors(directory, edit)

    return spoil


def put(name: str, *values: float, at: int = -1) -> Callable[[Path], None]:
    """Single values of one tensor are others: the last ones, or those from `at` on."""

    def change(tensor: Tensor) -> Tensor:
        flat = tensor.clone().flatten()
        start = len(flat) - len(values) if at < 0 else at
        flat[start : start + len(values)] = torch.tensor(values).to(tensor.dtype)
        return flat.view(tensor.shape)

    return replace(name, change)


def configure(**changes: Any) -> Callable[[Path], None]:
    return lambda directory: edit_json(directory / "config.json", lambda config: config.update(changes))


def rename_in_index(file: str) -> Callable[[Path], None]:
    """The index names another file in place of the first shard."""

    def spoil(directory: Path) -> None:
        def edit(index: dict[str, Any]) -> None:
            weights = index["weight_map"]
            index["weight_map"] = {name: file if held == FIRST else held for name, held in weights.items()}

        edit_json(directory / INDEX, edit)

    return spoil


def write(file: str, content: bytes) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        (directory / file).write_bytes(content)

    return spoil


def only_file(file: str) -> Callable[[Path], None]:
    """Neither an index nor shards, but one file."""

    def spoil(directory: Path) -> None:
        for path in (INDEX, FIRST, SECOND):
            (directory / path).unlink()
        if file:
            (directory / file).write_bytes(b"PK\x03\x04")

    return spoil


def truncate(file: str, keep: float) -> Callable[[Path], None]:
    return lambda directory: os.truncate(directory / file, int((directory / file).stat().st_size * keep))


def header_length(length: int, grow_to: int = 0) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        header, data = raw(directory / FIRST)
        (directory / FIRST).write_bytes(struct.pack("<Q", length) + header + data)
        if grow_to:
            os.truncate(directory / FIRST, grow_to)  # a hole in the file: nothing is stored

    return spoil


def header(content: bytes) -> Callable[[Path], None]:
    return lambda directory: write_raw(directory / FIRST, content, raw(directory / FIRST)[1])


def duplicate_header_name(directory: Path) -> None:
    content, data = raw(directory / FIRST)
    name = by_place(json.loads(content))[0]
    entry = json.dumps(json.loads(content)[name])
    write_raw(directory / FIRST, f'{{"{name}": {entry}, '.encode() + content[1:], data)


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


def wrong_sum(file: str) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        sums = {
            name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
            for name in (FIRST, SECOND, file)
        }
        sums[file] = "0" * 64
        (directory / SUMS).write_text("".join(f"{digest}  {name}\n" for name, digest in sums.items()))

    return spoil


# --- the bad ones ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bad:
    """One way to spoil a checkpoint, and the parts of the error that has to come of it.

    ITS_SHARD stands for a file name, FIRST_TENSOR and SECOND_TENSOR for names by place in the first shard.
    """

    spoil: Callable[[Path], None]
    file: str
    what: str
    expected: str
    found: str
    found_by: str = "open"


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
    # The tensors against the configuration
    "bf16 where fp8 is due": Bad(
        replace(MATRIX, lambda tensor: tensor.bfloat16()), ITS_SHARD, MATRIX, "dtype F8_E4M3", "BF16"
    ),
    "other fp8": Bad(
        replace(MATRIX, lambda tensor: tensor.float().to(torch.float8_e5m2)),
        ITS_SHARD,
        MATRIX,
        "F8_E4M3",
        "F8_E5M2",
    ),
    "fp8 where bf16 is due": Bad(
        replace(HEAD, lambda tensor: tensor.to(torch.float8_e4m3fn)), ITS_SHARD, HEAD, "dtype BF16", "F8_E4M3"
    ),
    "scales not fp32": Bad(
        replace(SCALES, lambda tensor: tensor.bfloat16()), ITS_SHARD, SCALES, "dtype F32", "BF16"
    ),
    "missing scales": Bad(drop(SCALES), INDEX, SCALES, "F32 [1, 2]", "no such tensor"),
    "missing norm": Bad(drop(NORM), INDEX, NORM, "BF16 or F32 [160]", "no such tensor"),
    "wrong shape": Bad(replace(MATRIX, Tensor.t), ITS_SHARD, MATRIX, "shape [48, 160]", "[160, 48]"),
    "wrong scale shape": Bad(
        replace(SCALES, lambda tensor: tensor[:, :1]), ITS_SHARD, SCALES, "shape [1, 2]", "[1, 1]"
    ),
    "vocabulary not the embedding's rows": Bad(
        configure(vocab_size=41), ITS_SHARD, EMBEDDING, "shape [41, 160]", "[40, 160]"
    ),
    "missing expert": Bad(
        drop(".1.mlp.experts.3."),
        INDEX,
        "model.layers.1.mlp.experts.3.gate_proj.weight",
        "F8_E4M3 [48, 160]",
        "no such tensor",
    ),
    "extra expert": Bad(
        double("layers.1.mlp.experts.3.", "layers.1.mlp.experts.4."),
        ITS_SHARD,
        "model.layers.1.mlp.experts.4.down_proj.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "missing layer": Bad(
        drop("layers.1."), INDEX, "model.layers.1.input_layernorm.weight", "[160]", "no such tensor"
    ),
    "extra layer": Bad(
        double("model.layers.0.", "model.layers.3."),
        ITS_SHARD,
        "model.layers.3.input_layernorm.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "missing MTP layer": Bad(
        drop(f"{MTP}."), INDEX, f"{MTP}.embed_tokens.weight", "BF16 or F16 or F32 [40, 160]", "no such tensor"
    ),
    "MTP layer that the configuration denies": Bad(
        configure(num_nextn_predict_layers=0),
        ITS_SHARD,
        f"{MTP}.eh_proj.weight",
        "no tensor beyond those of config.json",
        "one more",
    ),
    "fp8 that the configuration denies": Bad(
        configure(quantization_config=None),
        ITS_SHARD,
        "model.layers.0.self_attn.q_a_proj.weight",
        "dtype BF16 or F16 or F32",
        "F8_E4M3",
    ),
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
    # The configuration; all of its rules are in test_config.py
    "no configuration": Bad(
        lambda directory: (directory / "config.json").unlink(),
        "config.json",
        "",
        "a file of the checkpoint",
        "no such file",
    ),
    "configuration not JSON": Bad(write("config.json", b"model:"), "config.json", "", "JSON", "b'model:'"),
    "more experts a token than there are": Bad(
        configure(num_experts_per_tok=5), "config.json", "num_experts_per_tok", "at most the 2 experts", "5"
    ),
    "indexer that selects nothing": Bad(
        configure(index_topk=0), "config.json", "index_topk", "greater than 0", "0"
    ),
    "groups that do not divide the experts": Bad(
        configure(n_group=3), "config.json", "n_routed_experts", "a multiple of n_group, 3", "4"
    ),
    "unknown RoPE": Bad(
        configure(rope_scaling={"type": "longrope"}),
        "config.json",
        "rope_scaling.type",
        "'default' or 'yarn'",
        '"longrope"',
    ),
    "more experts than the tensors": Bad(
        configure(n_routed_experts=8),
        ITS_SHARD,
        "model.layers.1.mlp.gate.weight",
        "shape [8, 160]",
        "[4, 160]",
    ),
    # Values
    "NaN in an fp8 weight": Bad(put(MATRIX, np.nan), ITS_SHARD, MATRIX, "finite values", "1 NaN", "load"),
    "negative NaN in an fp8 weight": Bad(
        put(EXPERT, -np.nan, at=0), ITS_SHARD, EXPERT, "finite values", "1 NaN or infinite", "load"
    ),
    "NaN in the embedding": Bad(put(EMBEDDING, np.nan), ITS_SHARD, EMBEDDING, "finite", "1 NaN", "load"),
    "NaN in a norm": Bad(put(NORM, np.nan, np.nan), ITS_SHARD, NORM, "finite values", "2 NaN", "load"),
    "infinity in the head": Bad(
        put(HEAD, np.inf), ITS_SHARD, HEAD, "finite values", "1 NaN or infinite", "load"
    ),
    "both infinities": Bad(put(HEAD, np.inf, -np.inf), ITS_SHARD, HEAD, "finite values", "2 NaN or", "load"),
    "NaN in the router's bias": Bad(
        put("model.layers.1.mlp.gate.e_score_correction_bias", np.nan),
        ITS_SHARD,
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "finite values",
        "1 NaN",
        "load",
    ),
    "NaN in scales": Bad(put(SCALES, np.nan), ITS_SHARD, SCALES, "finite values", "1 NaN", "load"),
    "infinity in scales": Bad(put(SCALES, np.inf), ITS_SHARD, SCALES, "finite values", "1 NaN", "load"),
    "zero scale": Bad(put(SCALES, 0.0), ITS_SHARD, SCALES, "positive scales", "0", "load"),
    "zero scale below zero": Bad(put(SCALES, -0.0), ITS_SHARD, SCALES, "positive scales", "-0", "load"),
    "negative scale": Bad(put(SCALES, -0.25), ITS_SHARD, SCALES, "positive scales", "-0.25", "load"),
    "scale that makes infinities": Bad(
        put(SCALES, 3e38), ITS_SHARD, SCALES, "scales up to 7.5", "3e+38", "load"
    ),
    "MTP embedding that is no copy": Bad(
        put(f"{MTP}.embed_tokens.weight", 0.5, at=7),
        ITS_SHARD,
        f"{MTP}.embed_tokens.weight",
        f"a copy of {EMBEDDING}",
        "other values",
        "load",
    ),
    "MTP head that is no copy": Bad(
        put(f"{MTP}.shared_head.head.weight", 0.5),
        ITS_SHARD,
        f"{MTP}.shared_head.head.weight",
        f"a copy of {HEAD}",
        "other values",
        "load",
    ),
    # Digests
    "wrong digest of a shard": Bad(
        wrong_sum(SECOND), SECOND, "", f"the SHA-256 {'0' * 16}... of {SUMS}", "...", "load"
    ),
    "wrong digest of the configuration": Bad(
        wrong_sum("config.json"), "config.json", "", f"the SHA-256 {'0' * 16}... of {SUMS}", "...", "load"
    ),
    "digest file with a line that is none": Bad(
        write(SUMS, b"abc  config.json\n"),
        SUMS,
        "line 1",
        "64 hexadecimal digits",
        '"abc  config.json"',
        "load",
    ),
    "digest file without names": Bad(
        write(SUMS, b"\n" + b"0" * 64 + b"\n"), SUMS, "line 2", "64 hexadecimal digits", "000", "load"
    ),
    "digest file that contradicts itself": Bad(
        write(SUMS, b"0" * 64 + b"  x\n" + b"1" * 64 + b" *x\n"),
        SUMS,
        "line 2",
        "one digest a file",
        '"x"',
        "load",
    ),
    "digest file not text": Bad(
        write(SUMS, b"\xff\xfe\x00"), SUMS, "", "a readable text file", "none", "load"
    ),
}


def refusal(directory: Path) -> tuple[str, CheckpointError]:
    """What refuses a checkpoint, and how; any other exception passes through and fails the test."""
    try:
        checkpoint = Checkpoint.open(directory)
    except CheckpointError as error:
        return "open", error
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(dtype=torch.float32)
    return "load", caught.value


def assert_readable(error: CheckpointError, directory: Path) -> None:
    message = str(error)
    assert message.splitlines() == [message]
    assert str(directory.parent) not in message
    assert len(message) < 500


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoint_is_refused(kind: str, directory: Path) -> None:
    bad = BAD[kind]
    names = {"FIRST_TENSOR": name_at(directory, 0), "SECOND_TENSOR": name_at(directory, 1)}
    bad.spoil(directory)
    found_by, error = refusal(directory)
    assert_readable(error, directory)
    assert found_by == bad.found_by
    assert error.file == (promised_shard(directory, bad.what) if bad.file == ITS_SHARD else bad.file)
    assert error.what == names.get(bad.what, bad.what)
    assert bad.expected in error.expected
    assert bad.found in error.found


@pytest.mark.parametrize(
    "kind", ["NaN in the embedding", "NaN in an fp8 weight", "zero scale", "wrong digest of a shard"]
)
def test_verify_finds_what_load_finds(kind: str, directory: Path) -> None:
    BAD[kind].spoil(directory)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(directory).verify()
    assert caught.value.what == BAD[kind].what


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


# --- files that change later ----------------------------------------------------------------------


def overwrite(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, (1, 1))  # another time than before, however coarse the file system's clock


def replace_file(path: Path) -> None:
    shutil.copy2(path, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


CHANGES: dict[str, Callable[[Path], None]] = {
    "overwritten": overwrite,
    "replaced": replace_file,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "grown": lambda path: os.truncate(path, path.stat().st_size + 1),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("file", [FIRST, SECOND, "config.json"])
def test_file_changed_between_open_and_load(
    change: Callable[[Path], None], file: str, directory: Path
) -> None:
    checkpoint = Checkpoint.open(directory)
    change(directory / file)
    for read in (lambda: checkpoint.load(dtype=torch.float32), checkpoint.verify, lambda: checkpoint.digest):
        with pytest.raises(CheckpointError) as caught:
            read()
        assert_readable(caught.value, directory)
        assert (caught.value.file, caught.value.what) == (file, "")  # no tensor of it is to blame


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_file_changed_while_loading(
    change: Callable[[Path], None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second shard changes when the first tensor was read."""
    read = Checkpoint._read

    def read_and_change(
        self: Checkpoint, specs: list[TensorSpec], *, widen: bool = True
    ) -> Iterator[tuple[TensorSpec, Tensor]]:
        for number, item in enumerate(read(self, specs, widen=widen)):
            if number == 0:
                monkeypatch.setattr(Checkpoint, "_read", read)
                change(directory / SECOND)
            yield item

    checkpoint = Checkpoint.open(directory)
    monkeypatch.setattr(Checkpoint, "_read", read_and_change)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(dtype=torch.float32)
    assert_readable(caught.value, directory)
    assert caught.value.file == SECOND
    if change is CHANGES["truncated"]:
        assert caught.value.what in checkpoint.tensors  # whose bytes are gone: it is not left to the end
        assert caught.value.expected.endswith(" bytes")


def test_loaded_weights_are_no_window_on_the_file(directory: Path) -> None:
    weights = Checkpoint.open(directory).load(dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in weights.items()}
    for file in (FIRST, SECOND):
        with (directory / file).open("r+b") as stream:
            stream.seek(8 + len(raw(directory / file)[0]))
            stream.write(b"\x11" * 4096)
        os.truncate(directory / file, 4096)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())


# --- the good ones --------------------------------------------------------------------------------


def stored_bytes(directory: Path, name: str) -> bytes:
    """A tensor's bytes as they lie in the file, found without the code under test."""
    for file in (FIRST, SECOND):
        header, data = raw(directory / file)
        entries = json.loads(header)
        if name in entries:
            begin, end = entries[name]["data_offsets"]
            return data[begin:end]
    raise KeyError(name)


def test_every_tensor_loads_under_its_name(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    weights = checkpoint.load(dtype=torch.bfloat16)
    copies = {f"{MTP}.embed_tokens.weight", f"{MTP}.shared_head.head.weight"}
    assert set(weights) == {spec.name for spec in layout(checkpoint.config)} - copies
    for spec in checkpoint.specs(lambda spec: spec.name not in copies):
        assert weights[spec.name].shape == spec.shape
        wide = spec.storage in ("norm", "fp32") or spec.part == "gate" or "weights_proj" in spec.name
        assert weights[spec.name].dtype == (torch.float32 if wide else torch.bfloat16), spec.name
    checkpoint.verify()


@pytest.mark.parametrize("name", [MATRIX, "model.layers.0.self_attn.o_proj.weight", EXPERT])
def test_dequantisation_against_a_slow_loop(name: str, good: Path) -> None:
    """[48, 160], [160, 80] and [48, 160]: whole blocks of 128 and short ones on either side."""
    checkpoint = Checkpoint.open(good)
    loaded = checkpoint.load(lambda spec: spec.name == name, dtype=torch.float32)[name]
    codes, scale_bytes = stored_bytes(good, name), stored_bytes(good, f"{name}_scale_inv")
    scales = struct.unpack(f"<{len(scale_bytes) // 4}f", scale_bytes)
    rows, columns = loaded.shape
    blocks = -(-columns // 128)
    assert len(scales) == -(-rows // 128) * blocks > 1
    expected = [
        [VALUES[codes[r * columns + c]] * scales[r // 128 * blocks + c // 128] for c in range(columns)]
        for r in range(rows)
    ]
    assert loaded.tolist() == expected


def test_unquantised_tensors_are_bitwise_those_of_the_file(good: Path) -> None:
    weights = Checkpoint.open(good).load(dtype=torch.float32)
    for name in (EMBEDDING, NORM, HEAD, f"{MTP}.eh_proj.weight"):
        flat = weights[name].flatten().tolist()
        assert struct.pack(f"<{len(flat)}f", *flat) == stored_bytes(good, name)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_unquantised_checkpoints_in_every_accepted_dtype(stored: torch.dtype, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", facts(**SMALL))
    edit_tensors(
        directory,
        lambda tensors: tensors.update({n: t.to(stored) for n, t in tensors.items() if t.dim() == 2}),
    )
    weights = Checkpoint.open(directory).load(dtype=torch.float32)
    tensors = {**load_file(directory / FIRST), **load_file(directory / SECOND)}
    assert tensors[MATRIX].dtype == stored
    assert all(torch.equal(weights[name], tensor.float()) for name, tensor in tensors.items())


def test_values_whose_sum_overflows_are_finite_all_the_same(directory: Path) -> None:
    put(HEAD, *[3e38] * 100)(directory)
    weights = Checkpoint.open(directory).load(lambda spec: spec.name == HEAD, dtype=torch.float32)
    assert weights[HEAD].isfinite().all()


@pytest.mark.parametrize("first_byte", [0x80, 0x50])
def test_a_header_as_long_as_a_pickle_begins(first_byte: int, directory: Path) -> None:
    """Headers are padded to multiples of 8, so that every 32nd file starts with 0x80 and some with "PK"."""
    header, data = raw(directory / FIRST)
    length = len(header) + (first_byte - len(header)) % 256
    length += (0x4B - (length >> 8)) % 256 * 256 if first_byte == 0x50 else 0
    write_raw(directory / FIRST, header.ljust(length), data)
    start = (directory / FIRST).read_bytes()[:2]
    assert start == b"PK" if first_byte == 0x50 else start[:1] == b"\x80"
    assert set(read_header(directory / FIRST)) == set(load_file(directory / FIRST))
    Checkpoint.open(directory)


def test_one_file_without_an_index(directory: Path) -> None:
    tensors = {**load_file(directory / FIRST), **load_file(directory / SECOND)}
    expected = Checkpoint.open(directory).load(dtype=torch.float32)
    only_file("")(directory)
    save_file(tensors, directory / "model.safetensors")
    weights = Checkpoint.open(directory).load(dtype=torch.float32)
    assert set(weights) == set(expected)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_hub_cache_whose_snapshot_links_to_its_blobs(good: Path, tmp_path: Path) -> None:
    snapshot, blobs = (
        tmp_path / "models--a--b" / "snapshots" / "0123abcd",
        tmp_path / "models--a--b" / "blobs",
    )
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in good.iterdir():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copy(path, blobs / digest)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", digest))
    assert set(Checkpoint.open(snapshot).load(dtype=torch.float32)) == set(
        Checkpoint.open(good).load(dtype=torch.float32)
    )

    (tmp_path / "blobs").mkdir()
    shutil.copy(good / FIRST, tmp_path / "blobs" / FIRST)
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to(tmp_path / "blobs" / FIRST)  # the blobs of somebody else
    with pytest.raises(CheckpointError, match="a link that leads out of it"):
        Checkpoint.open(snapshot)


def test_links_within_the_directory_and_to_it(good: Path, directory: Path, tmp_path: Path) -> None:
    (directory / FIRST).rename(directory / "part.safetensors")
    (directory / FIRST).symlink_to("part.safetensors")
    (tmp_path / "link").symlink_to(directory)
    assert Checkpoint.open(tmp_path / "link").digest == Checkpoint.open(good).digest


# --- roles, digests -------------------------------------------------------------------------------


def names(weights: Weights) -> set[str]:
    return set(weights)


def test_roles_load_exactly_their_tensors_and_partition_the_checkpoint(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    whole = checkpoint.load(everything, dtype=torch.float32)
    attention = checkpoint.load(all_but_routed_experts, dtype=torch.float32)
    experts = [checkpoint.load(routed_experts(held), dtype=torch.float32) for held in (range(1), range(1, 4))]
    assert names(attention) == {name for name in whole if ".mlp.experts." not in name}
    assert names(experts[0]) == {
        f"model.layers.{layer}.mlp.experts.0.{part}_proj.weight"
        for layer in (1, 2)
        for part in ("gate", "up", "down")
    }
    assert {name.split(".")[5] for name in experts[1]} == {"1", "2", "3"}
    parts = [attention, *experts]
    assert sum(len(part) for part in parts) == len(whole)
    for part in parts:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in part.items())


def test_no_experts_are_no_tensors(good: Path) -> None:
    assert Checkpoint.open(good).load(routed_experts(range(0)), dtype=torch.float32) == {}


def test_a_role_does_not_check_values_that_it_does_not_load(directory: Path) -> None:
    put(EXPERT, np.nan)(directory)
    checkpoint = Checkpoint.open(directory)
    checkpoint.load(all_but_routed_experts, dtype=torch.float32)
    checkpoint.load(routed_experts(range(3)), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"experts\.3\.up_proj"):
        checkpoint.load(routed_experts(range(3, 4)), dtype=torch.float32)


def test_take_hands_a_tensor_over_once(good: Path) -> None:
    weights = Checkpoint.open(good).load(lambda spec: spec.name == NORM, dtype=torch.float32)
    assert weights.take(NORM).shape == (160,)
    assert NORM not in weights


def test_digest_is_the_content_and_not_the_place(good: Path, directory: Path) -> None:
    digest = Checkpoint.open(good).digest
    assert len(digest) == 64
    assert Checkpoint.open(directory).digest == digest
    sums = {f: hashlib.sha256((good / f).read_bytes()).hexdigest() for f in ("config.json", FIRST, SECOND)}
    lines = "".join(f"{sums[file]}  {file}\n" for file in sorted(sums))
    assert digest == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.parametrize("file", ["config.json", FIRST, SECOND])
def test_digest_changes_with_every_byte(file: str, good: Path, directory: Path) -> None:
    content = bytearray((directory / file).read_bytes())
    content[-1:] = b" }" if file == "config.json" else bytes([content[-1] ^ 1])
    (directory / file).write_bytes(content)
    assert Checkpoint.open(directory).digest != Checkpoint.open(good).digest


@pytest.mark.parametrize(
    "form", ["{digest}  {file}\n", "{digest} *{file}\r\n", "{digest}  ./{file}\n", "\n{upper}  {file}\n\n"]
)
@pytest.mark.parametrize("file", [SECOND, "config.json"])
def test_digest_files_in_every_form_of_the_tool(form: str, file: str, directory: Path) -> None:
    digest = hashlib.sha256((directory / file).read_bytes()).hexdigest()
    lines = form.format(digest=digest, upper=digest.upper(), file=file) + f"{'0' * 64}  not_here.txt"
    (directory / SUMS).write_bytes(lines.encode())
    Checkpoint.open(directory).load(dtype=torch.float32)
    Checkpoint.open(directory).verify()

    wrong = digest[:-1] + ("0" if digest[-1] != "0" else "1")
    (directory / SUMS).write_bytes(form.format(digest=wrong, upper=wrong.upper(), file=file).encode())
    checkpoint = Checkpoint.open(directory)
    for read in (lambda: checkpoint.load(dtype=torch.float32), checkpoint.verify):
        with pytest.raises(CheckpointError, match="SHA-256") as caught:
            read()
        assert caught.value.file == file


def test_the_demo_agrees_with_its_own_digests(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(DEMO)
    experts = checkpoint.load(routed_experts(range(7, 8)), dtype=torch.float32)
    assert len(experts) == 3 * 6  # five MoE layers of six, and the MTP layer

    damaged = shutil.copytree(DEMO, tmp_path / "demo", ignore=shutil.ignore_patterns("*.jsonl", "oracle*"))
    shard = checkpoint.tensors[next(iter(experts))].file
    with (damaged / shard).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(damaged).load(routed_experts(range(7, 8)), dtype=torch.float32)
    assert caught.value.file == shard


# --- fuzzing --------------------------------------------------------------------------------------

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "delete", "insert", "repeat"]), st.integers(0, 1 << 30), st.integers(0, 255)
    ),
    min_size=1,
    max_size=4,
)


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    result = bytearray(content)
    for kind, place, byte in edits:
        at = place % max(1, len(result))
        match kind:
            case "flip":
                result[at : at + 1] = bytes([result[at] ^ (1 << byte % 8)]) if result else b""
            case "delete":
                del result[at : at + byte]
            case "insert":
                result[at:at] = bytes([byte])
            case "repeat":
                result[at:at] = result[at : at + byte]
    return bytes(result)


def assert_refused_or_good(directory: Path) -> None:
    try:
        Checkpoint.open(directory).load(routed_experts(range(1)), dtype=torch.float32)
    except CheckpointError as error:
        assert_readable(error, directory)


fuzz = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@fuzz
@given(edits=EDITS, keep_length=st.booleans())
def test_any_edit_of_a_header(
    edits: list[tuple[str, int, int]], keep_length: bool, good: Path, directory: Path
) -> None:
    """The length in front of it is right for the new header, or stays as it was."""
    header, data = raw(good / FIRST)
    length = len(header) if keep_length else len(edited(header, edits))
    (directory / FIRST).write_bytes(struct.pack("<Q", length) + edited(header, edits) + data)
    assert_refused_or_good(directory)


@fuzz
@given(edits=EDITS, file=st.sampled_from(["config.json", INDEX]))
def test_any_edit_of_a_json_file(
    edits: list[tuple[str, int, int]], file: str, good: Path, directory: Path
) -> None:
    for name in ("config.json", INDEX):
        shutil.copy(good / name, directory / name)
    (directory / file).write_bytes(edited((good / file).read_bytes(), edits))
    assert_refused_or_good(directory)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(key=st.sampled_from([*sorted(fp8_facts()), "rope_parameters", "yarn"]), value=JSON)
def test_any_value_of_a_configuration(key: str, value: Any, good: Path, directory: Path) -> None:
    config = {**json.loads((good / "config.json").read_text()), key: value}
    (directory / "config.json").write_text(json.dumps(config))
    assert_refused_or_good(directory)

"""A small checkpoint to read, a copy of it to spoil, and what has to come of a spoilt one."""

import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.checkpoint import Checkpoint
from model.errors import CheckpointError
from tests.checkpoints import fp8_facts, write_checkpoint, write_tensors

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


# --- the errors of spoilt ones --------------------------------------------------------------------


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


def assert_refused(bad: Bad, directory: Path) -> None:
    names = {"FIRST_TENSOR": name_at(directory, 0), "SECOND_TENSOR": name_at(directory, 1)}
    bad.spoil(directory)
    found_by, error = refusal(directory)
    assert_readable(error, directory)
    assert found_by == bad.found_by
    assert error.file == (promised_shard(directory, bad.what) if bad.file == ITS_SHARD else bad.file)
    assert error.what == names.get(bad.what, bad.what)
    assert bad.expected in error.expected
    assert bad.found in error.found

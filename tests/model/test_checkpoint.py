"""Good checkpoints: what loads from them, by which role, under which digest, and when their files change."""

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kernels.fp8_quant import dequantize_blocks
from model.checkpoint import Checkpoint, Weights, all_but_routed_experts, everything, routed_experts
from model.config import FP8_BLOCK
from model.errors import CheckpointError
from model.layout import TensorSpec, layout
from model.safetensors_header import read_header
from tests.checkpoints import DEMO, facts, write_checkpoint
from tests.e4m3 import VALUES
from tests.model.bad_checkpoints import (
    EMBEDDING,
    EXPERT,
    FIRST,
    HEAD,
    MATRIX,
    MTP,
    NORM,
    SECOND,
    SMALL,
    SUMS,
    assert_readable,
    edit_tensors,
    only_file,
    put,
    raw,
    write_raw,
)
from tests.model.bad_checkpoints import directory as directory
from tests.model.bad_checkpoints import good as good

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_block_scaled_matrices_can_stay_as_they_are(good: Path) -> None:
    checkpoint = Checkpoint.open(good)
    as_stored, widened = (checkpoint.load(dtype=torch.float32, widen=widen) for widen in (False, True))
    name = "model.layers.1.self_attn.q_a_proj.weight"
    assert as_stored[name].dtype == torch.float8_e4m3fn
    values, scales = as_stored[name], as_stored[f"{name}_scale_inv"]
    assert torch.equal(dequantize_blocks(values, scales, FP8_BLOCK), widened[name])
    assert set(as_stored) == {
        full for name in widened for full in (name, f"{name}_scale_inv") if full in checkpoint.tensors
    }


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

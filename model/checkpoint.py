"""A checkpoint directory in the official Hugging Face format: checked, then read as far as a role needs it.

Opening reads only headers: every tensor of the layout must stand in exactly one shard with the right shape
and storage, and nothing else may. Loading reads the tensors one by one, widens block-scaled matrices and
refuses values that would poison the forward pass. What was loaded is a copy: files are not mapped, since a
mapped file that somebody rewrites or truncates would change the weights or kill the process.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.fp8_quant import E4M3_MAX, FP8, dequantize_blocks
from model.config import CONFIG_FILE, FP8_BLOCK, ModelConfig, parse_json, shown
from model.errors import CheckpointError
from model.layout import TensorSpec, layout
from model.safetensors_header import StoredTensor, check_name, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DIGEST_FILE = "SHA256SUMS"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HASH_CHUNK = 8 << 20
_DIGEST_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")
_MAX_SCALE = torch.finfo(torch.float32).max / E4M3_MAX  # beyond it the widened matrix may hold infinities
_TORCH_DTYPES = {"F8_E4M3": FP8, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_STORED_DTYPES = {
    "matrix": ("BF16", "F16", "F32"),
    "bf16": ("BF16", "F16", "F32"),
    "norm": ("BF16", "F32"),
    "fp32": ("F32", "BF16"),
}

Wanted = Callable[[TensorSpec], bool]
"""Which tensors a role needs."""


def everything(spec: TensorSpec) -> bool:
    return True


def all_but_routed_experts(spec: TensorSpec) -> bool:
    """What an attention actor holds."""
    return spec.expert < 0


def routed_experts(experts: range) -> Wanted:
    """What an expert actor holds: its experts of every layer."""
    return lambda spec: spec.expert in experts


class Weights(dict[str, Tensor]):
    """Loaded tensors by checkpoint name. `take` hands a tensor to its owner, so that none is held twice."""

    def take(self, name: str) -> Tensor:
        return self.pop(name)


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: configuration and the place of every tensor. Nothing but headers was read."""

    directory: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    _stamps: dict[str, tuple[int, int, int]]

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Read and check `config.json`, the index and the header of every shard.

        Raises:
            CheckpointError: for the first thing that is not as it must be.
        """
        if not os.path.isdir(directory):
            raise CheckpointError(
                directory.absolute().name, "", "a checkpoint directory", "no such directory"
            )
        stamps = {CONFIG_FILE: _stamp(directory / CONFIG_FILE)}
        config = ModelConfig.load(directory)
        tensors: dict[str, StoredTensor] = {}
        weight_map, listing = _weight_map(directory)
        for file in sorted(set(weight_map.values())):
            path = _inside(directory, file)
            stamps[file] = _stamp(path)
            for name, tensor in read_header(path).items():
                if name in tensors:
                    found = f"it in {tensors[name].file} too"
                    raise CheckpointError(file, name, "each tensor in one shard", found)
                tensors[name] = tensor
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(file, name, "a tensor that the index promises", "no such tensor")
        _check_against_layout(config, tensors, listing)
        return cls(directory, config, tensors, stamps)

    def specs(self, wanted: Wanted = everything) -> list[TensorSpec]:
        return [spec for spec in layout(self.config) if wanted(spec)]

    def load(
        self,
        wanted: Wanted = everything,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        widen: bool = True,
        progress: bool = False,
    ) -> Weights:
        """Read, check and widen the tensors of a role.

        Args:
            wanted: which tensors; see `everything`, `all_but_routed_experts`, `routed_experts`.
            dtype: of matrices and embeddings; norms, the gate and the indexer's head weights are float32.
            widen: False leaves block-scaled matrices e4m3, with their multipliers under `scale_name`.
            progress: whether to draw a bar of bytes on a terminal.

        Raises:
            CheckpointError: a value that is not finite, a scale that is not positive, a digest that does not
                match, or a file that changed since it was opened.
        """
        self._check_unchanged()
        specs = self.specs(lambda spec: wanted(spec) and not is_duplicate(self.config, spec))
        total = sum(self._stored_bytes(spec) for spec in specs)
        weights = Weights()
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="weights",
            disable=None if progress else True,
            leave=False,
        ) as bar:
            for spec, tensor, scales in self._read(specs, widen=widen):
                keep_fp32 = (
                    spec.storage in ("norm", "fp32") or spec.part == "gate" or "weights_proj" in spec.name
                )
                if scales is None:
                    weights[spec.name] = tensor.to(device, torch.float32 if keep_fp32 else dtype)
                else:
                    weights[spec.name], weights[spec.scale_name] = tensor.to(device), scales.to(device)
                bar.update(self._stored_bytes(spec))
        self._check_copies(wanted)
        self._check_digests({CONFIG_FILE, *(self.tensors[spec.name].file for spec in specs)})
        self._check_unchanged()
        return weights

    def verify(self, *, progress: bool = False) -> None:
        """Check every value of every tensor without keeping any; raises as `load` does."""
        self._check_unchanged()
        specs = self.specs()
        total = sum(self._stored_bytes(spec) for spec in specs)
        with tqdm(
            total=total,
            unit="B",
            unit_scale=True,
            desc="checking",
            disable=None if progress else True,
            leave=False,
        ) as bar:
            for spec, _, _ in self._read(specs, widen=False):
                bar.update(self._stored_bytes(spec))
        self._check_copies(everything)
        self._check_digests(set(self._stamps))
        self._check_unchanged()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of `config.json` and of every shard: what these weights are called."""
        found = self._file_digests(set(self._stamps))
        self._check_unchanged()
        lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(found.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _stored_bytes(self, spec: TensorSpec) -> int:
        scale = self.tensors.get(spec.scale_name)
        return self.tensors[spec.name].num_bytes + (scale.num_bytes if scale else 0)

    def _read(
        self, specs: list[TensorSpec], *, widen: bool = True
    ) -> Iterator[tuple[TensorSpec, Tensor, Tensor | None]]:
        """Open each shard once and yield its tensors, checked, and the multipliers of those not widened."""
        streams: dict[str, BufferedReader] = {}

        def stored(name: str) -> Tensor:
            place = self.tensors[name]
            try:
                if place.file not in streams:
                    streams[place.file] = closing.enter_context((self.directory / place.file).open("rb"))
                tensor = _read_tensor(streams[place.file], name, place)
            except OSError as error:
                found = error.strerror or "an error"
                raise CheckpointError(place.file, name, "a readable tensor", found) from None
            _check_finite(place.file, name, tensor)
            return tensor

        with ExitStack() as closing:
            for spec in specs:
                tensor = stored(spec.name)
                if not spec.is_quantized(self.config):
                    yield spec, tensor, None
                    continue
                scales = stored(spec.scale_name)
                _check_scales(self.tensors[spec.scale_name].file, spec.scale_name, scales)
                if widen:
                    yield spec, dequantize_blocks(tensor, scales, FP8_BLOCK), None
                else:
                    yield spec, tensor, scales

    def _check_copies(self, wanted: Wanted) -> None:
        """The MTP layer's embedding and head must be what the format says: copies of the main model's."""
        copies = [spec for spec in self.specs(wanted) if is_duplicate(self.config, spec)]
        for (spec, copy, _), (original, main, _) in zip(
            self._read(copies),
            self._read([_original(self.config, spec) for spec in copies]),
            strict=True,
        ):
            if not torch.equal(copy, main):
                file = self.tensors[spec.name].file
                raise CheckpointError(file, spec.name, f"a copy of {original.name}", "other values")

    def _check_digests(self, files: set[str]) -> None:
        """Compare with the checkpoint's own digest file, where it brings one."""
        promised = _promised_digests(self.directory / DIGEST_FILE)
        for file, found in self._file_digests(files & set(promised)).items():
            if found != promised[file]:
                expected = f"the SHA-256 {promised[file][:16]}... of {DIGEST_FILE}"
                raise CheckpointError(file, "", expected, f"{found[:16]}...")

    def _file_digests(self, files: set[str]) -> dict[str, str]:
        def digest(file: str) -> str:
            sha = hashlib.sha256()
            try:
                with (self.directory / file).open("rb") as stream:
                    while chunk := stream.read(_HASH_CHUNK):
                        sha.update(chunk)
            except OSError as error:
                raise CheckpointError(file, "", "a readable file", error.strerror or "an error") from None
            return sha.hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(sorted(files), pool.map(digest, sorted(files)), strict=True))

    def _check_unchanged(self) -> None:
        for file, stamp in self._stamps.items():
            if _stamp(self.directory / file) != stamp:
                raise CheckpointError(file, "", "the file that was opened", "it changed while it was read")


def _weight_map(directory: Path) -> tuple[dict[str, str], str]:
    """Tensor name -> shard, and the file that says so: the index, or else the one shard there is."""
    index = directory / INDEX_FILE
    if not os.path.lexists(index):
        if os.path.lexists(directory / SINGLE_FILE):
            return dict.fromkeys(read_header(_inside(directory, SINGLE_FILE)), SINGLE_FILE), SINGLE_FILE
        pickles = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLE_SUFFIXES)
        found = f"{shown(pickles[0])}, a pickle, which is never loaded" if pickles else "neither"
        raise CheckpointError(directory.absolute().name, "", f"{INDEX_FILE} or {SINGLE_FILE}", found)
    try:
        raw = index.read_bytes()
    except OSError as error:
        raise CheckpointError(INDEX_FILE, "", "a readable file", error.strerror or "an error") from None
    facts = parse_json(INDEX_FILE, raw)
    weight_map = facts.get("weight_map") if isinstance(facts, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(INDEX_FILE, "weight_map", "an object", shown(weight_map))
    if not weight_map:
        raise CheckpointError(INDEX_FILE, "weight_map", "the names of tensors", "none")
    for name, file in weight_map.items():
        check_name(INDEX_FILE, name)
        if not isinstance(file, str):
            raise CheckpointError(INDEX_FILE, name, "the name of a file", shown(file))
    return weight_map, INDEX_FILE


def _inside(directory: Path, file: str) -> Path:
    """The shard's path, if it is a file of this directory (or of a hub cache's blob store beside it)."""
    if Path(file).name != file or file in ("", ".", "..") or not file.isprintable():
        raise CheckpointError(INDEX_FILE, "weight_map", "plain file names", shown(file))
    if not file.endswith(".safetensors"):
        raise CheckpointError(INDEX_FILE, "weight_map", "safetensors files", shown(file))
    path = directory / file
    if not os.path.isfile(path):
        raise CheckpointError(file, "", "a shard that the index names", "no such file")
    home = directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in allowed:
        raise CheckpointError(file, "", "a file of the checkpoint's directory", "a link that leads out of it")
    return path


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        found = (error.strerror or "an error").lower()
        raise CheckpointError(path.name, "", "a file of the checkpoint", found) from None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _promised_digests(path: Path) -> dict[str, str]:
    """File name -> SHA-256 in hex, from a file in the form of the `sha256sum` tool; empty without one."""
    if not path.exists():
        return {}
    promised: dict[str, str] = {}
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(path.name, "", "a readable text file", "none") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _DIGEST_LINE.fullmatch(line)
        if not match:
            expected = "64 hexadecimal digits, two blanks and a file name"
            raise CheckpointError(path.name, f"line {number}", expected, shown(line))
        digest, file = match[1].lower(), match[2].removeprefix("./")
        if promised.setdefault(file, digest) != digest:
            raise CheckpointError(path.name, f"line {number}", "one digest a file", f"two of {shown(file)}")
    return promised


def _check_against_layout(config: ModelConfig, tensors: dict[str, StoredTensor], listing: str) -> None:
    expected_names = set()
    for spec in layout(config):
        quantized = spec.is_quantized(config)
        dtypes = ("F8_E4M3",) if quantized else _STORED_DTYPES[spec.storage]
        _check_one(tensors, spec.name, spec.shape, dtypes, listing)
        expected_names.add(spec.name)
        if quantized:
            _check_one(tensors, spec.scale_name, spec.scale_shape, ("F32",), listing)
            expected_names.add(spec.scale_name)
    for name in sorted(set(tensors) - expected_names):
        raise CheckpointError(tensors[name].file, name, "no tensor beyond those of config.json", "one more")


def _check_one(
    tensors: dict[str, StoredTensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: tuple[str, ...],
    listing: str,
) -> None:
    if name not in tensors:
        raise CheckpointError(listing, name, f"{' or '.join(dtypes)} {list(shape)}", "no such tensor")
    found = tensors[name]
    if found.shape != shape:
        raise CheckpointError(found.file, name, f"shape {list(shape)}", f"{list(found.shape)}")
    if found.dtype not in dtypes:
        raise CheckpointError(found.file, name, f"dtype {' or '.join(dtypes)}", found.dtype)


def _read_tensor(stream: BufferedReader, name: str, place: StoredTensor) -> Tensor:
    """A tensor's bytes, in memory of its own."""
    data = torch.empty(place.num_bytes, dtype=torch.uint8)
    stream.seek(place.data_start + place.begin)
    num_read = stream.readinto(data.numpy().data)
    if num_read < place.num_bytes:
        found = f"{num_read} (the file changed while it was read)"
        raise CheckpointError(place.file, name, f"{place.num_bytes} bytes", found)
    return data.view(_TORCH_DTYPES[place.dtype]).view(place.shape)


def _check_scales(file: str, name: str, scales: Tensor) -> None:
    smallest, largest = scales.aminmax()
    if smallest <= 0:
        raise CheckpointError(file, name, "positive scales", f"{smallest:g}")
    if largest > _MAX_SCALE:
        raise CheckpointError(file, name, f"scales up to {_MAX_SCALE:g}", f"{largest:g}")


def _check_finite(file: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype == FP8:  # e4m3 has no infinity, and NaN is seven ones under either sign
        codes = tensor.view(torch.uint8) & 0x7F
        bad = 0 if codes.max() < 0x7F else int((codes == 0x7F).sum())
    else:
        # A sum is finite only if every value is; it spares a pass over a mask of each healthy tensor.
        total = tensor.float().sum()
        bad = 0 if total.isfinite() else int((~tensor.isfinite()).sum())
    if bad:
        raise CheckpointError(file, name, "finite values", f"{bad} NaN or infinite")


def is_duplicate(config: ModelConfig, spec: TensorSpec) -> bool:
    """Whether it is one of the MTP layer's copies of embedding and head, which are never held twice."""
    return spec.layer >= config.num_hidden_layers and spec.name.endswith(
        (".embed_tokens.weight", ".shared_head.head.weight")
    )


def _original(config: ModelConfig, spec: TensorSpec) -> TensorSpec:
    name = "model.embed_tokens.weight" if spec.part == "embedding" else "lm_head.weight"
    return next(other for other in layout(config) if other.name == name)

"""A checkpoint directory in the official Hugging Face format: checked first, then read, as much as a role needs.

Opening reads only headers: every tensor of the layout must stand in exactly one shard with the right shape
and storage, and nothing else may. Loading maps the files, widens block-scaled matrices and refuses values
that would poison the forward pass.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from kernels.fp8_quant import FP8, dequantize_blocks
from model.config import FP8_BLOCK, ModelConfig
from model.errors import CheckpointError
from model.layout import TensorSpec, layout
from model.safetensors_header import StoredTensor, read_header

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DIGEST_FILE = "SHA256SUMS"
_HASH_CHUNK = 8 << 20
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
        return self.pop(f"{name}")


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
        if not directory.is_dir():
            raise CheckpointError(directory.name, "", "a checkpoint directory", "no such directory")
        config = ModelConfig.load(directory)
        tensors: dict[str, StoredTensor] = {}
        stamps = {}
        weight_map = _weight_map(directory)
        for file in sorted(set(weight_map.values())):
            path = _inside(directory, file)
            stamps[file] = _stamp(path)
            for name, tensor in read_header(path).items():
                if name in tensors:
                    raise CheckpointError(
                        file, name, "each tensor in one shard", f"it in {tensors[name].file} too"
                    )
                tensors[name] = tensor
        for name, file in weight_map.items():
            if name not in tensors or tensors[name].file != file:
                raise CheckpointError(file, name, "a tensor that the index promises", "no such tensor")
        _check_against_layout(config, tensors)
        return cls(directory, config, tensors, stamps)

    def specs(self, wanted: Wanted = everything) -> list[TensorSpec]:
        return [spec for spec in layout(self.config) if wanted(spec)]

    def load(
        self,
        wanted: Wanted = everything,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        progress: bool = False,
    ) -> Weights:
        """Read, check and widen the tensors of a role.

        Args:
            wanted: which tensors; see `everything`, `all_but_routed_experts`, `routed_experts`.
            dtype: of matrices and embeddings; norms, the gate and the indexer's head weights are float32.
            progress: whether to draw a bar of bytes on a terminal.

        Raises:
            CheckpointError: a value that is not finite, a zero scale, a digest that does not match, or a
                file that changed since it was opened.
        """
        specs = self.specs(lambda spec: wanted(spec) and not _is_duplicate(self.config, spec))
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
            for spec, tensor in self._read(specs):
                keep_fp32 = (
                    spec.storage in ("norm", "fp32") or spec.part == "gate" or "weights_proj" in spec.name
                )
                weights[spec.name] = tensor.to(device, torch.float32 if keep_fp32 else dtype)
                bar.update(self._stored_bytes(spec))
        self._check_copies(wanted)
        self._check_digests({self.tensors[spec.name].file for spec in specs})
        self._check_unchanged()
        return weights

    def verify(self, *, progress: bool = False) -> None:
        """Check every value of every tensor without keeping any; raises as `load` does."""
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
            for spec, _ in self._read(specs, widen=False):
                bar.update(self._stored_bytes(spec))
        self._check_copies(everything)
        self._check_digests(set(self._stamps))
        self._check_unchanged()

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the digests of `config.json` and of every shard: what these weights are called."""
        found = self._file_digests({"config.json", *self._stamps})
        lines = "".join(f"{digest}  {file}\n" for file, digest in sorted(found.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _stored_bytes(self, spec: TensorSpec) -> int:
        scale = self.tensors.get(spec.scale_name)
        return self.tensors[spec.name].num_bytes + (scale.num_bytes if scale else 0)

    def _read(self, specs: list[TensorSpec], *, widen: bool = True) -> Iterator[tuple[TensorSpec, Tensor]]:
        """Map each shard once and yield its tensors, checked."""
        handles: dict[str, safe_open] = {}

        def stored(name: str) -> Tensor:
            file = self.tensors[name].file
            try:
                if file not in handles:
                    handles[file] = safe_open(self.directory / file, framework="pt")
                tensor: Tensor = handles[file].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(file, name, "a readable tensor", str(error)) from None
            _check_finite(file, name, tensor)
            return tensor

        for spec in specs:
            tensor = stored(spec.name)
            if spec.is_quantized(self.config):
                scales = stored(spec.scale_name)
                file = self.tensors[spec.scale_name].file
                if not (scales > 0).all():
                    raise CheckpointError(file, spec.scale_name, "positive scales", f"{scales.min():g}")
                if widen:
                    tensor = dequantize_blocks(tensor, scales, FP8_BLOCK)
            yield spec, tensor

    def _check_copies(self, wanted: Wanted) -> None:
        """The MTP layer's embedding and head must be what the format says: copies of the main model's."""
        copies = [spec for spec in self.specs(wanted) if _is_duplicate(self.config, spec)]
        for (spec, copy), (original, main) in zip(
            self._read(copies),
            self._read([_original(self.config, spec) for spec in copies]),
            strict=True,
        ):
            if not torch.equal(copy, main):
                file = self.tensors[spec.name].file
                raise CheckpointError(file, spec.name, f"a copy of {original.name}", "other values")

    def _check_digests(self, files: set[str]) -> None:
        """Compare with the checkpoint's own digest file, where it brings one."""
        path = self.directory / DIGEST_FILE
        if not path.exists():
            return
        promised = dict(
            reversed(line.split(maxsplit=1)) for line in path.read_text().splitlines() if line.strip()
        )
        promised = {name.lstrip("*").strip(): digest for name, digest in promised.items()}
        for file, found in self._file_digests(files & set(promised)).items():
            if found != promised[file]:
                raise CheckpointError(
                    file, "", f"the SHA-256 {promised[file][:16]}… of {DIGEST_FILE}", f"{found[:16]}…"
                )

    def _file_digests(self, files: set[str]) -> dict[str, str]:
        def digest(file: str) -> str:
            sha = hashlib.sha256()
            with (self.directory / file).open("rb") as stream:
                while chunk := stream.read(_HASH_CHUNK):
                    sha.update(chunk)
            return sha.hexdigest()

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return dict(zip(sorted(files), pool.map(digest, sorted(files)), strict=True))

    def _check_unchanged(self) -> None:
        for file, stamp in self._stamps.items():
            if _stamp(self.directory / file) != stamp:
                raise CheckpointError(file, "", "the file that was opened", "it changed while it was read")


def _weight_map(directory: Path) -> dict[str, str]:
    """Tensor name -> shard, from the index; empty-handed but for the one file where there is no index."""
    index = directory / INDEX_FILE
    if not index.exists():
        if (directory / SINGLE_FILE).exists():
            return {name: SINGLE_FILE for name in read_header(_inside(directory, SINGLE_FILE))}
        pickles = sorted(path.name for path in directory.glob("*.bin")) + sorted(
            path.name for path in directory.glob("*.pt")
        )
        found = f"{pickles[0]}, a pickle, which is never loaded" if pickles else "neither"
        raise CheckpointError(directory.name, "", f"{INDEX_FILE} or {SINGLE_FILE}", found)
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(INDEX_FILE, "", "JSON with a weight_map", "something else") from None
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(INDEX_FILE, "weight_map", "tensor names and file names", "something else")
    if not weight_map:
        raise CheckpointError(INDEX_FILE, "weight_map", "the names of tensors", "none")
    return weight_map


def _inside(directory: Path, file: str) -> Path:
    """The shard's path, if it is a file of this directory (or of the blob store beside it, in a hub cache)."""
    if Path(file).name != file or file in ("", ".", ".."):
        raise CheckpointError(INDEX_FILE, "weight_map", "plain file names", f"{file!r}")
    if not file.endswith(".safetensors"):
        raise CheckpointError(INDEX_FILE, "weight_map", "safetensors files", f"{file!r}")
    path = directory / file
    if not path.is_file():
        raise CheckpointError(file, "", "a shard that the index names", "no such file")
    home = directory.resolve()
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if path.resolve().parent not in allowed:
        raise CheckpointError(file, "", "a file of the checkpoint's directory", "a link that leads out of it")
    return path


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_against_layout(config: ModelConfig, tensors: dict[str, StoredTensor]) -> None:
    expected_names = set()
    for spec in layout(config):
        quantized = spec.is_quantized(config)
        dtypes = ("F8_E4M3",) if quantized else _STORED_DTYPES[spec.storage]
        _check_one(tensors, spec.name, spec.shape, dtypes)
        expected_names.add(spec.name)
        if quantized:
            _check_one(tensors, spec.scale_name, spec.scale_shape, ("F32",))
            expected_names.add(spec.scale_name)
    for name in sorted(set(tensors) - expected_names):
        raise CheckpointError(tensors[name].file, name, "only tensors of the configuration", "one more")


def _check_one(
    tensors: dict[str, StoredTensor], name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if name not in tensors:
        raise CheckpointError(INDEX_FILE, name, f"{' or '.join(dtypes)} {list(shape)}", "no such tensor")
    found = tensors[name]
    if found.shape != shape:
        raise CheckpointError(found.file, name, f"shape {list(shape)}", f"{list(found.shape)}")
    if found.dtype not in dtypes:
        raise CheckpointError(found.file, name, f"dtype {' or '.join(dtypes)}", found.dtype)


def _check_finite(file: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype == FP8:  # e4m3 has no infinity, and NaN is seven ones under either sign
        bad = int(((tensor.view(torch.uint8) & 0x7F) == 0x7F).sum())
    else:
        # A sum is finite only if every value is; it spares a pass over a mask of each healthy tensor.
        total = tensor.float().sum()
        bad = 0 if total.isfinite() else int((~tensor.isfinite()).sum())
    if bad:
        raise CheckpointError(file, name, "finite values", f"{bad} NaN or infinite")


def _is_duplicate(config: ModelConfig, spec: TensorSpec) -> bool:
    return spec.layer >= config.num_hidden_layers and spec.name.endswith(
        (".embed_tokens.weight", ".shared_head.head.weight")
    )


def _original(config: ModelConfig, spec: TensorSpec) -> TensorSpec:
    name = "model.embed_tokens.weight" if spec.part == "embedding" else "lm_head.weight"
    return next(other for other in layout(config) if other.name == name)

"""Weights drawn at random, straight on a device, in the storage of an official checkpoint.

For measuring: any shape can be run at full width without a download; `config.json` says which. Matrices keep
the size of what passes through them (standard deviation 1 / sqrt(inputs)), so that activations stay in range
through all layers. Every tensor has a seed of its own, made from its name, so that a part of a model (some
layers, some experts) has the values that it has in the whole, whoever draws it. CPUs and GPUs draw different
numbers from one seed: a model split over both would be none.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.fp8_quant import FP8, dequantize_blocks
from model.checkpoint import Wanted, Weights, everything, is_duplicate
from model.config import CONFIG_FILE, FP8_BLOCK, ModelConfig
from model.errors import CheckpointError
from model.layout import TensorSpec, layout

_SPREAD = 64.0  # standard deviation of the e4m3 values: 448, the largest, is seven of them away
_DRAWING = "random weights 1"  # another number where the same seed comes to mean other values


@dataclass(frozen=True)
class RandomCheckpoint:
    """As `Checkpoint`, of a model that nobody has trained.

    Args:
        config: with as many layers as are drawn.
    """

    config: ModelConfig
    seed: int = 0

    @classmethod
    def open(cls, directory: Path, layers: int | None = None) -> "RandomCheckpoint":
        """Read `config.json`, the one file that is needed.

        Args:
            layers: decoder layers that there shall be, the first ones; None for all. The leading dense ones
                and the MTP layer stay.

        Raises:
            CheckpointError: the file is not as it must be, or has not so many layers.
        """
        config = ModelConfig.load(directory)
        if layers is None:
            return cls(config)
        most = config.num_hidden_layers
        if not 1 <= layers <= most:
            raise CheckpointError(CONFIG_FILE, "layers", f"1 to {most}, its num_hidden_layers", str(layers))
        dense = min(config.first_k_dense_replace, layers)
        return cls(config.model_copy(update={"num_hidden_layers": layers, "first_k_dense_replace": dense}))

    def load(
        self,
        wanted: Wanted = everything,
        *,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        widen: bool = True,
        progress: bool = False,
    ) -> Weights:
        """As `Checkpoint.load`, drawn instead of read."""
        return random_weights(
            self.config, wanted, dtype=dtype, device=device, seed=self.seed, widen=widen, progress=progress
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the values follow from: configuration, number of layers, seed."""
        facts = [_DRAWING, self.seed, self.config.model_dump(mode="json")]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def random_weights(
    config: ModelConfig,
    wanted: Wanted = everything,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
    widen: bool = False,
    progress: bool = False,
) -> Weights:
    """What `Checkpoint.load` would give of a checkpoint with random values.

    Args:
        dtype: of matrices and embeddings that are not left in e4m3.
        widen: as of `Checkpoint.load`: whether block-scaled matrices come in `dtype`.
        progress: whether to draw a bar of tensors on a terminal.
    """
    generator = torch.Generator(device)
    specs = [spec for spec in layout(config) if wanted(spec) and not is_duplicate(config, spec)]
    weights = Weights()
    for spec in tqdm(specs, desc="random weights", disable=None if progress else True, leave=False):
        generator.manual_seed(_seed_of(seed, spec))
        if not spec.is_quantized(config):
            weights[spec.name] = _random_vector_or_rows(spec, dtype, generator)
            continue
        values, scales = _random_matrix(spec, generator)
        if widen:
            weights[spec.name] = dequantize_blocks(values, scales, FP8_BLOCK).to(dtype)
        else:
            weights[spec.name], weights[spec.scale_name] = values, scales
    return weights


def _seed_of(seed: int, spec: TensorSpec) -> int:
    digest = hashlib.blake2b(f"{seed} {spec.name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1  # generators take 63 bits


def _random_matrix(spec: TensorSpec, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """e4m3 values, and block scales that differ by up to two, as those of trained blocks do."""
    device = generator.device
    values = torch.empty(spec.shape, dtype=FP8, device=device)
    rows_at_once = max(1, (1 << 26) // spec.shape[1])  # 256 MiB of fp32
    for rows in values.split(rows_at_once):
        rows.copy_(
            torch.randn(rows.shape, generator=generator, device=device).mul_(_SPREAD).clamp_(-448, 448)
        )
    jitter = torch.rand(spec.scale_shape, generator=generator, device=device) + 0.5
    return values, jitter * (1 / (_SPREAD * math.sqrt(spec.shape[1])))


def _random_vector_or_rows(spec: TensorSpec, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    device = generator.device
    if spec.storage == "norm" or spec.name.endswith("k_norm.weight"):
        return torch.ones(spec.shape, device=device)
    if spec.storage == "fp32":  # biases
        return torch.zeros(spec.shape, device=device)
    spread = 1.0 if spec.part == "embedding" else 1 / math.sqrt(spec.shape[-1])
    rows = (torch.randn(spec.shape, generator=generator, device=device) * spread).to(torch.bfloat16)
    keeps_fp32 = spec.part == "gate" or "weights_proj" in spec.name  # as the loader has them
    return rows.to(torch.float32 if keeps_fp32 else dtype)

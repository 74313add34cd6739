"""Weights drawn at random, straight on a device, in the storage of an official checkpoint.

For measuring: any shape can be run at full width without a download. Matrices keep the size of what passes
through them (standard deviation 1 / sqrt(inputs)), so that activations stay in range through all layers.
"""

import math

import torch
from torch import Tensor

from kernels.fp8_quant import FP8
from model.checkpoint import Wanted, Weights, everything
from model.config import ModelConfig
from model.layout import TensorSpec, layout

_SPREAD = 64.0  # standard deviation of the e4m3 values: 448, the largest, is seven of them away


def random_weights(
    config: ModelConfig,
    wanted: Wanted = everything,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Weights:
    """As `Checkpoint.load(.., widen=False)` of a checkpoint that nobody has trained.

    Args:
        config: one with a `quantization_config`.
    """
    generator = torch.Generator(device).manual_seed(seed)
    weights = Weights()
    for spec in layout(config):
        if not wanted(spec):
            continue
        if spec.is_quantized(config):
            values, scales = _random_matrix(spec, generator)
            weights[spec.name], weights[spec.scale_name] = values, scales
        else:
            weights[spec.name] = _random_vector_or_rows(spec, dtype, generator)
    return weights


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

"""RoPE's frequencies and angles, with YaRN where the checkpoint has it; always on, at every length."""

import math

import torch
from torch import Tensor

from model.config import ModelConfig, Yarn


def rope_frequencies(config: ModelConfig) -> Tensor:
    """[R/2] float32: radians a position turns each pair; the same for MLA and for the indexer."""
    dim = config.qk_rope_head_dim
    base = 1.0 / config.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return _stretch(base, dim, config.rope_theta, config.yarn) if config.yarn else base


def _stretch(base: Tensor, dim: int, theta: float, yarn: Yarn) -> Tensor:
    """YaRN: fast pairs stay, slow pairs are slowed by `factor`, a ramp between (model.md of DeepSeek-V3)."""

    def correction(rotations: float) -> float:
        """The pair index that makes so many rotations over the original context."""
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return base * (1 - ramp) + base / yarn.factor * ramp


def rope_angles(frequencies: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, R/2] float32 (bf16 would be too coarse at 128K)."""
    angles = positions.unsqueeze(1).float() * frequencies
    return angles.cos(), angles.sin()

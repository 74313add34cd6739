"""Matrices as the FP8 kernels read them: e4m3 as stored, with a scale for each block of 128 x 128."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fp8_quant import FP8, dequantize_blocks
from model.checkpoint import Weights
from model.config import FP8_BLOCK


@dataclass(frozen=True)
class Fp8Matrix:
    """`values` [N, K] e4m3 (or [e, N, K] of experts), `scales` [ceil(N / 128), ceil(K / 128)] float32."""

    values: Tensor
    scales: Tensor

    @classmethod
    def take(cls, weights: Weights, *names: str) -> "Fp8Matrix":
        """Matrices that read the same input, stacked to one.

        Each begins at a multiple of 128 rows (`padded`), so that no block of scales straddles two.
        """
        parts = [cls(weights.take(name), weights.take(f"{name}_scale_inv")) for name in names]
        if len(parts) == 1:
            return parts[0]
        rows = [
            F.pad(part.values.view(torch.uint8), (0, 0, 0, -len(part.values) % FP8_BLOCK)) for part in parts
        ]
        rows[-1] = parts[-1].values.view(torch.uint8)  # nothing follows it
        return cls(torch.cat(rows).view(FP8), torch.cat([part.scales for part in parts]))

    def widen(self) -> Tensor:
        """[N, K] float32."""
        return dequantize_blocks(self.values, self.scales, FP8_BLOCK)


def padded(num_rows: int) -> int:
    """Rows that a matrix of so many takes in a stack."""
    return -(-num_rows // FP8_BLOCK) * FP8_BLOCK

"""What a case of `benchmarks/kernels.py` is, the inputs that several share, and the peers."""

import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.kernels_timing import Call
from kernels.fp8_quant import FP8, dequantize_blocks, dequantize_reference
from kernels.quantize_rows import quantize_rows_reference

HIDDEN = 7168
HEADS, LATENT, ROPE = 128, 512, 64
INDEX_HEADS, INDEX_DIM, TOPK = 64, 128, 2048
PAGE = 64
RECORD = 656
SOFTMAX_SCALE = 192**-0.5


@dataclass(frozen=True)
class Peers:
    """Other people's kernels, where they are installed; `missing` says of the others why not."""

    deep_gemm: ModuleType | None = None
    flash_mla: ModuleType | None = None
    has_vllm: bool = False
    missing: list[str] = field(default_factory=list)

    @property
    def legacy(self) -> dict[str, Any]:
        """What FlashMLA's calls want on Hopper: its standalone wheel keeps those kernels apart."""
        assert self.flash_mla is not None
        apart = "use_legacy" in inspect.signature(self.flash_mla.flash_mla_with_kvcache).parameters
        return {"use_legacy": True} if apart else {}


def load_peers(folder: Path | None) -> Peers:
    """Import DeepGEMM and FlashMLA and load vLLM's operations, from a folder or from where Python finds them.

    Args:
        folder: holds deep_gemm/, flash_mla/ and vllm_ops/*.so, each of them optional.
    """
    if folder is not None:
        sys.path.insert(0, str(folder))
    missing = []

    def load(name: str) -> ModuleType | None:
        try:
            return importlib.import_module(name)
        except Exception as error:  # of any kind: what is not there is not compared with
            missing.append(
                f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
            return None

    libraries = sorted((folder / "vllm_ops").glob("*.so")) if folder is not None else []
    try:
        for library in libraries:
            torch.ops.load_library(str(library))
        has_vllm = bool(libraries) or load("vllm._custom_ops") is not None
    except OSError as error:
        missing.append(f"vllm_ops: {str(error)[:200]}")
        has_vllm = False
    return Peers(load("deep_gemm"), load("flash_mla"), has_vllm, missing)


@dataclass
class Made:
    """A case with its inputs on the GPU.

    Attributes:
        check: what `ours` returned to its error against the reference, on a slice.
        peer_checked: whether the peer returns the same form, so that its result is checked too.
        peer_name: where no figure is recorded that names it.
    """

    ours: Call
    check: Callable[[Any], float]
    tolerance: float
    peer: Call | None = None
    peer_checked: bool = True
    peer_name: str = ""


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Attributes:
        flop, num_bytes: what must be done and moved, each input and output counted once.
        make: builds the inputs; a failure of the peer must not keep ours from being timed, so it only makes
            closures.
        recorded: kernel and shape under which `peers_h100.json` has the peer.
    """

    kernel: str
    shape: str
    flop: float
    num_bytes: float
    make: Callable[[Peers], Made]
    at_least: float | None = None
    aim: float | None = None
    precision: Literal["fp8", "bf16"] = "bf16"
    recorded: tuple[str, str] | None = None


def relative(out: Tensor, expected: Tensor) -> float:
    """||out - expected|| / ||expected||; NaN where out has one."""
    wide, expected = out.double(), expected.double()
    return float((wide - expected).norm() / expected.norm().clamp_min(1e-30))


def generator() -> torch.Generator:
    return torch.Generator("cuda").manual_seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=generator(), device="cuda") * scale).to(dtype)


def activations(num_rows: int, width: int) -> tuple[Tensor, Tensor]:
    """[T, K] e4m3 and [T, K / 128] float32, stored group by group."""
    values = torch.empty(num_rows, width, dtype=FP8, device="cuda")
    scales = torch.empty(width // 128, -(-num_rows // 4) * 4, device="cuda").t()[:num_rows]
    random = generator()
    for start in range(0, num_rows, 4096):
        rows = slice(start, start + 4096)
        x = torch.randn(min(4096, num_rows - start), width, generator=random, device="cuda")
        values[rows], scales[rows] = quantize_rows_reference(x)
    return values, scales


def weights(num_experts: int, num_outputs: int, num_inputs: int) -> tuple[Tensor, Tensor]:
    """[E, N, K] e4m3 and [E, ceil(N / 128), K / 128] float32 of any positive value."""
    values = torch.empty(num_experts, num_outputs, num_inputs, dtype=FP8, device="cuda")
    blocks = -(-num_outputs // 128), num_inputs // 128
    scales = torch.empty(num_experts, *blocks, device="cuda")
    random = generator()
    for expert in range(num_experts):
        w = torch.zeros(blocks[0] * 128, num_inputs, device="cuda")
        w[:num_outputs].normal_(0, 0.02, generator=random)
        tiles = w.view(blocks[0], 128, blocks[1], 128)
        scales[expert] = tiles.abs().amax((1, 3)).clamp_min(1e-4) / 448
        values[expert] = (tiles / scales[expert][:, None, :, None]).view_as(w)[:num_outputs].to(FP8)
    return values, scales


def pick(values: Tensor, rows: Tensor) -> Tensor:
    """values[rows], for e4m3 too."""
    return values.view(torch.uint8)[rows].view(FP8) if values.dtype == FP8 else values[rows]


def product(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """[T, N] float32 of the last 128 outputs; N a multiple of 64."""
    first = (weight.shape[0] - 1) // 128
    wide = dequantize_blocks(weight[first * 128 :], weight_scales[first:], 128)
    return dequantize_reference(x, x_scales.contiguous(), 128) @ wide.t()


def out_of_order_pages(num_sequences: int, context: int) -> Tensor:
    """[S, pages] int32, a permutation: no page follows its neighbour."""
    num_pages = -(-context // PAGE)
    pages = torch.randperm(num_sequences * num_pages, generator=generator(), device="cuda")
    return pages.view(num_sequences, num_pages).int()

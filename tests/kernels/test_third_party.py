"""The adapters to DeepGEMM and FlashMLA: what is refused, and the copies around the masked form."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import third_party
from kernels.backend import UnsupportedKernel
from kernels.fp8_gemm import fp8_gemm_reference
from kernels.fp8_quant import FP8
from kernels.grouped_fp8_gemm import grouped_fp8_gemm_reference
from kernels.quantize_rows import quantize_rows_reference


@pytest.mark.parametrize(
    ("module", "package"), [("deep_gemm", "sgl-deep-gemm"), ("flash_mla", "sgl-flash-mla")]
)
def test_a_library_that_is_not_installed_is_named(module: str, package: str) -> None:
    if importlib.util.find_spec(module) is not None:
        pytest.skip(f"{module} is installed")
    with pytest.raises(UnsupportedKernel, match=f"install {package}"):
        getattr(third_party, f"require_{module}")()


def test_few_heads_and_small_channels_are_refused() -> None:
    slots, pages = torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 64, 656, dtype=torch.uint8)
    with pytest.raises(UnsupportedKernel, match="64 and 128 heads"):
        third_party.flash_mla_sparse_decode(torch.zeros(1, 16, 576), pages, slots, 1.0, 512)
    with pytest.raises(UnsupportedKernel, match=r"512 \+ 64 channels"):
        third_party.flash_mla_sparse_prefill(torch.zeros(1, 64, 160), torch.zeros(4, 160), slots, 1.0, 128)


def _masked(
    a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], out: Tensor, counts: Tensor, expected: int, **_: Any
) -> None:
    """What the library computes; it reads scales by 16 bytes down a group's column."""
    assert a[1].stride(1) == 1
    assert a[1].stride(2) % 4 == 0
    assert counts.dtype == torch.int32
    for expert, count in enumerate(counts.tolist()):
        x, scales = a[0][expert, :count], a[1][expert, :count]
        out[expert, :count] = fp8_gemm_reference(x, scales, b[0][expert], b[1][expert])


@pytest.mark.parametrize("gathered", [False, True])
def test_grouped_rows_are_copied_apart_and_back(
    gathered: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    library = SimpleNamespace(fp8_m_grouped_gemm_nt_masked=_masked)
    monkeypatch.setattr(third_party, "require_deep_gemm", lambda: library)
    x, x_scales = quantize_rows_reference(torch.randn(9, 256, generator=generator))
    weights = torch.randn(4, 128, 256, generator=generator).to(FP8)
    weight_scales = torch.rand(4, 1, 2, generator=generator)
    offsets = torch.tensor([0, 3, 3, 8, 9], dtype=torch.int32)
    # Nobody wrote the last two: they belong to experts elsewhere.
    rows = torch.tensor([4, 0, 8, 1, 1, 2, 7, 5, 3, 1 << 30, -5], dtype=torch.int32) if gathered else None
    out = third_party.deep_gemm_grouped_fp8_gemm(
        x, x_scales, weights, weight_scales, offsets, rows, max_rows=8, expected_rows=2
    )
    expected = grouped_fp8_gemm_reference(x, x_scales, weights, weight_scales, offsets, rows, num_rows=9)
    assert torch.equal(out[:9], expected)

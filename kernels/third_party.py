"""DeepGEMM and FlashMLA behind our signatures, for whoever has their wheels; off by default.

NVIDIA only. Each function is one of our launchers without its `backend`, and refuses with `UnsupportedKernel`
what the library does not serve, its absence included. Nothing of them is imported before it is asked for.

    sgl-deep-gemm 0.1.4, with apache-tvm-ffi 0.1.11     for torch 2.11; 0.1.5 and later want a newer one
    sgl-flash-mla 1.0.0                                 for torch 2.10 and later, with CUDA 13

Shapes as in the launchers of the same names: T rows, K inputs, N outputs, e experts, H heads.
"""

import importlib
import inspect
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from kernels.backend import UnsupportedKernel, require

_PAGE = 64
_HEADS = (64, 128)  # what FlashMLA has; fewer would be padded to 64


@lru_cache(maxsize=2)
def _library(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: its library was built for another torch
        raise UnsupportedKernel(f"{module} cannot be loaded ({error}); install {package}") from error


def require_deep_gemm() -> ModuleType:
    """Import DeepGEMM, or raise `UnsupportedKernel` saying what to install; for configurations, at start."""
    return _library("deep_gemm", "sgl-deep-gemm")


def require_flash_mla() -> ModuleType:
    """Import FlashMLA, or raise `UnsupportedKernel` saying what to install; for configurations, at start."""
    return _library("flash_mla", "sgl-flash-mla")


def deep_gemm_fp8_gemm(x: Tensor, x_scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """`fp8_gemm` into bf16; scales stored group by group spare it a launch."""
    library = require_deep_gemm()
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16, device=x.device)
    if out.numel() > 0:
        library.fp8_gemm_nt((x, x_scales), (weight, weight_scales), out, disable_ue8m0_cast=True)
    return out


def deep_gemm_grouped_fp8_gemm(
    x: Tensor,
    x_scales: Tensor,
    weights: Tensor,
    weight_scales: Tensor,
    offsets: Tensor,
    rows: Tensor | None,
    *,
    max_rows: int,
    expected_rows: int,
) -> Tensor:
    """`grouped_fp8_gemm` into bf16 for decode, by the masked form: rows are copied apart and back.

    Args:
        max_rows: no expert has more; the copies hold so many for each.
    """
    library = require_deep_gemm()
    num_experts, num_outputs, _ = weights.shape
    num_rows = (x if rows is None else rows).shape[0]
    require(max_rows % 4 == 0, "deep_gemm_grouped_fp8_gemm", f"max_rows {max_rows} is no multiple of 4")
    if num_rows == 0:
        return torch.empty(0, num_outputs, dtype=torch.bfloat16, device=x.device)
    counts = offsets.diff().int()
    places = torch.arange(max_rows, device=x.device) + offsets[:-1].unsqueeze(1)  # [e, max_rows]
    source = places.clamp_max(num_rows - 1)
    if rows is not None:
        source = rows[source].clamp_(0, x.shape[0] - 1)  # behind the last expert's rows may stand anything
    padded = torch.empty(num_experts, max_rows, num_outputs, dtype=torch.bfloat16, device=x.device)
    scales = x_scales.t()[:, source].transpose(0, 1).contiguous().transpose(1, 2)  # group by group again
    library.fp8_m_grouped_gemm_nt_masked(
        (x.view(torch.uint8)[source].view(x.dtype), scales),
        (weights, weight_scales),
        padded,
        counts,
        expected_rows,
        disable_ue8m0_cast=True,
    )
    positions = torch.arange(num_rows, device=x.device, dtype=offsets.dtype)
    expert = torch.searchsorted(offsets[1:].contiguous(), positions, right=True).clamp_max(num_experts - 1)
    within = (positions - offsets[expert]).clamp_(0, max_rows - 1)
    return torch.index_select(padded.flatten(0, 1), 0, expert * max_rows + within)


def deep_gemm_ragged_index_logits(
    q: Tensor, keys: Tensor, key_scales: Tensor, weights: Tensor, visible: Tensor
) -> Tensor:
    """`ragged_index_logits`; 32 or 64 heads."""
    library = require_deep_gemm()
    require(
        hasattr(library, "fp8_mqa_logits"),
        "deep_gemm_ragged_index_logits",
        "this version of deep_gemm has no fp8_mqa_logits; install sgl-deep-gemm 0.1.4",
    )
    ends = visible.int()
    scores: Tensor = library.fp8_mqa_logits(
        q, (keys, key_scales), weights, torch.zeros_like(ends), ends, clean_logits=False
    )
    return scores


def deep_gemm_paged_index_logits(
    q: Tensor,
    index_pages: Tensor,
    weights: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
) -> Tensor:
    """`paged_index_logits`; one or two rows a sequence. Makes its schedule anew in every call."""
    library = require_deep_gemm()
    operation = "deep_gemm_paged_index_logits"
    require(
        hasattr(library, "fp8_paged_mqa_logits"),
        operation,
        "this version of deep_gemm has no fp8_paged_mqa_logits; install sgl-deep-gemm 0.1.4",
    )
    require(rows_per_sequence in (1, 2), operation, f"serves 1 or 2 rows a sequence, not {rows_per_sequence}")
    lengths = visible.int().view(-1, rows_per_sequence)
    schedule = library.get_paged_mqa_logits_metadata(lengths, _PAGE, library.get_num_sms())
    scores: Tensor = library.fp8_paged_mqa_logits(
        q.view(-1, rows_per_sequence, *q.shape[1:]),
        index_pages.view(-1, _PAGE, 1, index_pages.shape[1] // _PAGE),
        weights,
        lengths,
        page_table.int(),
        schedule,
        max_visible,
    )
    return scores


def flash_mla_sparse_decode(
    q: Tensor, latent_pages: Tensor, slots: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    """`sparse_mla_decode` on FP8 pages; 64 or 128 heads, full-size channels."""
    library = _flash_mla("flash_mla_sparse_decode", q, kv_lora_rank)
    require(latent_pages.dtype == torch.uint8, "flash_mla_sparse_decode", "serves FP8 pages only")
    if q.shape[0] == 0:
        return q.new_empty(*q.shape[:2], kv_lora_rank)
    out, _ = library.flash_mla_with_kvcache(
        q.unsqueeze(1),
        latent_pages.view(torch.float8_e4m3fn).unsqueeze(2),
        None,
        None,
        kv_lora_rank,
        _schedule(q.shape[0], q.shape[1], slots.shape[1], q.device),
        None,
        scale,
        False,
        True,
        slots.int().unsqueeze(1),
        **_legacy(library),
    )
    attended: Tensor = out.squeeze(1)
    return attended


def flash_mla_sparse_prefill(
    q: Tensor, latents: Tensor, positions: Tensor, scale: float, kv_lora_rank: int
) -> Tensor:
    """`sparse_mla_prefill`; 64 or 128 heads, full-size channels."""
    library = _flash_mla("flash_mla_sparse_prefill", q, kv_lora_rank)
    if q.shape[0] == 0:
        return q.new_empty(*q.shape[:2], kv_lora_rank)
    attended: Tensor = library.flash_mla_sparse_fwd(
        q, latents.unsqueeze(1), positions.unsqueeze(1), scale, kv_lora_rank, **_legacy(library)
    )[0]
    return attended


def flash_mla_dense_decode(
    q: Tensor,
    latent_pages: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    scale: float,
    kv_lora_rank: int,
) -> Tensor:
    """`dense_mla_decode` on bf16 pages, one row a sequence, as FlashMLA has one length for all rows of one.

    Makes its schedule anew in every call.
    """
    operation = "flash_mla_dense_decode"
    library = _flash_mla(operation, q, kv_lora_rank)
    require(rows_per_sequence == 1, operation, f"serves 1 row a sequence, not {rows_per_sequence}")
    require(latent_pages.dtype == torch.bfloat16, operation, "serves bf16 pages only")
    if q.shape[0] == 0:
        return q.new_empty(*q.shape[:2], kv_lora_rank)
    out, _ = library.flash_mla_with_kvcache(
        q.unsqueeze(1),
        latent_pages.unsqueeze(2),
        page_table.int(),
        visible.int(),
        kv_lora_rank,
        library.get_mla_metadata()[0],
        None,
        scale,
        False,
        False,
        **_legacy(library),
    )
    attended: Tensor = out.squeeze(1)
    return attended


def _flash_mla(operation: str, q: Tensor, kv_lora_rank: int) -> ModuleType:
    require(q.shape[1] in _HEADS, operation, f"serves 64 and 128 heads, not {q.shape[1]}")
    require(
        (kv_lora_rank, q.shape[2]) == (512, 576), operation, f"serves 512 + 64 channels, not {q.shape[2]}"
    )
    return require_flash_mla()


@lru_cache(maxsize=256)
def _schedule(num_rows: int, num_heads: int, num_slots: int, device: torch.device) -> Any:
    """How programs share the slots; it depends on nothing but these numbers.

    The first call fills it in, so one call must come before a graph is captured.
    """
    return require_flash_mla().get_mla_metadata()[0]


@lru_cache(maxsize=2)
def _legacy(library: ModuleType) -> dict[str, Any]:
    """The standalone wheel keeps the kernels for Hopper and for this page format apart."""
    apart = "use_legacy" in inspect.signature(library.flash_mla_with_kvcache).parameters
    return {"use_legacy": True} if apart else {}

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.attention_inputs
from kernels.attention_inputs import (
    _CONFIG,
    AttentionNorms,
    ProjectedColumns,
    _attention_inputs,
    attention_inputs,
)
from kernels.backend import UnsupportedKernel
from kernels.index_pages import read_index_keys_fp8
from kernels.latent_pages import read_latents_fp8, record_bytes
from tests.kernels.compiled import compile_for_hopper
from tests.kernels.fused import GPU, assert_alike

DEMO = ProjectedColumns(q_lora_rank=128, kv_lora_rank=128, rope_dim=32, index_dim=64)
FULL_SIZE = ProjectedColumns(q_lora_rank=1536, kv_lora_rank=512, rope_dim=64, index_dim=128)
EPS = 1e-6
CPU = torch.device("cpu")


def norms_of(columns: ProjectedColumns, generator: torch.Generator, device: torch.device) -> AttentionNorms:
    widths = columns.q_lora_rank, columns.kv_lora_rank, columns.index_dim, columns.index_dim
    return AttentionNorms(*(torch.rand(width, generator=generator).to(device) + 0.5 for width in widths))


def empty_pages(
    columns: ProjectedColumns, full: bool, num_pages: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    latent, index = columns.kv_lora_rank + columns.rope_dim, columns.index_dim
    if full:
        options: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
        return torch.zeros(num_pages, 64, latent, **options), torch.zeros(num_pages, 64, index, **options)
    record = record_bytes(columns.kv_lora_rank, columns.rope_dim)
    options = {"dtype": torch.uint8, "device": device}
    return torch.zeros(num_pages, 64, record, **options), torch.zeros(num_pages, 64 * (index + 4), **options)


def check(
    columns: ProjectedColumns,
    num_rows: int,
    full: bool,
    generator: torch.Generator,
    device: torch.device,
    slots_dtype: torch.dtype = torch.int64,
) -> None:
    norms = norms_of(columns, generator, device)
    projected = torch.randn(num_rows, columns.width + 16, generator=generator).to(device, torch.bfloat16)
    angles = torch.randn(num_rows, columns.rope_dim // 2, generator=generator).to(device) * 9
    num_pages = num_rows // 64 + 2
    slots = torch.randperm(num_pages * 64, generator=generator)[:num_rows]
    slots[2::5] = -1
    slots = slots.to(device, slots_dtype)
    arguments = projected, columns, norms, angles.cos(), angles.sin(), slots
    actual_pages, expected_pages = (empty_pages(columns, full, num_pages, device) for _ in range(2))
    values, scales = attention_inputs(*arguments, *actual_pages, EPS, backend="triton")
    expected, expected_scales = attention_inputs(*arguments, *expected_pages, EPS, backend="reference")
    assert_alike(values, expected, differing=3e-3)
    assert_alike(scales, expected_scales, differing=3e-3)
    if full:
        for one, other in zip(actual_pages, expected_pages, strict=True):
            assert_alike(one, other, differing=3e-3)
        return
    everywhere = torch.arange(num_pages * 64, device=device)
    latents, expected_latents = (
        read_latents_fp8(pages[0], everywhere, columns.kv_lora_rank, backend="reference")
        for pages in (actual_pages, expected_pages)
    )
    assert_alike(latents, expected_latents, differing=3e-3)
    keys, expected_keys = (
        read_index_keys_fp8(pages[1], everywhere[:num_pages], 64, backend="reference")
        for pages in (actual_pages, expected_pages)
    )
    assert_alike(keys[0], expected_keys[0], differing=1e-2)
    assert_alike(keys[1], expected_keys[1], differing=1e-2)
    unwritten = torch.ones(num_pages * 64, dtype=torch.bool, device=device)
    unwritten[slots[slots >= 0].long()] = False
    assert not latents[unwritten].any()
    assert not keys[1][unwritten].any()


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("num_rows", [0, 1, 18])
def test_interpreted_equals_reference(
    full: bool, num_rows: int, generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.attention_inputs)
    check(DEMO, num_rows, full, generator, CPU, torch.int32 if full else torch.int64)


def test_interpreted_at_full_size_and_for_many_rows(
    generator: torch.Generator, interpreted: Callable[..., None]
) -> None:
    interpreted(kernels.attention_inputs)
    check(FULL_SIZE, 3, False, generator, CPU)
    check(DEMO, 258, False, generator, CPU)


def test_refusals(generator: torch.Generator) -> None:
    norms = norms_of(DEMO, generator, CPU)
    projected = torch.zeros(2, DEMO.width, dtype=torch.bfloat16)
    angles, slots = torch.zeros(2, 16), torch.arange(2)
    pages, full = (empty_pages(DEMO, full, 1, CPU) for full in (False, True))
    wide = ProjectedColumns(128, 128, 32, 80)
    for columns, latents, keys, x, rule in (
        (DEMO, pages[0][:, :, 4:], pages[1], projected, "do not fit"),
        (DEMO, pages[0], full[1], projected, "do not fit|differ"),
        (DEMO, *pages, projected.float(), "not bf16"),
        (wide, *empty_pages(wide, False, 1, CPU), projected[:, :1].expand(2, wide.width), "contiguous"),
        (wide, *empty_pages(wide, False, 1, CPU), projected.new_zeros(2, wide.width), "powers of two"),
        (DEMO, *pages, projected[:1], "is not 2 rows"),
        (DEMO, *pages, projected[:, :-1], f"of {DEMO.width} channels"),
    ):
        with pytest.raises(UnsupportedKernel, match=rule):
            attention_inputs(x, columns, norms, angles, angles, slots, latents, keys, EPS, backend="triton")
    short = replace(norms, kv=norms.kv[:64])
    with pytest.raises(UnsupportedKernel, match=r"norms of \(128, 64, 64, 64\)"):
        attention_inputs(projected, DEMO, short, angles, angles, slots, *pages, EPS, backend="triton")
    with pytest.raises(UnsupportedKernel, match="norms must be float32"):
        replace(norms, q=norms.q.bfloat16())


@pytest.mark.parametrize("full", [False, True])
def test_compiled_spills_nothing(full: bool) -> None:
    columns, config = FULL_SIZE, _CONFIG
    floats = ("q_norm", "kv_norm", "key_weight", "key_bias", "cos", "sin", "scales")
    page = "*bf16" if full else "*u8"
    compiled = compile_for_hopper(
        _attention_inputs,
        {f"{name}_ptr": "*fp32" for name in floats}
        | {"projected_ptr": "*bf16", "slots_ptr": "*i64", "values_ptr": "*fp8e4nv"}
        | {"latent_pages_ptr": page, "index_pages_ptr": page, "eps": "fp32", "hadamard_scale": "fp32"}
        | dict.fromkeys(
            ("num_rows", "projected_stride", "scale_stride", "key_programs", "latent_programs"), "i32"
        ),
        {
            "Q": columns.q_lora_rank,
            "Q_GROUPS": 16,
            "C": columns.kv_lora_rank,
            "C_GROUPS": 4,
            "R": columns.rope_dim,
            "D": columns.index_dim,
            "KEY_START": columns.index_key,
            "LATENT_START": columns.latent,
            "FULL": full,
            "RECORD": 576 if full else 656,
            "PAGE_SIZE": 64,
            "Q_ROWS": config.q_rows,
            "LATENT_ROWS": config.latent_rows,
            "KEY_ROWS": config.key_rows,
        },
        num_warps=config.num_warps,
        aligned=("projected_stride",),
    )
    assert compiled.spilled == 0


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("columns", "num_rows"), [(DEMO, 65), (FULL_SIZE, 1), (FULL_SIZE, 130), (FULL_SIZE, 2049)]
)
def test_gpu(columns: ProjectedColumns, num_rows: int, full: bool, generator: torch.Generator) -> None:
    check(columns, num_rows, full, generator, GPU)

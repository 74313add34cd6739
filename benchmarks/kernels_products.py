"""Cases of the block-scaled products, plain and grouped by expert, beside DeepGEMM's."""

import torch
from torch import Tensor

from benchmarks.kernels_inputs import (
    Case,
    Made,
    Peers,
    activations,
    generator,
    pick,
    product,
    relative,
    weights,
)

_TOLERANCE = 4e-3  # rounding the result to bf16 alone is 1.7e-3
_DECODE = (2112, 7168), (24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048)
_EXPERT = (4096, 7168), (7168, 2048)


def cases() -> list[Case]:
    found = []
    for num_rows, at_least, aim in ((64, 0.9, 1.1), (128, 0.9, 1.1), (4096, 0.75, 0.9)):
        found += [_plain(num_rows, n, k, at_least, aim) for n, k in _DECODE]
    for num_experts, num_rows in ((16, 32), (16, 96), (32, 8), (32, 32), (32, 96)):
        found += [_masked(num_experts, num_rows, n, k) for n, k in _EXPERT]
    for num_experts, num_rows in ((4, 8192), (32, 256)):
        found += [_contiguous(num_experts, num_rows, n, k) for n, k in _EXPERT]
    return found


def _num_bytes(num_experts: int, num_rows: int, n: int, k: int) -> float:
    """Rows are those of all experts together."""
    of_weights = num_experts * (n * k + 4 * -(-n // 128) * k // 128)
    return of_weights + num_rows * (k + 4 * k // 128 + 2 * n)


def _plain(num_rows: int, n: int, k: int, at_least: float, aim: float) -> Case:
    shape = f"M{num_rows} N{n} K{k}"

    def make(peers: Peers) -> Made:
        from kernels.fp8_gemm import fp8_gemm

        x, x_scales = activations(num_rows, k)
        (weight,), (weight_scales,) = weights(1, n, k)
        first = (n - 1) // 128 * 128
        expected = product(x[:64], x_scales[:64], weight, weight_scales)
        made = Made(
            lambda: fp8_gemm(x, x_scales, weight, weight_scales, backend="triton"),
            lambda out: relative(out[:64, first:], expected),
            _TOLERANCE,
        )
        if (gemm := peers.deep_gemm) is not None:
            out = torch.empty(num_rows, n, dtype=torch.bfloat16, device="cuda")

            def peer() -> Tensor:
                gemm.fp8_gemm_nt((x, x_scales), (weight, weight_scales), out, disable_ue8m0_cast=True)
                return out

            made.peer = peer
        return made

    return Case(
        "fp8_gemm prefill" if num_rows > 256 else "fp8_gemm decode",
        shape,
        2.0 * num_rows * n * k,
        _num_bytes(1, num_rows, n, k),
        make,
        at_least,
        aim,
        "fp8",
        ("DeepGEMM fp8_gemm_nt", shape),
    )


def _rows_of(num_experts: int, num_rows: int) -> Tensor:
    """[e + 1] int32: every expert has as many."""
    return torch.arange(num_experts + 1, dtype=torch.int32, device="cuda") * num_rows


def _masked(num_experts: int, num_rows: int, n: int, k: int) -> Case:
    """Decode: few rows an expert, their numbers on the device; the first product gathers its rows."""
    shape = f"{num_experts} experts x {num_rows} rows N{n} K{k}"
    total = num_experts * num_rows

    def make(peers: Peers) -> Made:
        from kernels.grouped_fp8_gemm import grouped_fp8_gemm

        x, x_scales = activations(total, k)
        weight, weight_scales = weights(num_experts, n, k)
        order = torch.randperm(total, generator=generator(), device="cuda")
        rows = order.int() if n == 4096 else None
        if rows is None:
            order = torch.arange(total, device="cuda")
        last = order[-num_rows:]
        expected = product(pick(x, last), x_scales[last], weight[-1], weight_scales[-1])
        offsets = _rows_of(num_experts, num_rows)
        made = Made(
            lambda: grouped_fp8_gemm(
                x, x_scales, weight, weight_scales, offsets, rows, expected_rows=num_rows, backend="triton"
            ),
            lambda out: relative(out.flatten(0, -2)[-num_rows:, -128:], expected),
            _TOLERANCE,
        )
        if (gemm := peers.deep_gemm) is not None:
            room = 256
            padded = torch.zeros(num_experts, room, k, dtype=x.dtype, device="cuda")
            padded[:, :num_rows] = pick(x, order).view(num_experts, num_rows, k)
            padded_scales = torch.zeros(num_experts, k // 128, room, device="cuda").transpose(1, 2)
            padded_scales[:, :num_rows] = x_scales[order].view(num_experts, num_rows, -1)
            counts = torch.full((num_experts,), num_rows, dtype=torch.int32, device="cuda")
            out = torch.empty(num_experts, room, n, dtype=torch.bfloat16, device="cuda")

            def peer() -> Tensor:
                gemm.fp8_m_grouped_gemm_nt_masked(
                    (padded, padded_scales), (weight, weight_scales), out, counts, num_rows,
                    disable_ue8m0_cast=True,
                )  # fmt: skip
                return out[:, :num_rows]

            made.peer = peer
        return made

    return Case(
        "grouped_fp8_gemm decode",
        shape,
        2.0 * total * n * k,
        _num_bytes(num_experts, total, n, k),
        make,
        0.92,
        1.0,
        "fp8",
        ("DeepGEMM m_grouped_masked", shape),
    )


def _contiguous(num_experts: int, num_rows: int, n: int, k: int) -> Case:
    """Prefill: rows in the order of their experts."""
    shape = f"G{num_experts} x {num_rows} rows N{n} K{k}"
    total = num_experts * num_rows

    def make(peers: Peers) -> Made:
        from kernels.grouped_fp8_gemm import grouped_fp8_gemm

        x, x_scales = activations(total, k)
        weight, weight_scales = weights(num_experts, n, k)
        expected = product(x[-64:], x_scales[-64:], weight[-1], weight_scales[-1])
        offsets = _rows_of(num_experts, num_rows)
        made = Made(
            lambda: grouped_fp8_gemm(
                x, x_scales, weight, weight_scales, offsets, None, expected_rows=num_rows, backend="triton"
            ),
            lambda out: relative(out[-64:, -128:], expected),
            _TOLERANCE,
        )
        if (gemm := peers.deep_gemm) is not None:
            experts = torch.arange(num_experts, dtype=torch.int32, device="cuda")
            experts = experts.repeat_interleave(num_rows)
            out = torch.empty(total, n, dtype=torch.bfloat16, device="cuda")

            def peer() -> Tensor:
                gemm.m_grouped_fp8_gemm_nt_contiguous(
                    (x, x_scales), (weight, weight_scales), out, experts, disable_ue8m0_cast=True
                )
                return out

            made.peer = peer
        return made

    return Case(
        "grouped_fp8_gemm prefill",
        shape,
        2.0 * total * n * k,
        _num_bytes(num_experts, total, n, k),
        make,
        0.75,
        0.9,
        "fp8",
        ("DeepGEMM m_grouped_contiguous", shape),
    )

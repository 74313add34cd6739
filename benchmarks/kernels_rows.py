"""Cases of the operations on rows (quantise, norm, SwiGLU, gate and plan, sum), beside vLLM's."""

import torch
from torch import Tensor

from benchmarks.kernels_inputs import HIDDEN, Case, Made, Peers, randn, relative
from kernels.fp8_quant import FP8, dequantize_reference

_EPS = 1e-6
_SAME_VALUES = 3e-3  # a sum in another order moves a few values by one step of e4m3, 2^-4 of themselves


def cases() -> list[Case]:
    return [
        *(
            _quantize(rows, width)
            for rows, width in ((128, HIDDEN), (4096, 2048), (4096, HIDDEN), (4096, 16384))
        ),
        *(_norm(rows) for rows in (128, 4096)),
        *(_swiglu(rows) for rows in (1024, 32768)),
    ]


def _dequantized(quantized: tuple[Tensor, Tensor], rows: int = 256) -> Tensor:
    values, scales = quantized
    return dequantize_reference(values[:rows], scales[:rows], 128)


def _empty_quantized(rows: int, width: int) -> tuple[Tensor, Tensor]:
    values = torch.empty(rows, width, dtype=FP8, device="cuda")
    return values, torch.empty(width // 128, -(-rows // 4) * 4, device="cuda").t()[:rows]


def _quantize(rows: int, width: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.quantize_rows import quantize_rows, quantize_rows_reference

        x = randn(rows, width)
        expected = _dequantized(quantize_rows_reference(x[:256]))
        made = Made(
            lambda: quantize_rows(x, backend="triton"),
            lambda out: relative(_dequantized(out), expected),
            1e-6,
        )
        if peers.has_vllm:
            out = _empty_quantized(rows, width)

            def peer() -> tuple[Tensor, Tensor]:
                torch.ops._C.per_token_group_fp8_quant(x, *out, 128, 1e-10, -448.0, 448.0, True, True, True)
                return out

            made.peer = peer
        return made

    return Case(
        "quantize_rows",
        f"{rows}x{width}",
        0.0,
        rows * width * (3 + 4 / 128),
        make,
        1.5 if (rows, width) == (4096, HIDDEN) else None,
        2.0 if (rows, width) == (4096, HIDDEN) else None,
        recorded=("vLLM per_token_group_fp8_quant", f"{rows}x{width}"),
    )


def _norm(rows: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.norm_quantize import NormedRows, add_rms_norm_quantize, add_rms_norm_quantize_reference

        x, residual = randn(rows, HIDDEN), randn(rows, HIDDEN, scale=2.0).flip(0).contiguous()
        weight = randn(HIDDEN, dtype=torch.float32)
        expected = add_rms_norm_quantize_reference(x[:256], residual[:256], weight, _EPS, keep_normed=False)

        def flat(out: NormedRows) -> Tensor:
            assert out.values is not None
            assert out.scales is not None
            return torch.cat([_dequantized((out.values, out.scales)), out.residual[:256].float()])

        made = Made(
            lambda: add_rms_norm_quantize(x, residual, weight, _EPS, keep_normed=False, backend="triton"),
            lambda out: relative(flat(out), flat(expected)),
            _SAME_VALUES,
            peer_checked=False,
        )
        if peers.has_vllm:
            out, summed, in_bf16 = _empty_quantized(rows, HIDDEN), residual.clone(), weight.bfloat16()

            def peer() -> None:
                torch.ops._C.rms_norm_per_block_quant(
                    out[0], x, in_bf16, out[1], _EPS, None, summed, 128, True
                )

            made.peer = peer
        return made

    return Case(
        "norm_quantize",
        f"{rows}x{HIDDEN} residual",
        0.0,
        rows * HIDDEN * (7 + 4 / 128),
        make,
        1.8 if rows == 4096 else None,
        2.5 if rows == 4096 else None,
        recorded=("vLLM rms_norm_per_block_quant", f"{rows}x{HIDDEN} residual=True"),
    )


def _swiglu(rows: int, inner: int = 2048) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.swiglu_quantize import swiglu_quantize, swiglu_quantize_reference

        gate_up = randn(rows, 2 * inner)
        expected = _dequantized(swiglu_quantize_reference(gate_up[:256]))
        made = Made(
            lambda: swiglu_quantize(gate_up, backend="triton"),
            lambda out: relative(_dequantized(out), expected),
            _SAME_VALUES,
            peer_checked=False,
        )
        if peers.has_vllm:
            out = _empty_quantized(rows, inner)

            def peer() -> None:
                torch.ops._C.silu_and_mul_per_block_quant(out[0], gate_up, out[1], 128, None, True)

            made.peer = peer
        return made

    return Case(
        "swiglu_quantize",
        f"{rows}x{2 * inner} -> {inner}",
        0.0,
        rows * inner * (5 + 4 / 128),
        make,
        1.8 if rows == 32768 else None,
        2.5 if rows == 32768 else None,
        recorded=("vLLM silu_and_mul_per_block_quant", f"{rows}x{2 * inner} -> {inner}"),
    )

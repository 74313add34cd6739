"""Cases of what stands around the large kernels: bf16 products, inputs of attention.

Peers are torch's own where it has the operation; the others have none of the same extent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels_inputs import (
    HEADS,
    HIDDEN,
    INDEX_DIM,
    INDEX_HEADS,
    LATENT,
    PAGE,
    RECORD,
    ROPE,
    Case,
    Made,
    Peers,
    generator,
    randn,
    relative,
)
from kernels.fp8_quant import dequantize_reference

_NOPE = 128
_VOCAB = 129_280
_DRAWN: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "whole": {}, "top_p 0.95": {"top_p": 0.95}}
_Q_RANK = 1536
_ROUNDED = 4e-3


def cases() -> list[Case]:
    return [
        *(_gate(rows) for rows in (32, 128, 4096)),
        *(_absorb(rows) for rows in (32, 128)),
        *(_attention_inputs(rows) for rows in (128, 4096)),
        *(_latent_outputs(rows) for rows in (1, 32, 128)),
        *(_query_inputs(rows) for rows in (128, 4096)),
        *(_query_inputs(rows, absorb=True) for rows in (1, 32, 128)),
        *(_draw(rows, kind) for rows in (1, 64, 256) for kind in _DRAWN),
    ]


def _gate(num_rows: int, num_outputs: int = 256) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.bf16_gemm import bf16_gemm

        x, weight = randn(num_rows, HIDDEN), randn(num_outputs, HIDDEN, scale=0.02)
        expected = x[:64].double() @ weight.double().t()
        return Made(
            lambda: bf16_gemm(x, weight, backend="triton"),
            lambda out: relative(out[:64], expected),
            _ROUNDED,  # the peer rounds to bf16, ours does not
            peer=lambda: F.linear(x, weight),
        )

    return Case(
        "bf16_gemm",
        f"M{num_rows} N{num_outputs} K{HIDDEN}",
        2.0 * num_rows * num_outputs * HIDDEN,
        2.0 * (num_rows + num_outputs) * HIDDEN + 4 * num_rows * num_outputs,
        make,
        recorded=("torch matmul (gate)", f"M{num_rows} N{num_outputs} K{HIDDEN}"),
    )


def _draw(num_rows: int, kind: str) -> Case:
    """Tokens from logits that are peaked as a model's. The error is the share of other tokens."""

    def make(peers: Peers) -> Made:
        from kernels.draw import DrawParams, draw_tokens
        from model.sampling import SampleRow, sample
        from model.sampling_params import SamplingParams

        logits = 2 * torch.randn(num_rows, _VOCAB, generator=generator(), device="cuda")
        logits[:, :: _VOCAB // 64] *= 4
        p = SamplingParams(max_tokens=1, **_DRAWN[kind])
        params = [DrawParams(p.temperature, p.top_k, p.top_p, p.min_p, 0, 0, i) for i in range(num_rows)]
        expected = torch.tensor(sample(logits, [SampleRow(p, i) for i in range(num_rows)]).tokens)

        def check(out: Tensor) -> float:
            return float((out[0].cpu() != expected).double().mean())

        def multinomial() -> Tensor:
            return torch.multinomial(logits.softmax(-1), 1)

        peer = {"greedy": lambda: logits.argmax(-1), "whole": multinomial}.get(kind)
        return Made(lambda: draw_tokens(logits, params), check, 0.0, peer, False, "torch")

    return Case("draw_tokens", f"R{num_rows} {kind}", 0.0, 4.0 * num_rows * _VOCAB, make)


def _absorb(num_rows: int) -> Case:
    """Queries of 128 channels a head into the latent space."""

    def make(peers: Peers) -> Made:
        from kernels.bf16_gemm import per_head_gemm

        x, weight = randn(num_rows, HEADS, 128), randn(HEADS, LATENT, 128, scale=0.1)
        expected = torch.einsum("thk,hnk->thn", x.double(), weight.double())
        return Made(
            lambda: per_head_gemm(x, weight, backend="triton"),
            lambda out: relative(out, expected),
            _ROUNDED,
            peer=lambda: torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1),
            peer_name="torch.bmm",
        )

    return Case(
        "per_head_gemm",
        f"M{num_rows} H{HEADS} 128 -> {LATENT}",
        2.0 * num_rows * HEADS * 128 * LATENT,
        2.0 * HEADS * (LATENT * 128 + num_rows * (LATENT + 128)),
        make,
    )


def _latent_outputs(num_rows: int) -> Case:
    """Out of latent space, and quantised."""

    def make(peers: Peers) -> Made:
        from kernels.latent_outputs import latent_outputs

        attended, w_uv = randn(num_rows, HEADS, LATENT), randn(HEADS, 128, LATENT, scale=LATENT**-0.5)
        expected = torch.einsum("thk,hnk->thn", attended.double(), w_uv.double()).flatten(1)

        def check(out: tuple[Tensor, Tensor]) -> float:
            return relative(dequantize_reference(*out, 128), expected)

        return Made(lambda: latent_outputs(attended, w_uv, backend="triton"), check, 0.04)

    return Case(
        "latent_outputs",
        f"{num_rows} tokens",
        2.0 * num_rows * HEADS * 128 * LATENT,
        HEADS * (2.0 * LATENT * 128 + num_rows * (2 * LATENT + 132)),
        make,
    )


def _angles(num_rows: int) -> tuple[Tensor, Tensor]:
    turned = torch.rand(num_rows, ROPE // 2, generator=generator(), device="cuda") * 6.28
    return turned.cos(), turned.sin()


def _attention_inputs(num_rows: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.attention_inputs import (
            AttentionNorms,
            ProjectedColumns,
            attention_inputs,
            attention_inputs_reference,
        )

        columns = ProjectedColumns(_Q_RANK, LATENT, ROPE, INDEX_DIM)
        projected = randn(num_rows, columns.width)
        weights = (1 + randn(width, dtype=torch.float32, scale=0.1) for width in (_Q_RANK, LATENT, INDEX_DIM))
        norms = AttentionNorms(*weights, randn(INDEX_DIM, dtype=torch.float32, scale=0.1))
        cos, sin = _angles(num_rows)
        num_pages = 2 * -(-num_rows // PAGE)
        slots = torch.randperm(num_pages * PAGE, generator=generator(), device="cuda")[:num_rows]

        def pages() -> tuple[Tensor, Tensor]:
            sizes = (num_pages, PAGE, RECORD), (num_pages, PAGE * (INDEX_DIM + 4))
            return torch.zeros(sizes[0], dtype=torch.uint8, device="cuda"), torch.zeros(
                sizes[1], dtype=torch.uint8, device="cuda"
            )

        ours, expected = pages(), pages()
        some = projected, columns, norms, cos, sin, slots
        values, _ = attention_inputs_reference(*some, *expected, 1e-6)

        def check(out: tuple[Tensor, Tensor]) -> float:
            """The share of bytes that differ: values that a last bit moved by one step."""
            pairs = (out[0].view(torch.uint8), values.view(torch.uint8)), *zip(ours, expected, strict=True)
            return max(float((left != right).double().mean()) for left, right in pairs)

        return Made(lambda: attention_inputs(*some, *ours, 1e-6, backend="triton"), check, 5e-3)

    return Case(
        "attention_inputs",
        f"{num_rows} tokens",
        0.0,
        num_rows * (2.0 * (_Q_RANK + LATENT + ROPE + INDEX_DIM) + _Q_RANK + RECORD + INDEX_DIM + 4),
        make,
    )


def _query_inputs(num_rows: int, *, absorb: bool = False) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.query_inputs import query_inputs, query_inputs_reference

        index_q = randn(num_rows, INDEX_HEADS, INDEX_DIM)
        head_weights = randn(num_rows, INDEX_HEADS, dtype=torch.float32)
        q = randn(num_rows, HEADS, _NOPE + ROPE)
        w_uk = randn(HEADS, LATENT, _NOPE, scale=_NOPE**-0.5) if absorb else None
        q_latent = torch.zeros(num_rows, HEADS, LATENT + ROPE, dtype=torch.bfloat16, device="cuda")
        angles = _angles(num_rows)
        few = slice(0, 64)
        expected_latent = q_latent[few].clone()
        values, folded = query_inputs_reference(
            index_q[few], head_weights[few], q[few], expected_latent, *(each[few] for each in angles), w_uk
        )

        def check(out: tuple[Tensor, Tensor]) -> float:
            return max(
                relative(out[0][few].float(), values.float()),
                relative(out[1][few], folded),
                relative(q_latent[few], expected_latent),
            )

        return Made(
            lambda: query_inputs(index_q, head_weights, q, q_latent, *angles, w_uk, backend="triton"),
            check,
            1e-2,
        )

    absorbed = HEADS * _NOPE * LATENT
    return Case(
        "query_inputs",
        f"{num_rows} tokens" + (", absorbed" if absorb else ""),
        2.0 * num_rows * absorbed if absorb else 0.0,
        num_rows * (INDEX_HEADS * (3.0 * INDEX_DIM + 8) + 4 * HEADS * ROPE)
        + (2.0 * absorbed + 2 * num_rows * HEADS * (_NOPE + LATENT) if absorb else 0.0),
        make,
    )

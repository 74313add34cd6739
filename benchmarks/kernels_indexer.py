"""Cases of the indexer: scores of a prefill chunk and of decode, beside DeepGEMM's, and the selection's."""

import torch
from torch import Tensor

from benchmarks.kernels_inputs import (
    INDEX_DIM,
    INDEX_HEADS,
    PAGE,
    TOPK,
    Case,
    Made,
    Peers,
    generator,
    out_of_order_pages,
    pick,
    randn,
    relative,
)
from kernels.fp8_quant import FP8
from kernels.index_pages import planes

_CHUNK = 4096
_TOLERANCE = 5e-4  # fp32 sums of exact products in another order


def cases() -> list[Case]:
    return [
        *(_ragged(num_keys) for num_keys in (16384, 65536)),
        *(_paged(b, context, n) for n in (1, 2) for context in (4096, 32768, 131072) for b in (32, 128)),
        *(_select(rows, length) for length in (32768, 131072) for rows in (1, 32, 128)),
        *(_select(rows, length, narrow=True) for length in (32768, 131072) for rows in (32, 128)),
        _select_prefill(_CHUNK, 65536),
    ]


def _ragged(num_keys: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.ragged_index_logits import ragged_index_logits, ragged_index_logits_reference

        q = randn(_CHUNK, INDEX_HEADS, INDEX_DIM, dtype=FP8)
        keys = randn(num_keys, INDEX_DIM, dtype=FP8, scale=2.0)
        key_scales = torch.rand(num_keys, generator=generator(), device="cuda") + 0.5
        head_weights = randn(_CHUNK, INDEX_HEADS, dtype=torch.float32)
        visible = torch.arange(num_keys - _CHUNK, num_keys, device="cuda", dtype=torch.int32) + 1
        rows = torch.tensor([0, 17, _CHUNK // 2, _CHUNK - 1], device="cuda")
        expected = ragged_index_logits_reference(
            pick(q, rows), keys, key_scales, head_weights[rows], visible[rows].long()
        )
        seen = torch.arange(num_keys, device="cuda") < visible[rows].unsqueeze(1)
        made = Made(
            lambda: ragged_index_logits(q, keys, key_scales, head_weights, visible, backend="triton"),
            lambda out: relative(out[rows, :num_keys][seen], expected[seen]),
            _TOLERANCE,
        )
        if (gemm := peers.deep_gemm) is not None:
            first = torch.zeros_like(visible)
            made.peer = lambda: gemm.fp8_mqa_logits(
                q, (keys, key_scales), head_weights, first, visible, clean_logits=False
            )
        return made

    pairs = _CHUNK * (num_keys - _CHUNK) + _CHUNK * (_CHUNK + 1) / 2
    return Case(
        "ragged_index_logits",
        f"{_CHUNK} x {num_keys}",
        2 * pairs * INDEX_HEADS * INDEX_DIM,
        _CHUNK * INDEX_HEADS * (INDEX_DIM + 4) + num_keys * (INDEX_DIM + 4) + 4 * pairs,
        make,
        0.7,
        0.95,
        "fp8",
        ("DeepGEMM fp8_mqa_logits", f"S4096 SKV{num_keys} H64 D128 causal chunk at end"),
    )


def _index_pages(num_pages: int) -> Tensor:
    """[P, 64 * 132] uint8 of finite keys and scales."""
    pages = torch.empty(num_pages, PAGE * (INDEX_DIM + 4), dtype=torch.uint8, device="cuda")
    keys, scales = planes(pages, PAGE)
    random = generator()
    for start in range(0, num_pages, 8192):
        some = slice(start, start + 8192)
        drawn = torch.randn(*keys[some].shape, generator=random, device="cuda")
        keys[some] = drawn.to(FP8).view(torch.uint8)
        drawn = torch.rand(*scales[some].shape[:2], 1, generator=random, device="cuda") + 0.5
        scales[some] = drawn.view(torch.uint8)
    return pages


def _paged(num_sequences: int, context: int, rows_per_sequence: int) -> Case:
    num_rows = num_sequences * rows_per_sequence

    def make(peers: Peers) -> Made:
        from kernels.paged_index_logits import paged_index_logits, paged_index_logits_reference

        q = randn(num_rows, INDEX_HEADS, INDEX_DIM, dtype=FP8)
        pages = _index_pages(num_sequences * context // PAGE)
        head_weights = randn(num_rows, INDEX_HEADS, dtype=torch.float32)
        page_table = out_of_order_pages(num_sequences, context)
        visible = torch.full((num_rows,), context, dtype=torch.int32, device="cuda")
        last = slice(num_rows - rows_per_sequence, num_rows)
        expected = paged_index_logits_reference(
            q[last],
            pages,
            head_weights[last],
            page_table[-1:],
            visible[last],
            rows_per_sequence=rows_per_sequence,
            max_visible=context,
        )
        made = Made(
            lambda: paged_index_logits(
                q,
                pages,
                head_weights,
                page_table,
                visible,
                rows_per_sequence=rows_per_sequence,
                max_visible=context,
                backend="triton",
            ),
            lambda out: relative(out[last, :context], expected),
            _TOLERANCE,
        )
        if (gemm := peers.deep_gemm) is not None:
            lengths = visible.view(num_sequences, rows_per_sequence)
            metadata = gemm.get_paged_mqa_logits_metadata(lengths, PAGE, gemm.get_num_sms())
            queries = q.view(num_sequences, rows_per_sequence, INDEX_HEADS, INDEX_DIM)
            cache = pages.view(-1, PAGE, 1, INDEX_DIM + 4)
            made.peer = lambda: gemm.fp8_paged_mqa_logits(
                queries, cache, head_weights, lengths, page_table, metadata, context
            )
        return made

    return Case(
        "paged_index_logits",
        f"B{num_sequences} ctx{context} n{rows_per_sequence}",
        2.0 * num_rows * context * INDEX_HEADS * INDEX_DIM,
        num_sequences * context * (INDEX_DIM + 4) + num_rows * (4 * context + INDEX_HEADS * (INDEX_DIM + 4)),
        make,
        0.85,
        1.0,
        "fp8",
        ("DeepGEMM fp8_paged_mqa_logits", f"B{num_sequences} ctx{context} next_n{rows_per_sequence}"),
    )


def _select(num_rows: int, length: int, *, narrow: bool = False) -> Case:
    """Decode: all rows of one length, slots through the page table. The peer gives positions, in any order.

    `narrow`: scores around 5 with a spread of 0.3, as of real indexers; the peer's choice is wrong there, so
    its time is no bar.
    """
    peer_name = "vLLM cooperative_topk" if num_rows <= 32 else "vLLM persistent_topk"

    def make(peers: Peers) -> Made:
        from kernels.select_slots import select_slots, select_slots_reference

        logits = randn(num_rows, length, dtype=torch.float32)
        if narrow:
            logits.mul_(0.3).add_(5)
        visible = torch.full((num_rows,), length, dtype=torch.int32, device="cuda")
        page_table = out_of_order_pages(num_rows, length)
        some = torch.tensor(sorted({0, num_rows // 2, num_rows - 1}), device="cuda")
        settings = {"rows_per_sequence": 1, "k": TOPK, "max_visible": length}
        expected = select_slots_reference(logits[some], visible[some], page_table[some], **settings)
        made = Made(
            lambda: select_slots(logits, visible, page_table, **settings, backend="triton"),
            lambda out: _others(out[some], expected),
            0.0,
            peer_checked=False,
        )
        if peers.has_vllm:
            select = torch.ops._C.cooperative_topk if num_rows <= 32 else torch.ops._C.persistent_topk
            out = torch.empty(num_rows, TOPK, dtype=torch.int32, device="cuda")
            workspace = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
            made.peer = lambda: select(logits, visible, out, workspace, TOPK, length)
        return made

    return Case(
        "select_slots decode",
        f"{num_rows} x {length}{' narrow' if narrow else ''}",
        0.0,
        4.0 * num_rows * (length + TOPK),
        make,
        None if narrow else 1.0,
        None if narrow else 1.5,
        recorded=(peer_name, f"rows{num_rows} len{length} k2048 {'indexer-like' if narrow else 'randn'}"),
    )


def _others(out: Tensor, expected: Tensor) -> float:
    """The share of entries that the sets of a row do not have in common."""
    return float((out.sort(-1).values != expected.sort(-1).values).double().mean())


def _select_prefill(num_rows: int, length: int) -> Case:
    def make(peers: Peers) -> Made:
        from kernels.select_slots import select_slots, select_slots_reference

        logits = randn(num_rows, length, dtype=torch.float32)
        visible = torch.arange(length - num_rows, length, dtype=torch.int32, device="cuda") + 1
        some = torch.tensor([0, 1, num_rows // 2, num_rows - 1], device="cuda")
        settings = {"rows_per_sequence": num_rows, "k": TOPK, "max_visible": length}
        expected = select_slots_reference(logits[some], visible[some], None, **settings)
        made = Made(
            lambda: select_slots(logits, visible, None, **settings, backend="triton"),
            lambda out: _others(out[some], expected),
            0.0,
        )
        if peers.has_vllm:
            first, out = (
                torch.zeros_like(visible),
                torch.empty(num_rows, TOPK, dtype=torch.int32, device="cuda"),
            )

            def peer() -> Tensor:
                torch.ops._C.top_k_per_row_prefill(
                    logits, first, visible, out, num_rows, logits.stride(0), 1, TOPK
                )
                return out

            made.peer = peer
        return made

    lengths = num_rows * (length - num_rows) + num_rows * (num_rows + 1) / 2
    return Case(
        "select_slots prefill",
        f"{num_rows} x {length}",
        0.0,
        4 * lengths + 4 * num_rows * TOPK,
        make,
        1.0,
        1.5,
        recorded=(
            "vLLM top_k_per_row_prefill",
            f"rows{num_rows} len{length - num_rows + 1}..{length} k2048 randn",
        ),
    )

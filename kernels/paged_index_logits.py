"""The lightning indexer's scores in decode: a few queries of every sequence against its keys in pages.

    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])        for s < visible[t]
Row t belongs to sequence t // n. What a row does not see is left unwritten, or holds a score that means
nothing: selection honours `visible`.
Shapes: S sequences, n rows per sequence, T = S * n, H index heads, D index_head_dim, P pages in the cache.

On a GPU this reads D + 4 bytes a key and writes 4 n, once, and is as fast as the memory if enough of it is
underway: a program takes some consecutive pages of one sequence, loads the next ones while it scores, and
serves all n rows from each. The id of a page is carried through the loop one step ahead of the page itself,
because a load whose address is loaded in the same step is not overlapped with anything.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.fp8_quant import FP8
from kernels.index_logits import index_logits_reference
from kernels.index_pages import read_index_keys_fp8

PAGE_SIZE = 64
_PAD = 64  # rows of the output are a multiple of this many scores apart
_OPERATION = "paged_index_logits"


class Config(NamedTuple):
    """pages: how many consecutive pages a program takes."""

    pages: int
    num_warps: int
    num_stages: int


def paged_index_logits(
    q: Tensor,
    index_pages: Tensor,
    weights: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
    backend: Backend,
) -> Tensor:
    """Score each sequence's queries against its own pages.

    Args:
        q: [T, H, D] e4m3.
        index_pages: [P, 64 * (D + 4)] uint8, planar (kernels/index_pages.py).
        weights: [T, H] float32, with every constant and query scale in it.
        page_table: [S, max_pages] any integer dtype; entries beyond what a sequence sees are not read.
        visible: [T] any integer dtype, how many of its sequence's keys a row sees, at most max_visible.
        rows_per_sequence: n, 1 to 4.
        max_visible: a bound known to the host, and the width of the output.

    Returns:
        [T, max_visible] float32, rows padded; scores at s >= visible[t] are not defined.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others; all but rows of the page table contiguous.
    """
    _check(q, index_pages, weights, page_table, visible, rows_per_sequence, max_visible)
    require_triton_or_reference(backend, _OPERATION)
    if backend == "reference":
        return paged_index_logits_reference(
            q,
            index_pages,
            weights,
            page_table,
            visible,
            rows_per_sequence=rows_per_sequence,
            max_visible=max_visible,
        )
    num_heads, index_head_dim = q.shape[1:]
    for size, what in ((num_heads, "heads"), (index_head_dim, "head dim")):
        require(size & (size - 1) == 0, _OPERATION, f"{what} {size} is not a power of two")
    require(index_head_dim >= 32, _OPERATION, f"head dim {index_head_dim} is below 32")
    require_aligned(_OPERATION, pages=index_pages)
    return launch(
        q,
        index_pages,
        weights,
        page_table,
        visible,
        rows_per_sequence=rows_per_sequence,
        max_visible=max_visible,
        config=config_for(page_table.shape[0], max_visible, rows_per_sequence),
    )


def paged_index_logits_reference(
    q: Tensor,
    index_pages: Tensor,
    weights: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
) -> Tensor:
    out = torch.full((q.shape[0], max_visible), float("-inf"), device=q.device)
    for sequence in range(page_table.shape[0]):
        rows = slice(sequence * rows_per_sequence, (sequence + 1) * rows_per_sequence)
        seen = int(visible[rows].max())
        if seen > 0:
            page_ids = page_table[sequence, : -(-seen // PAGE_SIZE)].long()
            keys, scales = read_index_keys_fp8(index_pages, page_ids, PAGE_SIZE, backend="reference")
            out[rows, :seen] = index_logits_reference(
                q[rows], keys[:seen], scales[:seen], weights[rows], visible[rows]
            )
    return out


def config_for(num_sequences: int, max_visible: int, rows_per_sequence: int) -> Config:
    """From the sweeps of 2026-11-22 on an H100: four programs a processor where there are pages for them, of
    at most 16 pages (8 of a long context with n = 1, where reading the queries costs little)."""
    total = num_sequences * triton.cdiv(max_visible, PAGE_SIZE)
    most = 16 if rows_per_sequence > 1 or total <= 8192 else 8
    pages = 1
    while pages < most and total // (2 * pages) >= 512:
        pages *= 2
    return Config(pages, num_warps=4, num_stages=3 if pages > 2 and total <= 32768 else 4)


def launch(
    q: Tensor,
    index_pages: Tensor,
    weights: Tensor,
    page_table: Tensor,
    visible: Tensor,
    *,
    rows_per_sequence: int,
    max_visible: int,
    config: Config,
) -> Tensor:
    """The kernel with a given configuration; arguments as `paged_index_logits`."""
    num_rows, num_heads, index_head_dim = q.shape
    stride = triton.cdiv(max_visible, _PAD) * _PAD
    out = torch.empty(num_rows, stride, dtype=torch.float32, device=q.device)
    if num_rows == 0 or max_visible == 0:
        return out[:, :max_visible]
    grid = (triton.cdiv(triton.cdiv(max_visible, PAGE_SIZE), config.pages), page_table.shape[0])
    _score_pages[grid](
        out,
        q,
        index_pages.view(FP8),
        index_pages.view(torch.float32),
        weights,
        page_table,
        visible,
        page_table.stride(0),
        stride,
        config.pages,
        N=rows_per_sequence,
        H=num_heads,
        D=index_head_dim,
        PAGE=PAGE_SIZE,
        # (row, head) columns of a product: a power of two, and as many as the tensor cores ask for.
        COLUMNS=max(16, triton.next_power_of_2(rows_per_sequence) * num_heads),
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out[:, :max_visible]


def _check(
    q: Tensor,
    index_pages: Tensor,
    weights: Tensor,
    page_table: Tensor,
    visible: Tensor,
    rows_per_sequence: int,
    max_visible: int,
) -> None:
    num_rows, num_heads, index_head_dim = q.shape
    page_bytes = PAGE_SIZE * (index_head_dim + 4)
    require(q.dtype == FP8, _OPERATION, f"queries are {q.dtype}, not e4m3")
    require(
        index_pages.dtype == torch.uint8 and index_pages.shape[1] == page_bytes,
        _OPERATION,
        f"pages are {index_pages.shape[1]} x {index_pages.dtype}, not {page_bytes} bytes",
    )
    require(1 <= rows_per_sequence <= 4, _OPERATION, f"{rows_per_sequence} rows per sequence, not 1 to 4")
    require(
        page_table.shape[0] * rows_per_sequence == num_rows,
        _OPERATION,
        f"{num_rows} rows, {page_table.shape[0]} sequences of {rows_per_sequence}",
    )
    require(
        page_table.shape[1] * PAGE_SIZE >= max_visible,
        _OPERATION,
        f"{page_table.shape[1]} pages hold fewer than {max_visible} keys",
    )
    require(page_table.stride(1) == 1, _OPERATION, "a row of the page table must be contiguous")
    require(weights.shape == (num_rows, num_heads), _OPERATION, f"weights are {tuple(weights.shape)}")
    require(visible.shape == (num_rows,), _OPERATION, f"visible is {tuple(visible.shape)}")
    for tensor, name in ((q, "q"), (index_pages, "pages"), (weights, "weights"), (visible, "visible")):
        require(tensor.is_contiguous(), _OPERATION, f"{name} must be contiguous")


@triton.jit
def _score_pages(
    out,  # [T, stride]
    q,  # [T, H, D]
    pages,  # [P, PAGE * (D + 4)] e4m3
    page_scales,  # the same memory as float32, [P, PAGE * (D + 4) / 4]
    weights,  # [T, H]
    page_table,  # [S, max_pages]
    visible,  # [T]
    table_stride,
    stride,
    pages_per_program,
    N: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PAGE: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROWS: tl.constexpr = COLUMNS // H
    sequence = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * pages_per_program
    row = tl.arange(0, ROWS)
    seen = tl.max(tl.load(visible + sequence * N + row, mask=row < N, other=0).to(tl.int32), 0)
    last = tl.minimum(tl.cdiv(seen, PAGE), first + pages_per_program)
    if first >= last:
        return

    table = page_table + sequence * table_stride
    page = tl.load(table + first).to(tl.int32)
    column = tl.arange(0, COLUMNS)
    present = column < N * H
    d = tl.arange(0, D)
    base = sequence * (N * H)
    queries = tl.load(q + (base + column[:, None]) * D + d[None, :], mask=present[:, None], other=0.0)
    weight = tl.load(weights + base + column, mask=present, other=0.0)  # [COLUMNS]
    offset = tl.arange(0, PAGE)
    scale_of = page_scales + (PAGE * D // 4) + offset
    to = out + (sequence * N + row[None, :]) * stride + offset[:, None]  # [PAGE, ROWS]
    stored = tl.broadcast_to(row[None, :] < N, (PAGE, ROWS))
    for i in tl.range(first, last, num_stages=STAGES):
        following = tl.load(table + tl.minimum(i + 1, last - 1)).to(tl.int32)
        scale = tl.load(scale_of + page.to(tl.int64) * (PAGE * (D + 4) // 4))
        rows = pages + page.to(tl.int64) * (PAGE * (D + 4)) + offset[:, None] * D
        tile = tl.load(rows + d[None, :])  # [PAGE, D]
        per_head = tl.dot(tile, queries.T)  # [PAGE, COLUMNS]
        per_head = tl.maximum(per_head, 0.0) * weight[None, :]
        scores = tl.sum(tl.reshape(per_head, (PAGE, ROWS, H)), 2) * scale[:, None]
        tl.store(to + i * PAGE, scores, mask=stored)
        page = following

"""The k best-scored keys of each query, exactly: higher score first, then the lower index (kernels/topk.py).

Row t belongs to sequence t // n and sees the first visible[t] scores; what lies behind is not looked at.
Shapes: T rows, S sequences, L scores a row.

What it costs on an H100, as the choice of kernel assumes (`config_for`):
- a row in the registers of one program (up to 32,768 scores): 2 us to start and read, 0.2 to 0.5 us for each
  of 6 to 10 counts, 2 us to write; rows beyond the number of SMs queue up;
- longer rows, one program a row: the scores are read once, at the memory's rate if there are rows enough,
  else at some 60 bytes a nanosecond; before that a sample is searched, after it 4,096 candidates;
- longer rows, few of them: the reading is shared by several programs of a first launch.
Hopper has kernels of its own for the same ways (`select_shared_rows.py`), with 4,097 to 163,840 scores.
"""

from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import Backend, require, require_triton_or_reference
from kernels.device import is_hopper
from kernels.select_long import mark_shares, select_from_shares, select_rows_by_sample
from kernels.select_shared_rows import mark_parts, select_by_marks, select_from_parts, select_in_registers
from kernels.select_threshold import (
    count_above,
    float_of,
    load_scores,
    mean_and_spread,
    normal_score,
    store_none,
    store_selected,
    threshold_key,
)
from kernels.topk import topk_reference

PAGE_SIZE = 64
MOST_RESIDENT = 32768  # scores a program can hold in registers and count in half a word
MOST_MARKED = 163840  # scores whose marks fit the shared memory set aside
_OPERATION = "select_slots"


class Config(NamedTuple):
    """resident: block scores in the registers of a program; sampled: one program a row, reading tiles of
    block scores; shared: the same with splits programs a row for the reading, whose warps are share_warps."""

    kind: Literal["resident", "sampled", "shared", "registers", "marked", "parts"]
    block: int
    num_warps: int
    pieces: int = 1  # resident: in how many goes the registers are written out
    programs: int = 0  # sampled: how many are launched, each takes rows in turn
    splits: int = 0
    share_warps: int = 0
    sample: int = 4096
    candidates: int = 4096  # at least k, a power of two
    num_stages: int = 1
    registers: int | None = None  # at most so many a thread, where that lets more programs share an SM


def select_slots(
    logits: Tensor,
    visible: Tensor,
    page_table: Tensor | None,
    *,
    rows_per_sequence: int,
    k: int,
    max_visible: int,
    backend: Backend,
) -> Tensor:
    """Select.

    Args:
        logits: [T, L] float32, rows contiguous; -inf marks what must not be selected. No NaN where visible.
        visible: [T] any integer dtype, contiguous, at most max_visible.
        page_table: [S, max_pages] any integer dtype, rows contiguous, to give slots; None to give positions.
        rows_per_sequence: n.
        k: how many to select; rows with fewer finite scores select all of them.
        max_visible: a bound known to the host, at most L.

    Returns:
        [T, k] int32: in ascending order of position, then -1.

    Raises:
        UnsupportedKernel: shapes, dtypes or layouts are others, or k is above 4,096.
    """
    _check(logits, visible, page_table, rows_per_sequence, k, max_visible)
    require_triton_or_reference(backend, _OPERATION)
    if backend == "reference":
        return select_slots_reference(
            logits, visible, page_table, rows_per_sequence=rows_per_sequence, k=k, max_visible=max_visible
        )
    require(k <= 4096, _OPERATION, f"k is {k}, above 4,096")
    return launch(
        logits,
        visible,
        page_table,
        rows_per_sequence=rows_per_sequence,
        k=k,
        max_visible=max_visible,
        config=config_for(logits.shape[0], max_visible, k, nvidia=is_hopper(logits.device)),
    )


def select_slots_reference(
    logits: Tensor,
    visible: Tensor,
    page_table: Tensor | None,
    *,
    rows_per_sequence: int,
    k: int,
    max_visible: int,
) -> Tensor:
    scores = logits[:, :max_visible]
    hidden = torch.arange(max_visible, device=logits.device) >= visible.unsqueeze(1)
    positions = topk_reference(scores.masked_fill(hidden, float("-inf")), k)
    if page_table is None or page_table.shape[1] == 0:
        return positions
    sequence = torch.arange(len(positions), device=logits.device).unsqueeze(1) // rows_per_sequence
    pages = page_table[sequence, positions.clamp_min(0).long() // PAGE_SIZE].to(torch.int32)
    return (pages * PAGE_SIZE + positions % PAGE_SIZE).masked_fill_(positions < 0, -1)


def config_for(num_rows: int, max_visible: int, k: int, *, nvidia: bool = False) -> Config:
    """What the sweep of 2026-11-22 on an H100 found best; `nvidia`: among the kernels of
    `select_shared_rows.py` too, whose dependent launches want Hopper."""
    if nvidia and k <= 2048 and 4096 < max_visible <= MOST_MARKED:
        return _nvidia_config(num_rows, max_visible)
    return _portable_config(num_rows, max_visible, k)


def _nvidia_config(num_rows: int, max_visible: int) -> Config:
    if num_rows <= 64 and max_visible > 16384:  # programs enough for every SM
        part, warps = (
            (2048, 8) if num_rows <= 4 else (8192, 16) if max_visible <= MOST_RESIDENT else (8192, 8)
        )
        return Config("parts", part, 16, share_warps=warps)
    if num_rows <= 264 and max_visible <= MOST_RESIDENT:
        block = triton.next_power_of_2(max_visible)
        return Config("registers", block, 32, pieces=block // 4096)
    if num_rows <= 132:
        return Config("marked", 8192, 32, programs=num_rows)
    # Two programs share an SM: one reads while the other searches.
    return Config("marked", 2048, 16, programs=264, num_stages=4, registers=64)


def _portable_config(num_rows: int, max_visible: int, k: int) -> Config:
    """By the costs above; `candidates` is twice k, so that a sample can be off by a third either way."""
    candidates = max(2048, 2 * triton.next_power_of_2(k))
    sample = min(4096, candidates)
    if max_visible <= MOST_RESIDENT and not (num_rows > 264 and max_visible > 8192):
        block = max(1024, triton.next_power_of_2(max_visible))
        return Config("resident", block, max(4, min(32, block // 1024)), pieces=max(1, block // 4096))
    if num_rows <= 16:
        return Config(
            "shared", 2048, 16, splits=16, share_warps=8, sample=sample, candidates=candidates, num_stages=2
        )
    if num_rows <= 132:  # a program has an SM for itself
        return Config(
            "sampled", 8192, 16, programs=num_rows, sample=sample, candidates=candidates, num_stages=3
        )
    return Config(  # two programs share an SM: one reads while the other searches
        "sampled",
        4096,
        8,
        programs=264,
        sample=sample,
        candidates=candidates,
        num_stages=2,
        registers=128,
    )


def launch(
    logits: Tensor,
    visible: Tensor,
    page_table: Tensor | None,
    *,
    rows_per_sequence: int,
    k: int,
    max_visible: int,
    config: Config,
) -> Tensor:
    """The kernels of a given configuration; other arguments as `select_slots`."""
    num_rows = logits.shape[0]
    out = torch.empty(num_rows, k, dtype=torch.int32, device=logits.device)
    if num_rows == 0:
        return out
    table = visible if page_table is None else page_table  # any pointer: it is not read
    table_stride = 0 if page_table is None else page_table.stride(0)
    vector = 4 if _padded(logits) else 1
    common = {
        "N": rows_per_sequence,
        "K_BLOCK": triton.next_power_of_2(k),
        "TRANSLATE": page_table is not None,
        "PAGE": PAGE_SIZE,
        "num_warps": config.num_warps,
        "maxnreg": config.registers,
    }
    if config.kind in ("resident", "registers"):
        kernel = _select_resident if config.kind == "resident" else select_in_registers
        kernel[(num_rows,)](
            logits,
            visible,
            table,
            out,
            logits.stride(0),
            table_stride,
            k,
            BLOCK=config.block,
            PIECES=config.pieces,
            VECTOR=vector,
            **common,
        )
        return out
    wanted = round((k * config.candidates) ** 0.5)  # as far from too few as from too many
    num_words = triton.next_power_of_2(triton.cdiv(max_visible, 32))
    size = num_words + config.candidates
    long = {
        "SAMPLE": config.sample,
        "TILE": config.block,
        "CANDIDATES": config.candidates,
        "WORDS": num_words,
    }
    long |= {"STAGES": config.num_stages, "VECTOR": vector}
    if config.kind == "marked":
        programs = min(num_rows, config.programs)
        select_by_marks[(programs,)](
            logits, visible, table, out, num_rows, logits.stride(0), table_stride, k, wanted, **long, **common
        )
        return out
    if config.kind == "sampled":
        programs = min(num_rows, config.programs)
        scratch = torch.empty(programs, size, dtype=torch.int32, device=logits.device)
        select_rows_by_sample[(programs,)](
            logits,
            visible,
            table,
            out,
            scratch,
            num_rows,
            logits.stride(0),
            table_stride,
            k,
            wanted,
            **long,
            **common,
        )
        return out
    if config.kind == "parts":
        marks = torch.empty(num_rows, num_words, dtype=torch.int32, device=logits.device)
        thresholds = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        mark_parts[(triton.cdiv(max_visible, config.block), num_rows)](
            logits,
            visible,
            marks,
            thresholds,
            logits.stride(0),
            wanted,
            SAMPLE=config.sample,
            PART=config.block,
            WORDS=num_words,
            CANDIDATES=config.candidates,
            VECTOR=vector,
            num_warps=config.share_warps,
        )
        select_from_parts[(num_rows,)](
            logits,
            visible,
            table,
            out,
            marks,
            thresholds,
            logits.stride(0),
            table_stride,
            k,
            wanted,
            **long,
            launch_pdl=True,
            **common,
        )
        return out
    share = triton.cdiv(triton.cdiv(max_visible, config.splits), config.block) * config.block
    scratch = torch.empty(num_rows, size, dtype=torch.int32, device=logits.device)
    guesses = torch.empty(num_rows, 3, dtype=torch.float32, device=logits.device)
    mark_shares[(triton.cdiv(max_visible, share), num_rows)](
        logits,
        visible,
        scratch,
        guesses,
        logits.stride(0),
        wanted,
        share,
        num_warps=config.share_warps,
        **long,
    )
    select_from_shares[(num_rows,)](
        logits,
        visible,
        table,
        out,
        scratch,
        guesses,
        logits.stride(0),
        table_stride,
        k,
        wanted,
        **long,
        **common,
    )
    return out


def _padded(logits: Tensor) -> bool:
    """Whether every row begins at a multiple of 64 bytes and has that much memory to its end."""
    end = logits.storage_offset() + logits.shape[0] * logits.stride(0)
    behind = logits.untyped_storage().nbytes() >= end * logits.element_size()
    return behind and logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0


def _check(
    logits: Tensor,
    visible: Tensor,
    page_table: Tensor | None,
    rows_per_sequence: int,
    k: int,
    max_visible: int,
) -> None:
    num_rows = logits.shape[0]
    require(logits.dtype == torch.float32, _OPERATION, f"logits must be float32, not {logits.dtype}")
    require(logits.stride(1) == 1, _OPERATION, "the logits of a row must be contiguous")
    require(k > 0, _OPERATION, f"k must be positive, not {k}")
    require(rows_per_sequence > 0, _OPERATION, f"{rows_per_sequence} rows per sequence")
    require(visible.shape == (num_rows,), _OPERATION, f"visible is {tuple(visible.shape)}")
    require(visible.is_contiguous(), _OPERATION, "visible must be contiguous")
    require(
        max_visible <= logits.shape[1],
        _OPERATION,
        f"{logits.shape[1]} logits a row, fewer than {max_visible}",
    )
    if page_table is not None:
        require(page_table.stride(1) == 1, _OPERATION, "a row of the page table must be contiguous")
        require(
            page_table.shape[0] * rows_per_sequence >= num_rows
            and page_table.shape[1] * PAGE_SIZE >= max_visible,
            _OPERATION,
            f"a page table of {tuple(page_table.shape)} for {num_rows} rows of {max_visible}",
        )


@triton.jit
def _select_resident(
    logits,  # [T, stride]
    visible,  # [T]
    page_table,  # [S, max_pages]
    out,  # [T, k]
    stride,
    table_stride,
    k,
    N: tl.constexpr,
    K_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECES: tl.constexpr,
    VECTOR: tl.constexpr,
    TRANSLATE: tl.constexpr,
    PAGE: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + t).to(tl.int32)
    row = logits + t * stride
    piece = tl.arange(0, BLOCK // PIECES)
    pieces = ()
    for i in tl.static_range(PIECES):
        x = load_scores(row, i * (BLOCK // PIECES) + piece, seen, VECTOR)
        pieces = pieces + (x,)  # type: ignore[assignment]  # noqa: RUF005
    guess = tl.zeros((), tl.float32)
    spread = tl.zeros((), tl.float32)
    if seen > k:
        mean, spread = mean_and_spread(pieces)
        guess = mean + normal_score(k.to(tl.float32) / seen.to(tl.float32)) * spread
    threshold = float_of(threshold_key(pieces, k, k, guess, spread * 0.15))
    room = k - count_above(pieces, threshold)
    table = page_table + (t // N) * table_stride
    to = out + t * k
    selected = tl.zeros((), tl.int32)
    for i in tl.static_range(PIECES):
        position = i * (BLOCK // PIECES) + piece
        stored, room = store_selected(
            pieces[i], position, threshold, room, to + selected, table, TRANSLATE, PAGE
        )
        selected += stored
    store_none(to, selected, k, K_BLOCK)

"""The lists of a dispatch plan, made of marks: which tokens each expert, and each group of experts, gets.

`dispatch_plan.py` launches what stands here. A mark [expert, token] is 1 + j where the expert is the token's
j-th and 0 elsewhere; [group, token] it is 0 or 1. A list holds the marked tokens of a row in ascending order.
Shapes: E experts, G groups; `padded` is the number of tokens with those that were added, none of them marked.
"""

import triton
import triton.language as tl


@triton.jit
def _load_marks(marks_ptr, first_row, stop_row, first_token, padded, n: tl.constexpr, tokens: tl.constexpr):
    """[n, tokens] int32; past the first-level cache, as other programs may just have written them."""
    rows = first_row + tl.arange(0, n)[:, None]
    columns = first_token + tl.arange(0, tokens)[None, :]
    mask = (columns < padded) & (rows < stop_row)
    marks = marks_ptr + rows * padded.to(tl.int64) + columns
    return tl.load(marks, mask=mask, other=0, cache_modifier=".cg").to(tl.int32)


@triton.jit
def _place(
    rows_ptr,
    places_ptr,
    marks,
    begins,
    first_token,
    of_experts: tl.constexpr,
    K: tl.constexpr,
    n: tl.constexpr,
):
    """Write the tokens [n] from `first_token` on into the lists that go on at `begins` [lists]."""
    ones = (marks > 0).to(tl.int32)
    places = begins[:, None] + tl.cumsum(ones, axis=1) - ones
    tokens = tl.broadcast_to(first_token + tl.arange(0, n)[None, :], marks.shape)
    tl.store(rows_ptr + places, tokens, mask=marks > 0)
    if of_experts:
        tl.store(places_ptr + tokens * K + marks - 1, places, mask=marks > 0)


@triton.jit
def list_all(
    marks_ptr, node_marks_ptr, offsets_ptr, rows_ptr, places_ptr, node_counts_ptr, node_tokens_ptr,
    num_tokens, padded, first_expert, G: tl.constexpr, K: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    PLAN_TOKENS: tl.constexpr, PLAN_EXPERTS: tl.constexpr,
):  # fmt: skip
    """All lists by one program."""
    stop: tl.constexpr = NUM_EXPERTS
    num_rows = 0
    tl.store(offsets_ptr, 0)
    for first in tl.static_range(0, NUM_EXPERTS, PLAN_EXPERTS):
        marks = _load_marks(
            marks_ptr, first_expert + first, first_expert + stop, 0, padded, PLAN_EXPERTS, PLAN_TOKENS
        )
        counts = tl.sum((marks > 0).to(tl.int32), axis=1)
        ends = num_rows + tl.cumsum(counts, axis=0)
        local = first + tl.arange(0, PLAN_EXPERTS)
        tl.store(offsets_ptr + 1 + local, ends, mask=local < NUM_EXPERTS)
        _place(rows_ptr, places_ptr, marks, ends - counts, 0, True, K, PLAN_TOKENS)
        num_rows += tl.sum(counts, axis=0)
    groups = tl.arange(0, G)
    marks = _load_marks(node_marks_ptr, 0, G, 0, padded, G, PLAN_TOKENS)
    tl.store(node_counts_ptr + groups, tl.sum(marks, axis=1))
    _place(node_tokens_ptr, places_ptr, marks, groups * num_tokens, 0, False, K, PLAN_TOKENS)


@triton.jit
def list_rows(
    marks_ptr,  # [E, padded]
    node_marks_ptr,  # [G, padded]
    part_counts_ptr,  # [parts, E]
    part_node_counts_ptr,  # [parts, G]
    offsets_ptr,  # [NUM_EXPERTS + 1]
    rows_ptr,  # [T * K]
    places_ptr,  # [T, K]
    node_counts_ptr,  # [G]
    node_tokens_ptr,  # [G, T]
    num_tokens,
    padded,
    num_parts,
    first_expert,
    E: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr,
    PLAN_TOKENS: tl.constexpr,
    PLAN_EXPERTS: tl.constexpr,
    PARTS: tl.constexpr,  # that make the tokens of one program
):
    """The share of PLAN_TOKENS tokens in the lists of PLAN_EXPERTS experts, or of all groups. What stands
    before it in each list, every program adds up from the counts of all parts."""
    first_token = tl.program_id(0) * PLAN_TOKENS
    parts_before = tl.program_id(0) * PARTS
    if tl.program_id(1) == tl.num_programs(1) - 1:
        _list_groups(
            node_marks_ptr, part_node_counts_ptr, node_counts_ptr, node_tokens_ptr, num_tokens, padded,
            num_parts, first_token, parts_before, G, K, PLAN_TOKENS,
        )  # fmt: skip
    else:
        _list_experts(
            marks_ptr, part_counts_ptr, offsets_ptr, rows_ptr, places_ptr, padded, num_parts, first_expert,
            tl.program_id(1) * PLAN_EXPERTS, first_token, parts_before, E, K, NUM_EXPERTS, BLOCK_EXPERTS,
            PLAN_TOKENS, PLAN_EXPERTS,
        )  # fmt: skip


@triton.jit
def _list_groups(
    marks_ptr, part_counts_ptr, counts_ptr, tokens_ptr, num_tokens, padded, num_parts, first_token,
    parts_before, G: tl.constexpr, K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    groups = tl.arange(0, G)
    counts, before = _sum_parts(part_counts_ptr, num_parts, parts_before, 0, G, G, G)
    tl.store(counts_ptr + groups, counts)  # every program the same
    marks = _load_marks(marks_ptr, 0, G, first_token, padded, G, TOKENS)
    _place(tokens_ptr, counts_ptr, marks, groups * num_tokens + before, first_token, False, K, TOKENS)


@triton.jit
def _list_experts(
    marks_ptr, part_counts_ptr, offsets_ptr, rows_ptr, places_ptr, padded, num_parts, first_expert,
    first_listed, first_token, parts_before, E: tl.constexpr, K: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    BLOCK_EXPERTS: tl.constexpr, TOKENS: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    first, stop = first_expert + first_listed, first_expert + NUM_EXPERTS
    marks = _load_marks(marks_ptr, first, stop, first_token, padded, EXPERTS, TOKENS)
    counts, before = _sum_parts(part_counts_ptr, num_parts, parts_before, first, stop, E, EXPERTS)
    others, _ = _sum_parts(part_counts_ptr, num_parts, 0, first_expert, first, E, BLOCK_EXPERTS)
    ends = tl.sum(others, axis=0) + tl.cumsum(counts, axis=0)
    listed = first_listed + tl.arange(0, EXPERTS)
    tl.store(offsets_ptr, 0)
    tl.store(offsets_ptr + 1 + listed, ends, mask=listed < NUM_EXPERTS)
    _place(rows_ptr, places_ptr, marks, ends - counts + before, first_token, True, K, TOKENS)


@triton.jit
def _sum_parts(counts_ptr, num_parts, parts_before, first, stop, STRIDE: tl.constexpr, N: tl.constexpr):
    """Columns first to stop [N] of [parts, STRIDE] uint8, summed over all parts and over the first ones."""
    columns = first + tl.arange(0, N)[None, :]
    counts = tl.zeros([N], dtype=tl.int32)
    before = tl.zeros([N], dtype=tl.int32)
    for start in range(0, num_parts, 64):
        parts = start + tl.arange(0, 64)[:, None]
        mask = (parts < num_parts) & (columns < stop)
        part = tl.load(counts_ptr + parts * STRIDE + columns, mask=mask, other=0).to(tl.int32)
        counts += tl.sum(part, axis=0)
        before += tl.sum(tl.where(parts < parts_before, part, 0), axis=0)
    return counts, before

"""The lists of a dispatch plan: which tokens each expert, and each group of experts, gets, ascending.

`list_rows.py` launches what stands here. Few tokens: a program for every expert looks at all choices, and
the number of those that come before its own is where its list begins. Many: tokens are cut into parts, whose
choices are counted first; a program then places those of one part.
Shapes: T tokens, K experts a token, E experts, G groups, P parts of TOKENS tokens.
"""

import triton
import triton.language as tl


@triton.jit
def list_all(
    choices_ptr,  # [T, K] integers; unless IS_CHOICE, readable up to TOKENS * BLOCK_K
    offsets_ptr,  # [NUM_EXPERTS + 1]
    rows_ptr,  # [T * K]
    places_ptr,  # [T, K]
    node_counts_ptr,  # [G]
    node_tokens_ptr,  # [G, T]
    num_tokens,
    first_expert,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_CHOICE: tl.constexpr,
):
    """A program for every expert held here, then one for every group."""
    program = tl.program_id(0)
    if program < NUM_EXPERTS:
        _list_expert(
            choices_ptr, offsets_ptr, rows_ptr, places_ptr, num_tokens * K, first_expert, program, K,
            NUM_EXPERTS, TOKENS * BLOCK_K, IS_CHOICE,
        )  # fmt: skip
    else:
        _list_group(
            choices_ptr, node_counts_ptr, node_tokens_ptr, num_tokens, program - NUM_EXPERTS, K, BLOCK_K,
            GROUP_SIZE, TOKENS,
        )  # fmt: skip


@triton.jit
def _list_expert(
    choices_ptr, offsets_ptr, rows_ptr, places_ptr, total, first_expert, local, K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr, SIZE: tl.constexpr, IS_CHOICE: tl.constexpr,
):  # fmt: skip
    flat = tl.arange(0, SIZE)
    expert = first_expert + local
    if IS_CHOICE:
        choices = tl.load(choices_ptr + flat, mask=flat < total, other=0).to(tl.int32)
        if local == 0:
            is_held = (choices >= first_expert) & (choices < first_expert + NUM_EXPERTS)
            tl.store(places_ptr + flat, -1, mask=(flat < total) & ~is_held)
    else:
        choices = tl.load(choices_ptr + flat).to(tl.int32)
    earlier = (flat < total) & (choices >= first_expert) & (choices < expert)
    begin = tl.sum(earlier.to(tl.int32), axis=0)
    chosen = (flat < total) & (choices == expert)
    ones = chosen.to(tl.int32)
    places = begin + tl.cumsum(ones, axis=0) - ones
    tl.store(rows_ptr + places, flat // K, mask=chosen)
    tl.store(places_ptr + flat, places, mask=chosen)
    tl.store(offsets_ptr + 1 + local, begin + tl.sum(ones, axis=0))
    if local == 0:
        tl.store(offsets_ptr, 0)


@triton.jit
def _list_group(
    choices_ptr, counts_ptr, tokens_ptr, num_tokens, group, K: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    choices, valid = _load_choices(choices_ptr, 0, num_tokens, K, BLOCK_K, TOKENS)
    ones = tl.max((valid & (choices // GROUP_SIZE == group)).to(tl.int32), axis=1)
    places = group * num_tokens + tl.cumsum(ones, axis=0) - ones
    tl.store(tokens_ptr + places, tl.arange(0, TOKENS), mask=ones > 0)
    tl.store(counts_ptr + group, tl.sum(ones, axis=0))


@triton.jit
def _load_choices(
    choices_ptr, first_token, num_tokens, K: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr
):
    """[TOKENS, BLOCK_K] int32, 0 where there is none, and where there is one."""
    tokens = first_token + tl.arange(0, TOKENS)[:, None]
    j = tl.arange(0, BLOCK_K)[None, :]
    valid = (tokens < num_tokens) & (j < K)
    return tl.load(choices_ptr + tokens * K + j, mask=valid, other=0).to(tl.int32), valid


@triton.jit
def _goes_to(choices, valid, GROUP_SIZE: tl.constexpr, G: tl.constexpr):
    """[TOKENS, G]: 1 where a token has an expert in a group."""
    same = valid[:, :, None] & ((choices // GROUP_SIZE)[:, :, None] == tl.arange(0, G)[None, None, :])
    return tl.max(same.to(tl.int32), axis=1)


@triton.jit
def count_parts(
    choices_ptr,  # [T, K] integers
    counts_ptr,  # [E, parts_stride] uint8, P of them written
    node_counts_ptr,  # [G, parts_stride] uint8, likewise
    num_tokens,
    parts_stride,  # a multiple of 64
    E: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """A program counts the choices of one part: no expert is a token's twice, so that a byte holds them."""
    part = tl.program_id(0)
    choices, valid = _load_choices(choices_ptr, part * TOKENS, num_tokens, K, BLOCK_K, TOKENS)
    counts = tl.histogram(
        tl.reshape(choices, [TOKENS * BLOCK_K]), E, mask=tl.reshape(valid, [TOKENS * BLOCK_K])
    )
    tl.store(counts_ptr + tl.arange(0, E) * parts_stride + part, counts.to(tl.uint8))
    node_counts = tl.sum(_goes_to(choices, valid, E // G, G), axis=0)
    tl.store(node_counts_ptr + tl.arange(0, G) * parts_stride + part, node_counts.to(tl.uint8))


@triton.jit
def list_parts(
    choices_ptr,  # [T, K] integers
    part_counts_ptr,  # [E, parts_stride] uint8, P of them written
    part_node_counts_ptr,  # [G, parts_stride] uint8, likewise
    offsets_ptr,  # [NUM_EXPERTS + 1]
    rows_ptr,  # [T * K]
    places_ptr,  # [T, K]
    node_counts_ptr,  # [G]
    node_tokens_ptr,  # [G, T]
    num_tokens,
    num_parts,
    parts_stride,
    first_expert,
    E: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    IS_CHOICE: tl.constexpr,
):
    """Two programs for every part: one lists its tokens by expert, the other by group. What stands before
    them they add up from the counts of all parts."""
    if tl.program_id(1) == 0:
        _list_part_of_experts(
            choices_ptr, part_counts_ptr, offsets_ptr, rows_ptr, places_ptr, num_tokens, num_parts,
            parts_stride, first_expert, E, K, BLOCK_K, NUM_EXPERTS, TOKENS, IS_CHOICE,
        )  # fmt: skip
    else:
        _list_part_of_groups(
            choices_ptr, part_node_counts_ptr, node_counts_ptr, node_tokens_ptr, num_tokens, num_parts,
            parts_stride, E, G, K, BLOCK_K, TOKENS,
        )  # fmt: skip


@triton.jit
def _list_part_of_experts(
    choices_ptr, part_counts_ptr, offsets_ptr, rows_ptr, places_ptr, num_tokens, num_parts, parts_stride,
    first_expert, E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr, IS_CHOICE: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    flat = tl.arange(0, TOKENS * BLOCK_K)
    tokens, j = part * TOKENS + flat // BLOCK_K, flat % BLOCK_K
    valid = (tokens < num_tokens) & (j < K)
    mine = tl.load(choices_ptr + tokens * K + j, mask=valid, other=0).to(tl.int32)

    counts, before = _sum_parts(part_counts_ptr, num_parts, parts_stride, part, E)
    local = tl.arange(0, E) - first_expert
    is_held = (local >= 0) & (local < NUM_EXPERTS)
    counts = tl.where(is_held, counts, 0)
    ends = tl.cumsum(counts, axis=0)
    if part == 0:
        tl.store(offsets_ptr, 0)
        tl.store(offsets_ptr + 1 + local, ends, mask=is_held)
    places = tl.gather(ends - counts + before, mine, 0)
    # Of the part's choices, the earlier ones for the same expert. They are the rows here, so that a thread
    # adds up for itself.
    for first in range(0, TOKENS * BLOCK_K, BLOCK_K * 4):
        others = first + tl.arange(0, BLOCK_K * 4)
        other_tokens, other_j = part * TOKENS + others // BLOCK_K, others % BLOCK_K
        is_choice = (other_tokens < num_tokens) & (other_j < K)
        theirs = tl.load(choices_ptr + other_tokens * K + other_j, mask=is_choice, other=0).to(tl.int32)
        theirs = tl.where(is_choice, theirs, -1)
        same = (theirs[:, None] == mine[None, :]) & (others[:, None] < flat[None, :])
        places += tl.sum(same.to(tl.int32), axis=0)
    held = valid & (mine >= first_expert) & (mine < first_expert + NUM_EXPERTS)
    tl.store(rows_ptr + places, tokens, mask=held)
    if IS_CHOICE:
        tl.store(places_ptr + tokens * K + j, tl.where(held, places, -1), mask=valid)
    else:
        tl.store(places_ptr + tokens * K + j, places, mask=held)


@triton.jit
def _list_part_of_groups(
    choices_ptr, part_counts_ptr, counts_ptr, tokens_ptr, num_tokens, num_parts, parts_stride,
    E: tl.constexpr, G: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(0)
    groups = tl.arange(0, G)
    choices, valid = _load_choices(choices_ptr, part * TOKENS, num_tokens, K, BLOCK_K, TOKENS)
    ones = _goes_to(choices, valid, E // G, G)
    counts, before = _sum_parts(part_counts_ptr, num_parts, parts_stride, part, G)
    if part == 0:
        tl.store(counts_ptr + groups, counts)
    begins = groups.to(tl.int64) * num_tokens + before
    places = begins[None, :] + tl.cumsum(ones, axis=0) - ones
    tokens = tl.broadcast_to(part * TOKENS + tl.arange(0, TOKENS)[:, None], [TOKENS, G])
    tl.store(tokens_ptr + places, tokens, mask=ones > 0)


@triton.jit
def _sum_parts(counts_ptr, num_parts, parts_stride, part, N: tl.constexpr):
    """[N, P] uint8 summed over all parts, and over those before `part`."""
    counts = tl.zeros([N], dtype=tl.int32)
    before = tl.zeros([N], dtype=tl.int32)
    rows = tl.arange(0, N)[:, None] * tl.multiple_of(parts_stride, 64)
    for first in range(0, num_parts, 64):
        parts = first + tl.arange(0, 64)[None, :]
        counted = tl.load(counts_ptr + rows + parts).to(tl.int32)
        counts += tl.sum(tl.where(parts < num_parts, counted, 0), axis=1)
        before += tl.sum(tl.where(parts < part, counted, 0), axis=1)
    return counts, before

"""One output tile of a block-scaled fp8 product: what the dense and the grouped kernels have in common.

    out[t, n] = sum_b  x_scale[t, b] * weight_scale[n // 128, b] * (sum_k in b  x[t, k] * weight[n, k])
Hopper's tensor cores keep too few bits over a long K, so the sum of each block of 128 is made there and added
to fp32 registers outside. `tokens_by_weights` has tokens as rows; `weights_by_tokens` swaps the operands,
because the tensor core wants 64 rows or more and few tokens would leave them empty.
`x` and `weight` are pointers or tensor descriptors (TMA), which TMA_X and TMA_W tell.
Shapes: T tokens, N outputs, K inputs, a multiple of 128.
"""

import triton
import triton.language as tl

BLOCK = 128  # of K and of N that share a weight's scale; of K that share a token's


@triton.jit
def weights_by_tokens(
    weight,  # [*, K] e4m3
    weight_rows,  # [BN] int64, for pointers
    first_weight_row,  # for descriptors
    weight_scales,  # of the tile's block of rows: pointer to [K / 128]
    x,  # [*, K] e4m3
    x_rows,  # [BT] int64, for pointers
    first_x_row,  # for descriptors
    x_scales,  # [BT] pointers
    x_scale_stride,  # to the next block of K
    first_block,
    last_block,
    K,
    BN: tl.constexpr,
    BT: tl.constexpr,
    TMA_W: tl.constexpr,
    TMA_X: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The tile [BN, BT] of fp32, summed over blocks first_block to last_block of K; BN divides 128."""
    inputs = tl.arange(0, 128)
    if not TMA_W:
        weight_pointers = weight + weight_rows[:, None] * K + (first_block * 128 + inputs)[None, :]
    if not TMA_X:
        x_pointers = x + x_rows[None, :] * K + (first_block * 128 + inputs)[:, None]
    acc = tl.zeros((BN, BT), tl.float32)
    for block in tl.range(first_block, last_block, num_stages=STAGES):
        if TMA_W:
            left = weight.load([first_weight_row, block * 128])  # [BN, 128]
        else:
            left = tl.load(weight_pointers, eviction_policy="evict_first")
            weight_pointers += 128
        if TMA_X:
            right = x.load([first_x_row, block * 128]).T  # [128, BT]
        else:
            right = tl.load(x_pointers)
            x_pointers += 128
        scale = tl.load(x_scales + block * x_scale_stride) * tl.load(weight_scales + block)  # [BT]
        acc += tl.dot(left, right) * scale[None, :]
    return acc


@triton.jit
def tokens_by_weights(
    x,  # [*, K] e4m3
    x_rows,  # [BT] int64, for pointers
    more_x_rows,  # [BT] int64, for pointers, if TWO_X
    first_x_row,  # for descriptors
    x_scales,  # [BT] pointers
    more_x_scales,  # [BT] pointers, if TWO_X
    x_scale_stride,  # to the next block of K
    weight,  # [*, K] e4m3
    weight_rows,  # [128] int64, for pointers
    more_weight_rows,  # [128] int64, for pointers, if TWO_W
    first_weight_row,  # for descriptors
    weight_scales,  # of the tile's first 128 outputs: pointer to [K / 128]
    more_weight_scales,  # of its second
    num_blocks,
    K,
    BT: tl.constexpr,
    TWO_X: tl.constexpr,
    TWO_W: tl.constexpr,
    TMA_X: tl.constexpr,
    TMA_W: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Two tiles [BT, 128] of fp32: of BT tokens and the next BT (TWO_X), or of 128 outputs and the next 128
    (TWO_W), or one tile and nothing of use.

    The two share an operand in shared memory and, one after the other, the registers of the sum that is yet
    to be scaled; as one tile of that size the two sums would not fit.
    """
    inputs = tl.arange(0, 128)
    acc = tl.zeros((BT, 128), tl.float32)
    more = tl.zeros((BT, 128), tl.float32)
    if not TMA_X:
        x_pointers = x + x_rows[:, None] * K + inputs[None, :]
        if TWO_X:
            more_x_pointers = x + more_x_rows[:, None] * K + inputs[None, :]
    if not TMA_W:
        weight_pointers = weight + weight_rows[None, :] * K + inputs[:, None]
        if TWO_W:
            more_weight_pointers = weight + more_weight_rows[None, :] * K + inputs[:, None]
    for block in tl.range(0, num_blocks, num_stages=STAGES):
        if TMA_X:
            left = x.load([first_x_row, block * 128])  # [BT, 128]
        else:
            left = tl.load(x_pointers)
            x_pointers += 128
        if TMA_W:
            right = weight.load([first_weight_row, block * 128]).T  # [128, 128]
        else:
            right = tl.load(weight_pointers)
            weight_pointers += 128
        x_scale = tl.load(x_scales + block * x_scale_stride)  # [BT]
        weight_scale = tl.load(weight_scales + block)
        acc += tl.dot(left, right) * (x_scale * weight_scale)[:, None]
        if TWO_W:
            if TMA_W:
                right = weight.load([first_weight_row + 128, block * 128]).T
            else:
                right = tl.load(more_weight_pointers)
                more_weight_pointers += 128
            weight_scale = tl.load(more_weight_scales + block)
            more += tl.dot(left, right) * (x_scale * weight_scale)[:, None]
        if TWO_X:
            if TMA_X:
                left = x.load([first_x_row + BT, block * 128])
            else:
                left = tl.load(more_x_pointers)
                more_x_pointers += 128
            x_scale = tl.load(more_x_scales + block * x_scale_stride)
            more += tl.dot(left, right) * (x_scale * weight_scale)[:, None]
    return acc, more

"""The softmax of `expanded_mha_gluon` between its two products, in the registers of one warp group.

NVIDIA Hopper alone. What is written oddly here is so because of what ptxas makes of the plain form.
Shapes: M queries, KEYS of a tile.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def by_word(scores):
    return scores.reshape([scores.shape[0], scores.shape[1] // 32, 32])


@gluon.jit
def seen_bits(start, where, mask, nothing, MASKED: gl.constexpr):
    """[M, KEYS / 32] words: the keys from `start` on that a row sees, where all it sees count, or has chosen.

    where: [M] each: how many of the first keys count, and where the row's mask begins.
    """
    limits, at = where
    WORDS: gl.constexpr = gl.SliceLayout(2, by_word(nothing).type.layout)
    word = gl.arange(0, nothing.shape[1] // 32, layout=gl.SliceLayout(0, WORDS))
    count = limits[:, None] - (start + word * 32)[None, :]
    bits = gl.where(count >= 32, -1, (1 << gl.minimum(gl.maximum(count, 0), 31)) - 1)
    if MASKED:
        bits |= gl.load(mask + (start // 32 + word)[None, :] + at[:, None])
    return bits


@gluon.jit
def hide(scores, bits):
    """Scores with -inf where a key's bit is not set."""
    SCORES: gl.constexpr = scores.type.layout
    split = by_word(scores)
    # A thread's columns differ in all bits but these two: it shifts each word once.
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, split.type.layout)))
    # By itself ptxas makes all predicates first, which are too many, and packs them.
    hidden = gl.inline_asm_elementwise(
        """{
        .reg .pred seen;
        .reg .b32 bit;
        and.b32 bit, $2, $3;
        setp.ne.b32 seen, bit, 0;
        selp.f32 $0, $1, 0fFF800000, seen;
        }""",
        "=f,f,r,r",
        [split, bits[:, :, None] >> (column & 6)[None, None, :], (1 << (column & 25))[None, None, :]],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )
    return gl.convert_layout(hidden.reshape(scores.shape), SCORES)


@gluon.jit
def in_pairs(scores):
    """[M, KEYS / 2] of the even columns, and of the odd ones beside them in the same threads."""
    return scores.reshape([scores.shape[0], scores.shape[1] // 2, 2]).split()


@gluon.jit
def weigh(scores, row_max, row_sum, scale):
    """One step of the softmax: weights in pairs, maximum, sum, and what earlier sums shrink by."""
    even, odd = in_pairs(scores)
    new_max = gl.maximum(row_max, gl.max(gl.maximum(even, odd), 1))
    base = gl.where(new_max == float("-inf"), 0.0, new_max * scale)
    even = gl.exp2(even * scale - base[:, None])
    odd = gl.exp2(odd * scale - base[:, None])
    shrink = gl.exp2(row_max * scale - base)
    return (even, odd), new_max, row_sum * shrink + gl.sum(even + odd, 1), shrink


@gluon.jit
def packed(pairs):
    """Words of two bf16 each: single ones that lived on to the next round would be taken apart for it."""
    even, odd = pairs
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def operand(words, OPERAND: gl.constexpr):
    """[M, KEYS] bf16 of the words of `packed`."""
    even = words.to(gl.int16).to(gl.bfloat16, bitcast=True)
    odd = (words >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True)
    pairs = gl.join(even, odd)
    return gl.convert_layout(pairs.reshape([words.shape[0], 2 * words.shape[1]]), OPERAND)

"""Layouts that kernels in Gluon share. NVIDIA Hopper alone."""

from triton.experimental.gluon import language as gl
from triton.runtime.jit import constexpr_function


@constexpr_function
def stored_layout(rows: int, columns: int) -> gl.DistributedLinearLayout:
    """Of a tile [rows, columns] that one warp group has multiplied: eight columns a thread, 16 bytes of bf16.

    All else is as wgmma leaves it (two columns a thread), so that values move within warps alone.
    Rows and columns are powers of two from 64 and 32.
    """
    wide = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    tall = [[1 << bit, 0] for bit in range(6, rows.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], *wide, [8, 0], *tall],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[rows, columns],
    )

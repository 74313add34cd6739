"""The lightning indexer's scores of a prefill chunk: queries of one sequence against its keys in a row.

    I[t, s] = k_scale[s] * sum_h w[t, h] * relu(q[t, h] . k[s])        for s < visible[t]
What a row does not see is left unwritten, or holds a score that means nothing: selection honours `visible`,
and filling a gigabyte with -inf would take a tenth of the kernel's time.
Shapes: T queries, H index heads, D index_head_dim, L keys.

On a GPU the keys are the rows of the product and (query, head) its columns, so that the heads of a pair lie
in one thread's registers and ReLU, weight and sum are two instructions a (pair, head): one cycle a pair on
each SM, against 1.4 for the tensor cores' part. Several small programs share an SM, so that one's products
run while another sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.backend import Backend, require, require_aligned, require_triton_or_reference
from kernels.fp8_quant import FP8
from kernels.index_logits import index_logits_reference

_PAD = 256  # rows of the output are this many scores apart or a multiple: no tile of keys needs a mask
_OPERATION = "ragged_index_logits"


class Config(NamedTuple):
    """queries x heads and keys are the tile; descriptors: keys come by TMA where the machine has it."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int
    descriptors: bool


def ragged_index_logits(
    q: Tensor, keys: Tensor, key_scales: Tensor, weights: Tensor, visible: Tensor, *, backend: Backend
) -> Tensor:
    """Score the queries of one sequence against its keys.

    Args:
        q: [T, H, D] e4m3.
        keys: [L, D] e4m3.
        key_scales: [L] float32.
        weights: [T, H] float32, with every constant and query scale in it.
        visible: [T] any integer dtype, how many of the first keys a query may see, at most L.

    Returns:
        [T, L] float32, rows padded; scores at s >= visible[t] are not defined.

    Raises:
        UnsupportedKernel: shapes or dtypes are others, or something is not contiguous.
    """
    _check(q, keys, key_scales, weights, visible)
    require_triton_or_reference(backend, _OPERATION)
    if backend == "reference":
        return ragged_index_logits_reference(q, keys, key_scales, weights, visible)
    num_heads, index_head_dim = q.shape[1:]
    for size, what in ((num_heads, "heads"), (index_head_dim, "head dim")):
        require(size & (size - 1) == 0, _OPERATION, f"{what} {size} is not a power of two")
    require(index_head_dim >= 32, _OPERATION, f"head dim {index_head_dim} is below 32")
    require_aligned(_OPERATION, keys=keys)
    return launch(q, keys, key_scales, weights, visible, config=config_for(q.shape[0], num_heads))


def ragged_index_logits_reference(
    q: Tensor, keys: Tensor, key_scales: Tensor, weights: Tensor, visible: Tensor
) -> Tensor:
    if q.shape[0] == 0 or keys.shape[0] == 0:
        return torch.empty(q.shape[0], keys.shape[0], device=q.device)
    return index_logits_reference(q, keys, key_scales, weights, visible)


def config_for(num_queries: int, num_heads: int) -> Config:
    """Tiles of 128 keys by 128 (query, head) columns on eight warps: the best of the sweep of 2026-11-22 on
    an H100. 64 accumulators a thread leave room for two programs on an SM. Fewer heads make room for more
    queries in the same columns."""
    queries = max(1, 128 // num_heads)
    while queries > 1 and queries >= 2 * num_queries:
        queries //= 2
    if queries * num_heads < 16:  # columns of the smallest product
        queries = 16 // num_heads
    return Config(queries, 128, 8, 3, descriptors=True)


def launch(
    q: Tensor, keys: Tensor, key_scales: Tensor, weights: Tensor, visible: Tensor, *, config: Config
) -> Tensor:
    """The kernel with a given configuration; arguments as `ragged_index_logits`."""
    num_queries, num_heads, index_head_dim = q.shape
    num_keys = keys.shape[0]
    stride = triton.cdiv(num_keys, _PAD) * _PAD
    out = torch.empty(num_queries, stride, dtype=torch.float32, device=q.device)
    if num_queries == 0 or num_keys == 0:
        return out[:, :num_keys]
    blocks = triton.cdiv(num_queries, config.queries)
    # Many queries fill the machine by themselves; few need their keys split over several programs.
    splits = min(triton.cdiv(num_keys, 1024), max(1, 2048 // blocks))
    keys_per_program = triton.cdiv(triton.cdiv(num_keys, splits), _PAD) * _PAD
    grid = (blocks, triton.cdiv(num_keys, keys_per_program))
    tiles = TensorDescriptor.from_tensor(keys, [config.keys, index_head_dim]) if config.descriptors else keys
    _score_tiles[grid](
        out,
        q,
        tiles,
        key_scales,
        weights,
        visible,
        num_queries,
        num_keys,
        stride,
        keys_per_program,
        H=num_heads,
        D=index_head_dim,
        BQ=config.queries,
        BN=config.keys,
        DESCRIPTORS=config.descriptors,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    return out[:, :num_keys]


def _check(q: Tensor, keys: Tensor, key_scales: Tensor, weights: Tensor, visible: Tensor) -> None:
    num_queries, num_heads, index_head_dim = q.shape
    require(
        q.dtype == FP8 and keys.dtype == FP8, _OPERATION, f"{q.dtype} queries, {keys.dtype} keys, not e4m3"
    )
    require(
        keys.shape[1] == index_head_dim, _OPERATION, f"queries of {index_head_dim}, keys of {keys.shape[1]}"
    )
    require(weights.shape == (num_queries, num_heads), _OPERATION, f"weights are {tuple(weights.shape)}")
    require(key_scales.shape == keys.shape[:1], _OPERATION, f"key scales are {tuple(key_scales.shape)}")
    require(visible.shape == (num_queries,), _OPERATION, f"visible is {tuple(visible.shape)}")
    for tensor, name in (
        (q, "q"),
        (keys, "keys"),
        (key_scales, "key scales"),
        (weights, "weights"),
        (visible, "visible"),
    ):
        require(tensor.is_contiguous(), _OPERATION, f"{name} must be contiguous")


@triton.jit
def _score_tiles(
    out,  # [T, stride]
    q,  # [T, H, D]
    keys,  # [L, D], a pointer or a descriptor of [BN, D] tiles
    key_scales,  # [L]
    weights,  # [T, H]
    visible,  # [T]
    num_queries,
    num_keys,
    stride,
    keys_per_program,
    H: tl.constexpr,
    D: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last queries see most: they start first.
    first_query = (tl.num_programs(0) - 1 - tl.program_id(0)) * BQ
    start = tl.program_id(1) * keys_per_program
    query = first_query + tl.arange(0, BQ)
    seen = tl.max(tl.load(visible + query, mask=query < num_queries, other=0).to(tl.int32), 0)
    end = tl.minimum(tl.minimum(seen, num_keys), start + keys_per_program)
    if start >= end:
        return

    column = first_query.to(tl.int64) * H + tl.arange(0, BQ * H)
    present = column < tl.cast(num_queries, tl.int64) * H
    d = tl.arange(0, D)
    queries = tl.load(q + column[:, None] * D + d[None, :], mask=present[:, None], other=0.0)  # [BQ * H, D]
    weight = tl.load(weights + column, mask=present, other=0.0)
    offset = tl.arange(0, BN)
    to = out + query[None, :].to(tl.int64) * stride + offset[:, None]  # [BN, BQ]
    stored = tl.broadcast_to(query[None, :] < num_queries, (BN, BQ))
    for s in tl.range(start, end, BN, num_stages=STAGES):
        scale = tl.load(key_scales + s + offset, mask=s + offset < num_keys, other=0.0)
        if DESCRIPTORS:
            tile = keys.load([s, 0])
        else:
            row = s + offset
            tile = tl.load(
                keys + row[:, None].to(tl.int64) * D + d[None, :], mask=row[:, None] < num_keys, other=0.0
            )
        per_head = tl.dot(tile, queries.T)  # [BN, BQ * H]
        per_head = tl.maximum(per_head, 0.0) * weight[None, :]
        scores = tl.sum(tl.reshape(per_head, (BN, BQ, H)), 2) * scale[:, None]
        tl.store(to + s, scores, mask=stored)

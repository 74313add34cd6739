"""Which implementation of each exchangeable operation a fused layer runs: ours, or a library's.

Libraries are asked for by configuration, never found by chance, and one that is missing is an error at start.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from torch import Tensor

from kernels import third_party
from kernels.backend import Backend, require
from kernels.fp8_gemm import fp8_gemm
from kernels.paged_index_logits import paged_index_logits
from kernels.ragged_index_logits import ragged_index_logits
from kernels.sparse_mla_decode import sparse_mla_decode
from kernels.sparse_mla_prefill import sparse_mla_prefill

ThirdParty = Literal["deep_gemm", "flash_mla"]


@dataclass(frozen=True)
class Operations:
    """Each as the launcher of the same name, without its `backend`."""

    fp8_gemm: Callable[..., Tensor]
    ragged_index_logits: Callable[..., Tensor]
    paged_index_logits: Callable[..., Tensor]
    sparse_mla_decode: Callable[..., Tensor]
    sparse_mla_prefill: Callable[..., Tensor]


def operations(backend: Backend, libraries: Collection[ThirdParty] = ()) -> Operations:
    """Ours, but for what the named libraries do.

    Raises:
        UnsupportedKernel: a library is missing, or goes with another backend.
    """
    chosen = Operations(
        partial(fp8_gemm, backend=backend),
        partial(ragged_index_logits, backend=backend),
        partial(paged_index_logits, backend=backend),
        partial(sparse_mla_decode, backend=backend),
        partial(sparse_mla_prefill, backend=backend),
    )
    require(
        not libraries or backend == "triton", "third_party", f"libraries go with 'triton', not {backend!r}"
    )
    if "deep_gemm" in libraries:
        third_party.require_deep_gemm()
        chosen = replace(
            chosen,
            fp8_gemm=third_party.deep_gemm_fp8_gemm,
            ragged_index_logits=third_party.deep_gemm_ragged_index_logits,
            paged_index_logits=third_party.deep_gemm_paged_index_logits,
        )
    if "flash_mla" in libraries:
        third_party.require_flash_mla()
        chosen = replace(
            chosen,
            sparse_mla_decode=third_party.flash_mla_sparse_decode,
            sparse_mla_prefill=third_party.flash_mla_sparse_prefill,
        )
    return chosen

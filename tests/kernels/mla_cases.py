"""Random cases for the attention kernels over latents, and attention done slowly in float64."""

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

# Imported here, because Gluon wraps the functions of tl as it finds them: none may be replaced by then.
from triton.experimental.gluon._runtime import GluonASTSource

from kernels.latent_pages import pack_latents_reference, unpack_latents_reference
from tests.kernels.compiled import HOPPER, _resources

RANK, ROPE = 128, 32  # the demo's


def latent_pages(
    num_pages: int, fp8: bool, generator: torch.Generator, rank: int = RANK, rope: int = ROPE
) -> Tensor:
    """Pages of 64 tokens with numbers of many sizes; full pages in float32, on bf16's grid."""
    latents = torch.randn(num_pages * 64, rank + rope, generator=generator)
    latents *= 2.0 ** torch.randint(-3, 2, (num_pages * 64, 1), generator=generator)
    latents = latents.bfloat16().float()
    if not fp8:
        return latents.unflatten(0, (num_pages, 64))
    return pack_latents_reference(latents[:, :rank], latents[:, rank:]).unflatten(0, (num_pages, 64))


def widened(pages: Tensor, rank: int = RANK) -> Tensor:
    """[slots, C + R] float64."""
    rows = pages.flatten(0, 1)
    return (unpack_latents_reference(rows, rank) if rows.dtype == torch.uint8 else rows).double()


def attend_exactly(q: Tensor, latents: Tensor, chosen: Tensor, scale: float, rank: int = RANK) -> Tensor:
    """[H, C] float64 of one query [H, C + R] over chosen rows of latents; zeros where there are none."""
    if len(chosen) == 0:
        return torch.zeros(q.shape[0], rank, dtype=torch.float64, device=q.device)
    keys = latents[chosen.long()]
    return (q.double() @ keys.t() * scale).softmax(-1) @ keys[:, :rank]


def interpret(
    interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch, *modules: ModuleType
) -> None:
    """With Triton's own functions; what its interpreter leaves behind in `tl.core` is put back."""
    interpreted(tl, tl.standard, *modules)
    for name, member in list(vars(tl.core).items()):
        if tl.core.is_builtin(member):
            monkeypatch.setattr(tl.core, name, member)


def compile_gluon(
    kernel: Any, arguments: Mapping[str, str], constants: Mapping[str, Any], aligned: tuple[str, ...]
) -> tuple[int, str]:
    """Bytes of stack (where spilled registers go) and PTX of a Gluon kernel for sm_90a, with 8 warps."""
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", 16]]
        for name, kind in arguments.items()
        if kind.startswith("*") or name in aligned
    }
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    source = GluonASTSource(kernel, signature, constexprs, attributes)
    binary = triton.compile(source, target=HOPPER, options={"num_warps": 8})
    assert binary.metadata.shared <= 227 * 1024
    return _resources(binary.asm["cubin"])[1], binary.asm["ptx"]

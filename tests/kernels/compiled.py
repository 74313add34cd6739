"""What Triton makes of a kernel for Hopper, seen without a GPU: registers, spills, and the instructions that
matter. A test that compares these with what a benchmark was run on fails when a change loses one of them."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction
from triton.runtime import JITFunction

HOPPER = GPUTarget("cuda", 90, 32)


@dataclass(frozen=True)
class Compiled:
    """Of one kernel with one set of constants: registers a thread, spilled bytes, shared memory in bytes, and
    how many instructions of each kind stand in its PTX."""

    registers: int
    spilled: int
    shared: int
    wgmma: int
    cp_async: int
    tma: int
    mma_sync: int
    ptx: str


def compile_for_hopper(
    kernel: JITFunction[Any],
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """Compile for sm_90a, what is written in Triton's language or in Gluon.

    Args:
        arguments: types of the run-time arguments, as in "*bf16", "*fp8e4nv", "fp32", "i32"; pointers count
            as aligned to 16 bytes, as torch's are.
        constants: values of the `tl.constexpr` arguments.
        aligned: integer arguments that are multiples of 16 (strides, mostly), as the launcher would find.
    """
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (kernel.arg_names.index(name),): divisible
        for name, kind in arguments.items()
        if kind.startswith("*") or name in aligned
    }
    signature = {name: arguments.get(name, "constexpr") for name in kernel.arg_names}
    source_of = GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource
    source = source_of(kernel, signature, constexprs, attributes)
    binary = triton.compile(
        source, target=HOPPER, options={"num_warps": num_warps, "num_stages": num_stages, **options}
    )
    assert binary.metadata.shared <= 227 << 10, "more than a multiprocessor has"
    ptx = binary.asm["ptx"]
    registers, spilled = _resources(binary.asm["cubin"])
    return Compiled(
        registers=registers,
        spilled=spilled,
        shared=binary.metadata.shared,
        wgmma=len(re.findall(r"wgmma\.mma_async", ptx)),
        cp_async=len(re.findall(r"cp\.async\.c[ag]", ptx)),
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        mma_sync=len(re.findall(r"mma\.sync", ptx)),
        ptx=ptx,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack, which is where spilled registers go."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", report)
    assert found, report
    return int(found[1]), int(found[2])

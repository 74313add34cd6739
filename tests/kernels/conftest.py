from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

# Gluon takes functions of the language over as it finds them: before any of them is replaced.
import triton.experimental.gluon  # noqa: F401
import triton.language as tl
from torch import Tensor
from triton.runtime import JITFunction, interpreter
from triton.runtime.interpreter import InterpretedFunction

import kernels.jit


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote holds NaN (bytes and integers: an absurd value), so that a hole is seen."""

    def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            tensor = make(*args, **kwargs)
            if tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8).fill_(0x7F)
            elif tensor.is_floating_point():
                tensor.fill_(float("nan"))
            elif tensor.dtype != torch.bool:
                tensor.fill_(torch.iinfo(tensor.dtype).max)
            return tensor

        return made

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_triton_converts = interpreter._convert_float


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    """As a GPU casts fp32: Triton's interpreter truncates to bf16, and misses e4m3."""
    if source != tl.float32 or target not in (tl.bfloat16, tl.float8e4nv):
        return _triton_converts(data, source, target, rounding)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    if target == tl.bfloat16:
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)


_triton_dots = interpreter.InterpreterBuilder.create_dot


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """Triton's interpreter multiplies the raw bits of bf16."""
    if tl.bfloat16 not in (a.dtype.scalar, b.dtype.scalar):
        return _triton_dots(builder, a, b, d, input_precision, max_num_imprecise_acc)
    a_data, b_data = (
        _triton_converts(x.data, tl.bfloat16, tl.float32, None).view(np.float32).reshape(x.data.shape)
        if x.dtype.scalar == tl.bfloat16
        else x.data
        for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(a_data, b_data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """A function that a kernel calls, as Triton does it, but taking back what that did to the language, so
    that later tests can compile."""
    scope = interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the Triton kernels of the modules it is given through the interpreter, on the CPU.

    Give it every module with a function that the kernels call, but `kernels.jit` and Triton's own. It is
    right about control flow, masks, addresses, fp32, casts from fp32 and products; not about arithmetic in
    bf16, and it runs one program after another (so it sees no race).
    """

    def interpret(*modules: ModuleType) -> None:
        monkeypatch.setattr(interpreter, "_convert_float", _convert)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
        monkeypatch.setattr(InterpretedFunction, "__call__", _call)
        # Triton's language has functions (cdiv, zeros, sum, ...) that are written in itself.
        for module in (tl, tl.standard, kernels.jit, *modules):
            for name, value in vars(module).items():
                if isinstance(value, JITFunction):
                    monkeypatch.setattr(module, name, InterpretedFunction(value.fn))

    return interpret

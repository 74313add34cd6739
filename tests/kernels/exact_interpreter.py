"""Triton's interpreter with the casts and products of a GPU, where its own are wrong, and without traces.

Its own casts to bf16 truncate, those to e4m3 miss (conftest.py), and its products of bf16 multiply raw bits;
torch knows how. What it replaces in `triton.language` for a function that a kernel calls, it leaves replaced,
and nothing compiles any more in that process; here it is put back.
"""

from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

_own_convert = interpreter._convert_float


def _convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
    if source != tl.float32 or target not in (tl.bfloat16, tl.float8e4nv):
        return _own_convert(data, source, target, rounding)
    values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
    if target == tl.bfloat16:
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy().reshape(data.shape)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    a_data, b_data = (
        _own_convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32).reshape(x.data.shape)
        if x.dtype.scalar == tl.bfloat16
        else x.data
        for x in (a, b)
    )
    return interpreter.TensorHandle(np.matmul(a_data, b_data, dtype=d.data.dtype) + d.data, d.dtype.scalar)


def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
    scope = interpreter._patch_lang(function.fn)
    try:
        return function.rewrite()(*args, **kwargs)
    finally:
        scope.restore()


@pytest.fixture
def exact_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that import it by name, before their `interpreted`."""
    monkeypatch.setattr(interpreter, "_convert_float", _convert)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", _dot)
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", _call)

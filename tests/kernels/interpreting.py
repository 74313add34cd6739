"""Kernels through the interpreter when they call functions that are themselves written in Triton."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import triton.experimental.gluon  # before anything is replaced: it takes functions over when it is imported
import triton.language
from triton.runtime import interpreter

# Triton's language has functions (cdiv, zeros, sum, …) that are written in itself.
_LANGUAGE: list[ModuleType] = [triton.language, triton.language.standard]


def interpret_all(
    interpreted: Callable[..., None], monkeypatch: pytest.MonkeyPatch, *modules: ModuleType
) -> None:
    """Replace the kernels of these modules and what they call; `interpreted` is the fixture."""

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        # As Triton's own, but it takes back what it did to the language, so that later tests can compile.
        scope = interpreter._patch_lang(function.fn)
        try:
            return function.rewrite()(*args, **kwargs)
        finally:
            scope.restore()

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    interpreted(*modules, *_LANGUAGE)

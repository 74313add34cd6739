from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction


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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the Triton kernels of the modules it is given through the interpreter, on the CPU.

    It is right about control flow, masks, addresses and fp32; not about casts to e4m3 or bf16 and not about
    arithmetic in bf16, and it runs one program after another (so it sees no race).
    """

    def interpret(*modules: ModuleType) -> None:
        for module in modules:
            for name, value in vars(module).items():
                if isinstance(value, JITFunction):
                    monkeypatch.setattr(module, name, InterpretedFunction(value.fn))

    return interpret

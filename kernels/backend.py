"""Which implementation of an operation runs: one config field, chosen once, handed down, never guessed.

Every launcher takes `backend`. `reference` is plain torch and runs on any device. `deterministic` is plain
torch too, in forms whose bits for a row depend on that row's own sequence alone: not on neighbours in the
batch, nor on how a prompt was cut, nor on where experts run. `triton` are kernels for GPUs; their operations
are cut where launches and memory traffic are fewest, so most of them have files of their own. A launcher that
cannot serve what it is asked for raises `UnsupportedKernel` and never falls back to another implementation.
"""

from typing import Literal

from torch import Tensor

Backend = Literal["reference", "deterministic", "triton"]


class UnsupportedKernel(ValueError):
    """An operation was asked for a shape, dtype or backend it does not serve."""


def require(holds: bool, operation: str, rule: str) -> None:
    """Raise `UnsupportedKernel` naming the operation unless its rule holds."""
    if not holds:
        raise UnsupportedKernel(f"{operation}: {rule}")


def require_aligned(operation: str, **tensors: Tensor) -> None:
    """For what TMA or asynchronous copies fetch: torch's allocations begin at 16 bytes, views may not."""
    for name, tensor in tensors.items():
        if tensor.data_ptr() % 16 != 0:
            raise UnsupportedKernel(f"{operation}: {name} must begin at a multiple of 16 bytes")


def require_reference(backend: Backend, operation: str) -> None:
    """For operations that have nothing but a reference, one that looks at other rows."""
    require(backend == "reference", operation, f"has no {backend!r} implementation, only 'reference'")


def require_torch(backend: Backend, operation: str) -> None:
    """For operations in plain torch that serve both backends."""
    served = "'reference' and 'deterministic'"
    require(
        backend in ("reference", "deterministic"),
        operation,
        f"has no {backend!r} implementation, only {served}",
    )


def require_triton_or_reference(backend: Backend, operation: str) -> None:
    """For operations that are a Triton kernel and its plain-torch twin."""
    require(
        backend in ("reference", "triton"),
        operation,
        f"has no {backend!r} implementation, only 'reference' and 'triton'",
    )

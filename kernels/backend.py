"""Which implementation of an operation runs: one config field, chosen once, handed down, never guessed.

Every launcher takes `backend`. `reference` is plain torch and runs on any device; a launcher that cannot
serve what it is asked for raises `UnsupportedKernel` and never falls back to another implementation.
"""

from typing import Literal

Backend = Literal["reference"]


class UnsupportedKernel(ValueError):
    """An operation was asked for a shape, dtype or backend it does not serve."""


def require(holds: bool, operation: str, rule: str) -> None:
    """Raise `UnsupportedKernel` naming the operation unless its rule holds."""
    if not holds:
        raise UnsupportedKernel(f"{operation}: {rule}")


def require_reference(backend: Backend, operation: str) -> None:
    """For operations that have no kernel of their own yet."""
    require(backend == "reference", operation, f"has no {backend!r} implementation, only 'reference'")

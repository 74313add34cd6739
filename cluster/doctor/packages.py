"""Is our own code what Python finds under our names? Imports nothing of Eightfold that could be shadowed."""

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from cluster.doctor.finding import Finding

# As in pyproject.toml, which an installed package does not carry along in this form.
RAY_AT_LEAST, RAY_BELOW = (2, 60), (3, 0)


def probe_kernels() -> tuple[str | None, str | None]:
    """The version of PyPI's `kernels`, and the file that `import kernels` runs; None where there is none."""
    spec = importlib.util.find_spec("kernels")
    return _version("kernels"), spec.origin if spec else None


def check_kernels(installed: str | None, origin: str | None) -> Finding:
    """Ours is a folder without `__init__.py`; Python prefers any package that has one, wherever it lies.

    Args:
        installed: version of the PyPI package of that name.
        origin: the `__init__.py` that `import kernels` runs; None for a folder such as ours.
    """
    limit = "the PyPI package kernels is not installed"
    if installed is None and origin is None:
        return Finding("name kernels", "ok", "it is ours", limit)
    found = f"kernels {installed}" if installed else f"a package at {origin}"
    cure = "python -m pip uninstall -y kernels, then install eightfold again (both write to one folder)"
    if installed is None:
        cure = "take that folder off PYTHONPATH, or rename it"
    return Finding("name kernels", "problem", f"{found} takes the name of our own code", limit, cure)


def probe_ray() -> str | None:
    """The version of Ray that is installed."""
    return _version("ray")


def check_ray(installed: str | None) -> Finding:
    """Ray's internals that we rely on were read in these versions."""
    limit = f"at least {_dotted(RAY_AT_LEAST)}, below {_dotted(RAY_BELOW)}"
    cure = f'python -m pip install "ray[serve]>={_dotted(RAY_AT_LEAST)},<{_dotted(RAY_BELOW)}"'
    if installed is None:
        return Finding("Ray", "problem", "not installed", limit, cure)
    numbers = installed.split(".")[:2]
    is_known = all(number.isdigit() for number in numbers)
    if is_known and RAY_AT_LEAST <= tuple(map(int, numbers)) < RAY_BELOW:
        return Finding("Ray", "ok", installed, limit)
    return Finding("Ray", "problem", installed, limit, cure)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dotted(numbers: tuple[int, ...]) -> str:
    return ".".join(map(str, numbers))

"""`eightfold render`: what Kubernetes needs to run a description."""

from argparse import Namespace
from pathlib import Path

from cluster.config import ClusterConfig, ConfigError
from cluster.render.manifests import render


def run(options: Namespace) -> int:
    """Write the files; those of an earlier time are replaced."""
    files = render(ClusterConfig.load(options.config))
    write(files, options.out)
    print(f"{len(files)} files in {options.out}; kubectl apply --server-side -f {options.out}")
    return 0


def write(files: dict[str, str], directory: Path) -> None:
    """Raises ConfigError where that cannot be."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
    except OSError as error:
        raise ConfigError(str(error.filename), "", f"cannot be written: {error.strerror}") from None

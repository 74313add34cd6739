"""Every description that is shipped can be read."""

from pathlib import Path

import pytest

from cluster.config import ClusterConfig

MANIFESTS = sorted((Path(__file__).parents[2] / "manifests").glob("*.yaml"))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_it_loads(path: Path) -> None:
    config = ClusterConfig.load(path)
    assert config.model.directory.is_dir()

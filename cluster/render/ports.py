"""Every port that anything listens on: the one table behind containers, `ray start` and policies."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from cluster.config import ClusterConfig

Caller = Literal["cluster", "operator", "monitoring", "anybody"]
Listener = Literal["head", "every pod", "gateways"]


@dataclass(frozen=True)
class Port:
    """A port, or a run of ports, of TCP.

    Attributes:
        name: as containers and Services call it.
        first, last: the numbers, both of them included.
        listener: in which pods something listens.
        callers: who may connect.
        purpose: what is spoken there.
        ray_option: of `ray start`, where it is Ray's.
    """

    name: str
    first: int
    last: int
    listener: Listener
    callers: tuple[Caller, ...]
    purpose: str
    ray_option: str = ""


# What listens on port 0 gets one of these from the kernel: attention and expert actors and NCCL.
EPHEMERAL = Port("peers", 20000, 29999, "every pod", ("cluster",), "actors and gateways, NCCL")
WORKERS = Port("workers", 10002, 10999, "every pod", ("cluster",), "Ray's workers and drivers")

_RAY = (
    Port("gcs", 6379, 6379, "head", ("cluster",), "Ray's control service", "port"),
    Port("dashboard", 8265, 8265, "head", ("operator",), "Serve's REST interface", "dashboard-port"),
    Port("node-manager", 6380, 6380, "every pod", ("cluster",), "raylets", "node-manager-port"),
    Port("object-manager", 6381, 6381, "every pod", ("cluster",), "Ray's objects", "object-manager-port"),
    Port("runtime-env", 6382, 6382, "every pod", ("cluster",), "Ray's agent", "runtime-env-agent-port"),
    Port("agent-grpc", 6383, 6383, "every pod", ("cluster",), "Ray's agent", "dashboard-agent-grpc-port"),
    Port("agent-http", 52365, 52365, "every pod", ("cluster",), "health", "dashboard-agent-listen-port"),
    Port("metrics", 8080, 8080, "every pod", ("monitoring",), "Ray's metrics", "metrics-export-port"),
)


def ports(config: ClusterConfig) -> tuple[Port, ...]:
    """All of them, in the order of the documentation."""
    http, grpc = config.gateway.http_port, config.gateway.grpc_port
    return (
        Port("http", http, http, "gateways", ("anybody",), "OpenAI API, health, metrics"),
        Port("grpc", grpc, grpc, "gateways", ("anybody",), "eightfold.v1, grpc.health.v1"),
        *_RAY,
        WORKERS,
        EPHEMERAL,
    )


def called_by(ports: Iterable[Port], caller: Caller, listener: Listener) -> list[dict[str, object]]:
    """Entries of a NetworkPolicy for what a caller may reach."""
    return [
        {"protocol": "TCP", "port": port.first, **({} if port.first == port.last else {"endPort": port.last})}
        for port in ports
        if caller in port.callers and port.listener == listener
    ]


def ray_start_params(is_head: bool) -> dict[str, str]:
    """Options that put Ray where the table says."""
    options = {
        port.ray_option: str(port.first)
        for port in _RAY
        if port.ray_option and (is_head or port.listener == "every pod")
    }
    return options | {
        "min-worker-port": str(WORKERS.first),
        "max-worker-port": str(WORKERS.last),
        "object-store-memory": str(100 * 2**20),  # objects are not our data plane
    }

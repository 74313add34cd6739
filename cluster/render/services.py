"""Services for clients: one for HTTP, and a headless one for gRPC."""

from typing import Any

from cluster.render.pods import PodFacts, labels


def services(facts: PodFacts) -> list[dict[str, Any]]:
    """Both lead to ready gateways, whichever Ray cluster of this name they belong to.

    A gRPC client keeps one connection: behind a cluster IP all its requests would go to one gateway. With the
    addresses of all gateways it can choose (`dns:///` and `round_robin`).
    """
    gateway, has_tls = facts.config.gateway, bool(facts.kubernetes.tls_secret)
    name = facts.kubernetes.name
    return [
        _service(facts, name, _port("http", gateway.http_port, "https" if has_tls else "http"), {}),
        _service(
            facts,
            f"{name}-grpc",
            _port("grpc", gateway.grpc_port, "https" if has_tls else "kubernetes.io/h2c"),
            {"clusterIP": "None"},
        ),
    ]


def _port(name: str, port: int, protocol: str) -> dict[str, Any]:
    return {"name": name, "port": port, "targetPort": name, "protocol": "TCP", "appProtocol": protocol}


def _service(facts: PodFacts, name: str, port: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    kubernetes = facts.kubernetes
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name, "namespace": kubernetes.namespace, "labels": labels(kubernetes)},
        "spec": {
            "type": "ClusterIP",
            "selector": labels(kubernetes, "gateways"),
            "ports": [port],
            **more,
        },
    }

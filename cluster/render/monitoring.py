"""PodMonitors: what Prometheus reads from Ray and from gateways."""

from typing import Any

from cluster.render.pods import PodFacts, labels

_INTERVAL = "15s"


def pod_monitors(facts: PodFacts) -> list[dict[str, Any]]:
    """One for Ray's own figures in every pod, one for those of gateways."""
    kubernetes = facts.kubernetes
    gateway: dict[str, Any] = {"port": "http", "path": "/metrics", "interval": _INTERVAL}
    if kubernetes.tls_secret:
        gateway |= {"scheme": "https", "tlsConfig": _tls(facts)}
    if kubernetes.metrics_secret:
        credentials = {"name": kubernetes.metrics_secret, "key": "key"}
        gateway["authorization"] = {"type": "Bearer", "credentials": credentials}
    ray = {"port": "metrics", "path": "/metrics", "interval": _INTERVAL}
    return [
        _monitor(facts, "ray", labels(kubernetes), ray),
        _monitor(facts, "gateways", labels(kubernetes, "gateways"), gateway),
    ]


def _tls(facts: PodFacts) -> dict[str, Any]:
    kubernetes = facts.kubernetes
    return {
        "ca": {"secret": {"name": kubernetes.tls_secret, "key": "ca.crt"}},
        "serverName": f"{kubernetes.name}.{kubernetes.namespace}.svc",
    }


def _monitor(
    facts: PodFacts, name: str, selector: dict[str, str], endpoint: dict[str, Any]
) -> dict[str, Any]:
    kubernetes = facts.kubernetes
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {
            "name": f"{kubernetes.name}-{name}",
            "namespace": kubernetes.namespace,
            "labels": labels(kubernetes),
        },
        "spec": {
            "selector": {"matchLabels": selector},
            "podTargetLabels": ["eightfold/role", "ray.io/cluster"],
            "podMetricsEndpoints": [endpoint],
        },
    }

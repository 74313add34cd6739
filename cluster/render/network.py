"""NetworkPolicies: nothing comes in or goes out but by the table of ports."""

import ipaddress
from typing import Any

from cluster.render.pods import PodFacts, labels
from cluster.render.ports import called_by, ports

_ANYWHERE = [{"ipBlock": {"cidr": "0.0.0.0/0"}}, {"ipBlock": {"cidr": "::/0"}}]
# Of Kubernetes' own API, which is in no pod; the autoscaler asks it for pods.
_API_PORTS = [{"protocol": "TCP", "port": 443}, {"protocol": "TCP", "port": 6443}]
_DNS = {
    "kubernetes": ("kube-system", {"k8s-app": "kube-dns"}, 53),
    "openshift": ("openshift-dns", {"dns.operator.openshift.io/daemonset-dns": "default"}, 5353),
}


def network_policies(facts: PodFacts) -> list[dict[str, Any]]:
    """The first denies everything; each of the others opens what its name says."""
    kubernetes, table = facts.kubernetes, ports(facts.config)
    peers = [{"podSelector": {"matchLabels": labels(kubernetes)}}]
    to_all, to_head = called_by(table, "cluster", "every pod"), called_by(table, "cluster", "head")
    operator = [_namespace(kubernetes.operator_namespace)]
    monitoring = [_namespace(kubernetes.monitoring_namespace)]
    found = [
        _policy(facts, "deny", None, ingress=[], egress=[]),
        _policy(
            facts,
            "cluster",
            None,
            ingress=[{"from": peers, "ports": to_all}],
            egress=[{"to": peers, "ports": [*to_head, *to_all]}],
        ),
        _policy(facts, "dns", None, egress=[_dns(kubernetes.platform)]),
        _policy(
            facts,
            "head",
            "head",
            ingress=[
                {"from": peers, "ports": to_head},
                {"from": operator, "ports": called_by(table, "operator", "head")},
            ],
            egress=[{"to": _ANYWHERE, "ports": _API_PORTS}],
        ),
        _policy(facts, "gateways", "gateways", ingress=[{"ports": called_by(table, "anybody", "gateways")}]),
        _policy(
            facts,
            "monitoring",
            None,
            ingress=[{"from": monitoring, "ports": called_by(table, "monitoring", "every pod")}],
        ),
    ]
    if kubernetes.redis:
        to = [{"podSelector": {"matchLabels": kubernetes.redis.labels}}]
        port = int(kubernetes.redis.address.rpartition(":")[2])
        egress = [{"to": to, "ports": [{"protocol": "TCP", "port": port}]}]
        found.append(_policy(facts, "redis", "head", egress=egress))
    if tracing := facts.config.tracing:
        egress = [{"to": _collector(tracing.host), "ports": [{"protocol": "TCP", "port": tracing.port}]}]
        found.append(_policy(facts, "tracing", "gateways", egress=egress))
    return found


def _policy(
    facts: PodFacts,
    name: str,
    role: str | None,
    *,
    ingress: list[dict[str, Any]] | None = None,
    egress: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    kubernetes = facts.kubernetes
    spec: dict[str, Any] = {"podSelector": {"matchLabels": labels(kubernetes, role)}, "policyTypes": []}
    for kind, rules in (("Ingress", ingress), ("Egress", egress)):
        if rules is not None:
            spec["policyTypes"].append(kind)
            spec[kind.lower()] = rules
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {
            "name": f"{kubernetes.name}-{name}",
            "namespace": kubernetes.namespace,
            "labels": labels(kubernetes),
        },
        "spec": spec,
    }


def _namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


def _collector(host: str) -> list[dict[str, Any]]:
    """Where traces go: a Service by its name in the cluster, or else an address, or any, for names of hosts
    outside are nothing to a policy.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        service = host.removesuffix(".").removesuffix(".cluster.local")
        if "." not in service:
            return [{"podSelector": {}}]
        if service.endswith(".svc"):
            return [_namespace(service.split(".")[-2])]
        return _ANYWHERE
    return [{"ipBlock": {"cidr": f"{address}/{address.max_prefixlen}"}}]


def _dns(platform: str) -> dict[str, Any]:
    namespace, pods, port = _DNS[platform]
    to = [{**_namespace(namespace), "podSelector": {"matchLabels": pods}}]
    return {"to": to, "ports": [{"protocol": protocol, "port": port} for protocol in ("UDP", "TCP")]}

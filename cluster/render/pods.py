"""Pod templates: what runs, as whom, with which files, and how it is asked whether it works."""

import math
from dataclasses import dataclass
from typing import Any

from cluster.config import ClusterConfig
from cluster.render.description import (
    CHECKPOINT_DIRECTORY,
    CONFIG_DIRECTORY,
    CONFIG_FILE,
    TLS_DIRECTORY,
    drain_seconds,
)
from cluster.render.groups import Group
from cluster.render.ports import EPHEMERAL, ports
from cluster.render.section import KubernetesSection

CLUSTER_LABEL, ROLE_LABEL = "eightfold/cluster", "eightfold/role"
USER_ID = 10001  # of the image
SERVICE = "eightfold.v1.InferenceService"  # whose health says ready; that of the server as a whole says alive
API_TOKEN_VOLUME = "api-token"
API_TOKEN_DIRECTORY = "/var/run/secrets/kubernetes.io/serviceaccount"

# Endpoints of a Service follow the end of a pod late: it goes on taking requests for so long.
_LAG_SECONDS = 5
_STOP_SECONDS = 20  # for processes to end once everything is answered
_PROBE_SECONDS = 5
_HOME = "/home/eightfold"

# Ray joins first and stays; the gateway is the process that Kubernetes signals, so that it can drain.
_GATEWAY = f"ulimit -n 65536; ${{KUBERAY_GEN_RAY_START_CMD/--block/}} && exec eightfold gateway {CONFIG_FILE}"


@dataclass(frozen=True)
class PodFacts:
    """What all templates of a cluster share."""

    config: ClusterConfig
    kubernetes: KubernetesSection
    config_map: str


def labels(kubernetes: KubernetesSection, role: str | None = None) -> dict[str, str]:
    """By which our pods are selected: all of a cluster, or those of a role."""
    return {CLUSTER_LABEL: kubernetes.name} | ({ROLE_LABEL: role} if role else {})


def template(facts: PodFacts, group: Group) -> dict[str, Any]:
    """The template of a group's pods; KubeRay adds `ray start` to its container."""
    is_gateway = group.role == "gateways"
    metadata: dict[str, Any] = {"labels": labels(facts.kubernetes, group.role)}
    if is_gateway:
        metadata["annotations"] = {"ray.io/overwrite-container-cmd": "true"}
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds(facts.config),
        "securityContext": pod_security(facts.kubernetes),
        "containers": [_container(facts, group)],
        "volumes": _volumes(facts, group),
    }
    if facts.kubernetes.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in facts.kubernetes.image_pull_secrets]
    if group.section.node_selector:
        spec["nodeSelector"] = dict(group.section.node_selector)
    if group.section.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in group.section.tolerations]
    if group.pods > 1:
        spec["topologySpreadConstraints"] = [_spread(facts.kubernetes, group)]
    return {"metadata": metadata, "spec": spec}


def grace_seconds(config: ClusterConfig) -> int:
    """From being asked to end to being killed: the longest answer fits in."""
    return int(drain_seconds(config)) + _LAG_SECONDS + _STOP_SECONDS


def pod_security(kubernetes: KubernetesSection) -> dict[str, Any]:
    """Of a pod: nobody special, and a known range for ports that the kernel picks."""
    context: dict[str, Any] = {
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
        "sysctls": [{"name": "net.ipv4.ip_local_port_range", "value": f"{EPHEMERAL.first} {EPHEMERAL.last}"}],
    }
    if kubernetes.platform == "kubernetes":  # OpenShift gives every namespace users of its own
        context |= {"runAsUser": USER_ID, "runAsGroup": USER_ID, "fsGroup": USER_ID}
    return context


def container_security() -> dict[str, Any]:
    """Of a container: nothing to gain."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
    }


def environment() -> list[dict[str, Any]]:
    """Where programs that want a home find one, whoever they run as."""
    return [
        {"name": "HOME", "value": _HOME},
        {"name": "USER", "value": "eightfold"},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
    ]


def scratch_mounts() -> list[dict[str, Any]]:
    """The places that can be written to."""
    return [{"name": "tmp", "mountPath": "/tmp"}, {"name": "home", "mountPath": _HOME}]


def _container(facts: PodFacts, group: Group) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "ray-head" if group.role == "head" else "ray-worker",
        "image": facts.kubernetes.image,
        "env": environment(),
        "ports": _container_ports(facts.config, group),
        "resources": _resources(group),
        "securityContext": container_security(),
        "volumeMounts": _mounts(facts, group),
        "lifecycle": {"preStop": {"exec": {"command": ["sleep", str(_pre_stop(facts.config, group))]}}},
    }
    if group.role != "gateways":
        return container | _ray_probes()
    return container | {"command": ["/bin/bash", "-c"], "args": [_GATEWAY]} | _gateway_probes(facts)


def _pre_stop(config: ClusterConfig, group: Group) -> int:
    """Gateways take requests until Services know; the others outlive what gateways still have open."""
    return _LAG_SECONDS if group.role == "gateways" else _LAG_SECONDS + int(drain_seconds(config))


def _container_ports(config: ClusterConfig, group: Group) -> list[dict[str, Any]]:
    listeners = {"every pod", "head" if group.role == "head" else group.role}
    found = [
        {"name": port.name, "containerPort": port.first}
        for port in ports(config)
        if port.listener in listeners and port.first == port.last
    ]
    if group.role == "head":  # KubeRay refuses a RayService whose head has none of this name; nobody listens
        found.append({"name": "serve", "containerPort": config.gateway.http_port})
    return found


def _resources(group: Group) -> dict[str, Any]:
    wanted: dict[str, Any] = {"cpu": str(group.section.cpus), "memory": group.section.memory}
    if group.section.gpus:
        wanted["nvidia.com/gpu"] = str(group.section.gpus)
    return {"limits": wanted, "requests": dict(wanted)}


def _volumes(facts: PodFacts, group: Group) -> list[dict[str, Any]]:
    kubernetes = facts.kubernetes
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": "20Gi"}},
        {"name": "home", "emptyDir": {"sizeLimit": "10Gi"}},
        {"name": "description", "configMap": {"name": facts.config_map}},
    ]
    if kubernetes.checkpoint_claim:
        claim = {"claimName": kubernetes.checkpoint_claim, "readOnly": True}
        volumes.append({"name": "checkpoint", "persistentVolumeClaim": claim})
    if kubernetes.tls_secret and group.role == "gateways":
        volumes.append({"name": "tls", "secret": {"secretName": kubernetes.tls_secret, "defaultMode": 0o440}})
    if group.role == "head":
        volumes.append({"name": API_TOKEN_VOLUME, "projected": {"sources": _api_token()}})
    return volumes


def _api_token() -> list[dict[str, Any]]:
    """What an automounted token would be; only the autoscaler's container mounts it."""
    namespace = {"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}
    return [
        {"serviceAccountToken": {"path": "token", "expirationSeconds": 3607}},
        {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
        {"downwardAPI": {"items": [namespace]}},
    ]


def _mounts(facts: PodFacts, group: Group) -> list[dict[str, Any]]:
    mounts = scratch_mounts()
    mounts.append({"name": "description", "mountPath": CONFIG_DIRECTORY, "readOnly": True})
    if facts.kubernetes.checkpoint_claim:
        mounts.append({"name": "checkpoint", "mountPath": CHECKPOINT_DIRECTORY, "readOnly": True})
    if facts.kubernetes.tls_secret and group.role == "gateways":
        mounts.append({"name": "tls", "mountPath": TLS_DIRECTORY, "readOnly": True})
    return mounts


def _ray_probes() -> dict[str, Any]:
    """Without them KubeRay asks workers for a proxy of Serve's, and ours have none."""
    health = {"httpGet": {"path": "/api/healthz", "port": "agent-http"}}
    common = {"periodSeconds": _PROBE_SECONDS, "timeoutSeconds": 5}
    return {
        "livenessProbe": {**health, **common, "initialDelaySeconds": 30, "failureThreshold": 24},
        "readinessProbe": {**health, **common, "failureThreshold": 3},
    }


def _gateway_probes(facts: PodFacts) -> dict[str, Any]:
    """A gateway starts once the whole cluster is up; ready is what it says; alive is who answers at all."""
    has_tls = facts.kubernetes.tls_secret
    scheme = "HTTPS" if has_tls else "HTTP"

    def get(path: str) -> dict[str, Any]:
        return {"httpGet": {"path": path, "port": "http", "scheme": scheme}}

    # The kubelet speaks gRPC without TLS only.
    ready = (
        get("/readyz") if has_tls else {"grpc": {"port": facts.config.gateway.grpc_port, "service": SERVICE}}
    )
    common = {"periodSeconds": _PROBE_SECONDS, "timeoutSeconds": 2}
    tries = math.ceil(facts.config.join_seconds / _PROBE_SECONDS)
    return {
        "startupProbe": {**get("/readyz"), **common, "failureThreshold": tries},
        "livenessProbe": {**get("/healthz"), **common, "failureThreshold": 6},
        "readinessProbe": {**ready, **common, "failureThreshold": 2},
    }


def _spread(kubernetes: KubernetesSection, group: Group) -> dict[str, Any]:
    """Over hosts: strictly one a host where so many are asked for, else as evenly as can be."""
    constraint: dict[str, Any] = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule" if group.hosts else "ScheduleAnyway",
        "labelSelector": {"matchLabels": labels(kubernetes, group.role)},
        "matchLabelKeys": ["ray.io/cluster"],  # the next cluster is spread for itself
    }
    if group.hosts:
        constraint["minDomains"] = group.hosts  # with fewer hosts nothing may be doubled
    return constraint

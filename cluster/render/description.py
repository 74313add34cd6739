"""The description as pods read it: the same cluster, with the places of a pod in it."""

import hashlib
from typing import Any

import yaml

from cluster.config import MACHINES_SECONDS, ClusterConfig, ConfigError
from cluster.render.groups import Group
from cluster.render.section import KubernetesSection

CONFIG_DIRECTORY = "/etc/eightfold"
CONFIG_FILE = f"{CONFIG_DIRECTORY}/cluster.yaml"
CHECKPOINT_DIRECTORY = "/checkpoint"
TLS_DIRECTORY = "/etc/eightfold-tls"


def check(config: ClusterConfig, kubernetes: KubernetesSection) -> None:
    """What a description must say, or must not, to run in pods.

    Raises:
        ConfigError: the key, and how to mend it.
    """
    gateway = config.gateway
    if not config.is_disaggregated:
        raise ConfigError(
            "", "prefill", "is missing: on Kubernetes prefill and decode have engines of their own"
        )
    for key, kind in (("pages", config.carriers.pages), ("rows", config.carriers.rows)):
        if kind in ("ipc", "copy"):
            problem = f"is {kind}, which does not reach into another pod; host and nccl do"
            raise ConfigError("", f"carriers.{key}", problem)
    for key in ("http_port", "grpc_port"):
        if getattr(gateway, key) < 1024:
            raise ConfigError("", f"gateway.{key}", f"is {getattr(gateway, key)}; choose one from 1024 on")
    if gateway.tls and not kubernetes.tls_secret:
        raise ConfigError("", "gateway.tls", "names files; in pods they come from kubernetes.tls_secret")
    if gateway.api_key_hashes and not kubernetes.metrics_secret:
        raise ConfigError("", "kubernetes.metrics_secret", "is missing: /metrics asks for a key, too")


def inside(config: ClusterConfig, kubernetes: KubernetesSection, groups: tuple[Group, ...]) -> str:
    """The description that pods read, as YAML."""
    told: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True, exclude={"kubernetes"})
    told.setdefault("model", {})["name"] = config.model.served_name
    if kubernetes.checkpoint_claim:
        told["model"]["directory"] = CHECKPOINT_DIRECTORY
    told["ray"] = told.get("ray", {}) | {"address": "auto"}
    gateway = told.setdefault("gateway", {})
    gateway["host"] = "0.0.0.0"
    # A gateway that is asked to go has time for the longest answer it may owe.
    gateway["drain_seconds"] = drain_seconds(config)
    if kubernetes.tls_secret:
        gateway["tls"] = {"certificate": f"{TLS_DIRECTORY}/tls.crt", "key": f"{TLS_DIRECTORY}/tls.key"}
    for group in groups:
        if group.role in ("prefill", "decode", "experts"):
            told[group.role]["node_labels"] = group.node_labels
    if config.experts.placement == "pool":
        told["experts"]["place_seconds"] = max(config.experts.place_seconds, MACHINES_SECONDS)
    ClusterConfig.model_validate(told)
    text: str = yaml.safe_dump(told, sort_keys=True, allow_unicode=True)
    return text


def drain_seconds(config: ClusterConfig) -> float:
    """How long a gateway waits for open requests before it ends."""
    return max(config.gateway.drain_seconds, config.gateway.limits.total_seconds)


def config_map_name(kubernetes: KubernetesSection, text: str) -> str:
    """Another description has another name: a running cluster keeps the one it was started with."""
    return f"{kubernetes.name}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def config_map(kubernetes: KubernetesSection, text: str) -> dict[str, Any]:
    """The ConfigMap that holds the description."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": config_map_name(kubernetes, text), "namespace": kubernetes.namespace},
        "immutable": True,
        "data": {"cluster.yaml": text},
    }

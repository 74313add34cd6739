"""The RayService: one Ray for the whole cluster, and what Serve is to start in it."""

from typing import Any

import yaml

from cluster.render.description import CONFIG_FILE
from cluster.render.groups import Group
from cluster.render.pods import (
    API_TOKEN_DIRECTORY,
    API_TOKEN_VOLUME,
    PodFacts,
    container_security,
    environment,
    labels,
    scratch_mounts,
    template,
)
from cluster.render.ports import ray_start_params

RAY_VERSION = "2.60.0"  # of the image
_UPGRADES = {"new_cluster": "NewCluster", "none": "None"}


def ray_service(facts: PodFacts, groups: tuple[Group, ...]) -> dict[str, Any]:
    """What KubeRay makes a Ray of, with the engines in it."""
    kubernetes = facts.kubernetes
    head, *workers = groups
    cluster: dict[str, Any] = {
        "rayVersion": RAY_VERSION,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": _autoscaler(),
        "authOptions": {"mode": "token"},  # KubeRay makes the token and keeps it in a Secret
    }
    if kubernetes.redis:
        password = {"secretKeyRef": {"name": kubernetes.redis.secret, "key": "password"}}
        cluster["gcsFaultToleranceOptions"] = {
            "redisAddress": kubernetes.redis.address,
            "redisPassword": {"valueFrom": password},
        }
    cluster["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "rayStartParams": ray_start_params(is_head=True) | {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "labels": head.node_labels,
        "template": template(facts, head),
    }
    cluster["workerGroupSpecs"] = [_worker_group(facts, group) for group in workers]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {
            "name": kubernetes.name,
            "namespace": kubernetes.namespace,
            "labels": labels(kubernetes),
        },
        "spec": {
            "serveConfigV2": serve_config(),
            "upgradeStrategy": {"type": _UPGRADES[kubernetes.upgrade]},
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": cluster,
        },
    }


def serve_config() -> str:
    """What Serve starts: engines of both roles. No proxies: requests come through our own gateways."""
    roles = ("prefill", "decode")
    config = {
        "proxy_location": "Disabled",
        "applications": [
            {
                "name": role,
                "import_path": "cluster.serve_app:build",
                "route_prefix": None,
                "args": {"role": role, "config": CONFIG_FILE},
            }
            for role in roles
        ],
    }
    text: str = yaml.safe_dump(config, sort_keys=False)
    return text


def _worker_group(facts: PodFacts, group: Group) -> dict[str, Any]:
    return {
        "groupName": group.role,
        # Pods are there for the most engines that there may be: the nodes of a Ray do not come and go.
        "replicas": group.pods,
        "minReplicas": group.pods,
        "maxReplicas": group.pods,
        "numOfHosts": 1,
        "rayStartParams": ray_start_params(is_head=False),
        "labels": group.node_labels,
        "template": template(facts, group),
    }


def _autoscaler() -> dict[str, Any]:
    """The one container that talks to Kubernetes, and so the one that has a token for it."""
    wanted = {"cpu": "500m", "memory": "512Mi"}
    return {
        "version": "v2",
        "env": environment(),
        "resources": {"limits": wanted, "requests": dict(wanted)},
        "securityContext": container_security(),
        "volumeMounts": [
            *scratch_mounts(),
            {"name": API_TOKEN_VOLUME, "mountPath": API_TOKEN_DIRECTORY, "readOnly": True},
        ],
    }

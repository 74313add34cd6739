"""A cluster as applications that Ray Serve starts by itself, as KubeRay asks it to.

`import_path: cluster.serve_app:build` of a Serve configuration, with `args: {role, config}`: an application
for prefill and one for decode. Whichever is built first starts the supervisor, and with it the experts.
Gateways are processes of their own: `eightfold gateway`.
"""

import time
from pathlib import Path
from typing import Annotated

import ray
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

from cluster.config import MACHINES_SECONDS, ClusterConfig, ConfigError
from cluster.engines import deployment
from cluster.supervisor import new_secrets, start_supervisor
from workers.wire import Role

_POLL_SECONDS = 1.0


class Arguments(BaseModel):
    """Which engines to build, and the description that says how; its path is the same on every node."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Role
    config: Annotated[Path, Field(strict=False)]


def build(arguments: Arguments) -> serve.Application:
    """The engines of a role, when their nodes are there and the experts are up.

    Raises:
        ConfigError: the description describes no cluster on a Ray that runs already.
        TimeoutError: the nodes did not come.
        ray.exceptions.RayError: the experts did not come up.
    """
    config = ClusterConfig.load(arguments.config)
    if not config.is_disaggregated or config.ray.address == "local":
        problem = "must have prefill and decode, and a ray.address that is not local, to run inside a Ray"
        raise ConfigError(arguments.config.name, "", problem)
    supervisor = start_supervisor(config, new_secrets(), is_detached=True)
    ray.get(supervisor.directory.remote(), timeout=config.start_seconds)
    _wait_for_nodes(arguments.role, config)
    return deployment(arguments.role, config)


def _wait_for_nodes(role: Role, config: ClusterConfig) -> None:
    """Engines that start before their nodes are there would fail a few times, and then for good."""
    section = config.role(role)
    gpus = section.engines * section.attention_actors * section.gpus if config.model.device == "cuda" else 0
    deadline = time.monotonic() + MACHINES_SECONDS
    while True:
        alive = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        nodes = [node for node in alive if section.node_labels.items() <= node["Labels"].items()]
        found = sum(node["Resources"].get("GPU", 0) for node in nodes)
        if nodes and found >= gpus:
            return
        if time.monotonic() > deadline:
            problem = f"{len(nodes)} nodes with labels {section.node_labels} and {found:g} of {gpus:g} GPUs"
            raise TimeoutError(f"only {problem} came for {role} within {MACHINES_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)

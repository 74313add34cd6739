"""Prefill and decode engines as Serve deployments: a replica starts attention actors and keeps them alive.

Serve decides how many replicas there are and replaces those that fail. Requests do not pass through them: a
gateway talks to the attention actors themselves.
"""

import logging
import threading
from typing import Any

import ray
from ray import serve

from cluster.config import ClusterConfig, RoleSection
from cluster.directory import WorkerEntry
from cluster.ray_runtime import own_host, place_of
from cluster.supervisor import Secrets, role_section, the_supervisor
from model.config import ModelConfig
from workers.actors import AttentionActor, AttentionActorConfig
from workers.wire import Role

_log = logging.getLogger(__name__)

START_SECONDS = 120.0  # for a process that imports torch and reads its weights, on a busy machine
CALL_SECONDS = 10.0
_REGISTER_SECONDS = 0.5
_DEFAULT_CONTEXTS = 8  # so many of the longest sequences have room where the description does not say


class EngineReplica:
    """One engine: the attention actors of one Serve replica."""

    def __init__(self, role: Role, config: ClusterConfig) -> None:
        logging.basicConfig(level=logging.WARNING)
        self._name = serve.get_replica_context().replica_id.unique_id
        supervisor = the_supervisor()
        secrets: Secrets = ray.get(supervisor.secrets.remote(), timeout=START_SECONDS)
        section = role_section(config, role)
        self._configs = [
            _actor_config(f"{role}-{self._name}-{index}", role, config, secrets)
            for index in range(section.attention_actors)
        ]
        self._labels = section.node_labels
        self._role: Role = role
        self._actors = [self._start(actor) for actor in self._configs]
        self._witnesses = [actor.wait_until_stopped.remote() for actor in self._actors]
        self._entries: list[WorkerEntry | None] = [None] * len(self._actors)
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._register()
        self._keeper = threading.Thread(target=self._keep, name="engine", daemon=True)
        self._keeper.start()

    def check_health(self) -> None:
        """Serve asks this; a replica that cannot bring its actors back is replaced.

        Raises:
            Exception: why not.
        """
        if self._failure:
            raise self._failure

    def workers(self) -> list[str]:
        """Names of its attention actors."""
        return [config.name for config in self._configs]

    def __del__(self) -> None:
        self._stopping.set()
        for actor in self._actors:
            ray.kill(actor)

    def _keep(self) -> None:
        """Register again and again, and replace actors that died."""
        while not self._stopping.wait(_REGISTER_SECONDS):
            try:
                dead, _ = ray.wait(self._witnesses, num_returns=len(self._witnesses), timeout=0)
                for witness in dead:
                    self._replace(self._witnesses.index(witness))
                self._register()
                self._failure = None
            except ray.exceptions.RayActorError as error:  # e.g. the supervisor starts anew
                _log.warning("engine %s cannot register yet: %s", self._name, type(error).__name__)
            except Exception as error:
                _log.exception("engine %s", self._name)
                self._failure = error

    def _replace(self, index: int) -> None:
        _log.warning("attention actor %s is gone; starting another", self._configs[index].name)
        actor = self._start(self._configs[index])
        self._actors[index], self._witnesses[index] = actor, actor.wait_until_stopped.remote()
        self._entries[index] = None

    def _register(self) -> None:
        """Make the actors known. The first time an actor is told the placement before it starts to work."""
        for index, entry in enumerate(self._entries):
            if entry is None:
                self._entries[index] = self._entry(index)
        entries = tuple(entry for entry in self._entries if entry)
        actors = {config.name: actor for config, actor in zip(self._configs, self._actors, strict=True)}
        ray.get(the_supervisor().register.remote(self._name, entries, actors), timeout=CALL_SECONDS)

    def _entry(self, index: int) -> WorkerEntry:
        actor = self._actors[index]
        address, place = ray.get([actor.start.remote(), place_of(actor)], timeout=START_SECONDS)
        return WorkerEntry(self._role, self._name, place.node, place.pid, address)

    def _start(self, config: AttentionActorConfig) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "max_concurrency": 4}
        if self._labels:
            options["label_selector"] = self._labels
        return ray.remote(AttentionActor).options(**options).remote(config)


def _actor_config(name: str, role: Role, config: ClusterConfig, secrets: Secrets) -> AttentionActorConfig:
    section: RoleSection = role_section(config, role)
    longest = ModelConfig.load(config.model.directory).max_position_embeddings
    return AttentionActorConfig(
        name,
        role,
        config.model.directory.resolve(),
        config.model.options(),
        config.engine.config(),
        section.tokens or _DEFAULT_CONTEXTS * longest,
        config.router.lease_seconds,
        config.experts.layer_seconds if config.experts.placement == "pool" else None,
        secrets.token,
        secrets.pages,
        tcp_host=None if config.ray.address == "local" else own_host,
    )


def deployment(role: Role, config: ClusterConfig) -> serve.Application:
    """The Serve application of a role: one deployment, an engine a replica."""
    section = role_section(config, role)
    make = serve.deployment(
        name=role,
        num_replicas=section.engines,
        health_check_period_s=2,
        ray_actor_options={"num_cpus": 0},
    )
    return make(EngineReplica).bind(role, config)

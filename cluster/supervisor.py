"""The one actor that knows the whole: it keeps the expert pool alive and says who is there.

Nothing it knows is lost with it: Ray starts it again, it starts the experts anew under a later epoch, and
engines, which register again and again, are known within a second.
"""

import logging
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.autoscaling import Autoscaler
from cluster.config import ClusterConfig
from cluster.directory import Directory, WorkerEntry
from cluster.expert_pool import ExpertPool
from cluster.ray_runtime import own_host
from workers.wire import Role, WorkerStatus

NAME, NAMESPACE = "supervisor", "eightfold"

_FORGET_SECONDS = 5.0  # an engine that has not registered for so long is gone


@dataclass(frozen=True)
class Secrets:
    """What all parts share: `token` lets peers connect, `pages` keys the names of pages."""

    token: bytes = field(repr=False)
    pages: bytes = field(repr=False)


def new_secrets() -> Secrets:
    """Those of a new cluster."""
    return Secrets(secrets.token_bytes(32), secrets.token_bytes(32))


@dataclass
class _Engine:
    workers: tuple[WorkerEntry, ...]
    statuses: dict[str, WorkerStatus]
    heard: float

    @property
    def stays(self) -> bool:
        return not any(status.leaving for status in self.statuses.values())


class Supervisor:
    """Starts the experts of a description; engines register here, gateways ask here."""

    def __init__(self, config: ClusterConfig, secrets: Secrets) -> None:
        logging.basicConfig(level=logging.WARNING)
        logging.getLogger("cluster.autoscaling").setLevel(logging.INFO)  # decisions and their reasons
        self._secrets = secrets
        self._lock = threading.Lock()
        self._engines: dict[str, _Engine] = {}
        self._scalers = _scalers(config)
        self._pool = _expert_pool(config, secrets) if config.experts.placement == "pool" else None

    def secrets(self) -> Secrets:
        """For engines that start."""
        return self._secrets

    def register(
        self,
        engine: str,
        workers: tuple[WorkerEntry, ...],
        actors: dict[str, Any],
        statuses: dict[str, WorkerStatus],
    ) -> None:
        """An engine says, again and again, which workers it has; `actors` and `statuses` are theirs, by name.

        A worker is known to others only after it has learnt where the experts are.
        """
        with self._lock:
            known = self._engines.get(engine)
            known_workers = set(known.workers) if known else set()
        for entry in workers:
            if self._pool and entry not in known_workers:
                self._pool.subscribe(entry.address.name, actors[entry.address.name])
        with self._lock:
            self._engines[engine] = _Engine(workers, statuses, time.monotonic())
            self._forget_silent()

    def unregister(self, engine: str) -> None:
        """An engine ends."""
        with self._lock:
            self._forget(engine)

    def directory(self) -> Directory:
        """Who is there now."""
        with self._lock:
            self._forget_silent()
            workers = tuple(entry for engine in self._engines.values() for entry in engine.workers)
            scaling = tuple(scaler.shown() for scaler in self._scalers.values())
        if not self._pool:
            return Directory(0, workers, scaling=scaling)
        return Directory(self._pool.current().epoch, workers, self._pool.entries(), scaling)

    def want(self, role: Role, current: int) -> int:
        """How many engines of a role there shall be, where there shall be `current` so far.

        Serve's controller asks once a second (`serve_policy.py`).
        """
        with self._lock:
            self._forget_silent()
            engines = {
                name: engine.statuses
                for name, engine in self._engines.items()
                if engine.stays and any(entry.role == role for entry in engine.workers)
            }
            return self._scalers[role].want(current, engines, time.monotonic(), time.time()).after

    def _forget_silent(self) -> None:
        horizon = time.monotonic() - _FORGET_SECONDS
        for engine in [engine for engine, known in self._engines.items() if known.heard < horizon]:
            self._forget(engine)

    def _forget(self, engine: str) -> None:
        known = self._engines.pop(engine, None)
        if known and self._pool:
            for entry in known.workers:
                self._pool.unsubscribe(entry.address.name)


def _scalers(config: ClusterConfig) -> dict[Role, Autoscaler]:
    roles: tuple[Role, ...] = ("prefill", "decode")
    sections = {role: config.role(role) for role in roles if config.is_disaggregated}
    return {
        role: Autoscaler(role, section.engines, section.autoscale)
        for role, section in sections.items()
        if section.autoscale
    }


def _expert_pool(config: ClusterConfig, secrets: Secrets) -> ExpertPool:
    experts = config.experts
    return ExpertPool(
        config.model.directory,
        experts.nodes,
        options=config.model.options(),
        gpus=experts.gpus,
        token=secrets.token,
        first_epoch=int(time.time()),  # later than that of any supervisor before
        spread=experts.spread,
        node_labels=experts.node_labels,
        place_seconds=experts.place_seconds,
        tcp_host=None if config.ray.address == "local" else own_host,
        row_carrier=config.carriers.row_carrier,
    )


def start_supervisor(config: ClusterConfig, secrets: Secrets, *, is_detached: bool = False) -> Any:
    """The actor's handle; it comes back by itself as long as the process that started it lives.

    Args:
        is_detached: it lives as long as the Ray it is in, and where there is one already, that is taken.
    """
    options: dict[str, Any] = {
        "name": NAME,
        "namespace": NAMESPACE,
        "num_cpus": 0,
        "max_concurrency": 16,
        "max_restarts": -1,
    }
    if is_detached:
        options |= {"lifetime": "detached", "get_if_exists": True}
        if config.experts.node_labels:
            # All experts end with it: it belongs where the loss of a node is a loss of experts anyhow.
            options["label_selector"] = config.experts.node_labels
    return ray.remote(Supervisor).options(**options).remote(config, secrets)


def the_supervisor() -> Any:
    """The actor's handle, from anywhere in the cluster.

    Raises:
        ValueError: there is none.
    """
    return ray.get_actor(NAME, namespace=NAMESPACE)

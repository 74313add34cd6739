"""The one actor that knows the whole: it keeps the expert pool alive and says who is there.

Nothing it knows is lost with it: Ray starts it again, it starts the experts anew under a later epoch, and
engines, which register again and again, are known within a second.
"""

import logging
import math
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.autoscaling import Autoscaler
from cluster.config import ClusterConfig
from cluster.directory import Directory, RoleEngines, WorkerEntry
from cluster.expert_pool import ExpertPool
from cluster.ray_runtime import own_host
from cluster.starts import Starts
from workers.wire import Role, WorkerStatus

_log = logging.getLogger(__name__)

NAME, NAMESPACE = "supervisor", "eightfold"

_FORGET_SECONDS = 5.0  # an engine that has not registered for so long is gone
_CALLED_SECONDS = 5.0  # for so long a call for an engine is heard: who scales asks once a second
_ROLES: tuple[Role, ...] = ("prefill", "decode")


@dataclass(frozen=True)
class Secrets:
    """What all parts share: `token` lets peers connect, `pages` keys the names of pages."""

    token: bytes = field(repr=False)
    pages: bytes = field(repr=False)


def new_secrets() -> Secrets:
    """Those of a new cluster."""
    return Secrets(secrets.token_bytes(32), secrets.token_bytes(32))


@dataclass(frozen=True)
class Start:
    """What an engine that starts is told: to wait for so long, where others before it have failed."""

    secrets: Secrets
    wait_seconds: float


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
        self._sections = {role: config.role(role) for role in _ROLES if config.is_disaggregated}
        self._scalers = {
            role: Autoscaler(role, section.engines, section.autoscale)
            for role, section in self._sections.items()
            if section.autoscale
        }
        self._starts = {role: Starts() for role in self._sections}
        self._called = -math.inf
        self._pool = _expert_pool(config, secrets) if config.experts.placement == "pool" else None

    def secrets(self) -> Secrets:
        """For gateways that join."""
        return self._secrets

    def begin(self, role: Role) -> Start:
        """For an engine that starts."""
        with self._lock:
            return Start(self._secrets, self._starts[role].wait_seconds)

    def failed(self, role: Role, why: str) -> None:
        """An engine did not come up."""
        _log.warning("%s: an engine did not come up: %s", role, why)
        with self._lock:
            self._starts[role].failed(why, time.time())

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
            if workers and not known_workers:
                self._starts[workers[0].role].succeeded()
            self._engines[engine] = _Engine(workers, statuses, time.monotonic())
            self._forget_silent()

    def unregister(self, engine: str) -> None:
        """An engine ends."""
        with self._lock:
            self._forget(engine)

    def directory(self, calls_prefill: bool = False) -> Directory:
        """Who is there now; as of `DirectorySource`."""
        with self._lock:
            self._forget_silent()
            if calls_prefill:
                self._called = time.monotonic()
            workers = tuple(entry for engine in self._engines.values() for entry in engine.workers)
            scaling = tuple(scaler.shown() for scaler in self._scalers.values())
            engines = tuple(self._shall_be(role) for role in self._sections)
        epoch, experts = (self._pool.current().epoch, self._pool.entries()) if self._pool else (0, ())
        return Directory(epoch, workers, experts, engines, scaling)

    def _shall_be(self, role: Role) -> RoleEngines:
        section, scaler, starts = self._sections[role], self._scalers.get(role), self._starts[role]
        wanted = scaler.wanted if scaler else section.engines
        return RoleEngines(role, wanted, section.attention_actors, starts.num_failed, starts.last_failure)

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
            now = time.monotonic()
            is_called = role == "prefill" and not engines and now - self._called < _CALLED_SECONDS
            return self._scalers[role].want(current, engines, now, time.time(), is_called=is_called).after

    def _forget_silent(self) -> None:
        horizon = time.monotonic() - _FORGET_SECONDS
        for engine in [engine for engine, known in self._engines.items() if known.heard < horizon]:
            self._forget(engine)

    def _forget(self, engine: str) -> None:
        known = self._engines.pop(engine, None)
        if known and self._pool:
            for entry in known.workers:
                self._pool.unsubscribe(entry.address.name)


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
        start_seconds=config.ray.start_seconds,
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

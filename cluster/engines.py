"""Prefill and decode engines as Serve deployments: a replica starts attention actors and keeps them alive.

Serve decides how many replicas there are and replaces those that fail. Requests do not pass through them: a
gateway talks to the attention actors themselves.
"""

import logging
import threading
import time
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.config import ClusterConfig, RoleSection, room
from cluster.directory import WorkerEntry
from cluster.ray_runtime import Place, own_host, place_of, started
from cluster.serve_policy import SupervisorPolicy
from cluster.starts import reason_of
from cluster.supervisor import NAME, NAMESPACE, Secrets, Start, the_supervisor
from model.config import ModelConfig
from workers.actors import AttentionActor, AttentionActorConfig
from workers.transport.protocol import Address
from workers.warm_up import MOST_SECONDS as WARM_UP_SECONDS
from workers.wire import Role, WorkerStatus

_log = logging.getLogger(__name__)

CALL_SECONDS = 10.0
_REGISTER_SECONDS = 0.5
_DRAIN_MARGIN_SECONDS = 30.0  # from the end of the longest request to that of its worker
_STARTS = 2  # that may fail before a replica's failure is its deployment's


class EngineReplica:
    """One engine: the attention actors of one Serve replica."""

    def __init__(self, role: Role, config: ClusterConfig) -> None:
        logging.basicConfig(level=logging.WARNING)
        self._members: list[_Member] = []
        self._failure: Exception | None = None
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None
        self._drain_seconds = config.gateway.limits.total_seconds
        self._start_seconds = config.ray.start_seconds + WARM_UP_SECONDS
        self._name = serve.get_replica_context().replica_id.unique_id
        told = the_supervisor().begin.remote(role)
        start: Start = started([told], "the experts", config.start_seconds)[0]  # it comes up when they have
        self._stopping.wait(start.wait_seconds)
        section = config.role(role)
        self._configs = [
            _actor_config(f"{role}-{self._name}-{index}", role, config, start.secrets)
            for index in range(section.attention_actors)
        ]
        self._labels = section.node_labels
        self._gpus = section.gpus if config.model.device == "cuda" else 0
        self._role: Role = role
        self._members += [_Member(self._start(config)) for config in self._configs]
        try:
            calls = [call for member in self._members for call in member.start]
            started(calls, f"attention actors of {role}", self._start_seconds)
        except Exception as error:
            self._tell_failure(error)
            raise
        self._keeper = threading.Thread(target=self._keep, name="engine", daemon=True)
        self._keeper.start()

    def check_health(self) -> None:
        """Serve asks this; a replica that cannot bring its actors back is replaced.

        Raises:
            Exception: why not.
        """
        if self._failure:
            raise self._failure

    def __del__(self) -> None:
        """Serve calls this when the replica is to end, and waits for it no longer than it was told."""
        if self._stopping.is_set():
            return
        self._stopping.set()
        if self._keeper:
            self._keeper.join()
            self._drain()
        for member in self._members:
            ray.kill(member.actor)

    def _drain(self) -> None:
        """Until the actors run nothing and nobody would send them anything."""
        for member in self._members:
            member.actor.leave.remote()
        deadline = time.monotonic() + self._drain_seconds
        while time.monotonic() < deadline and not all(member.has_left() for member in self._members):
            self._try_to_register()
            time.sleep(_REGISTER_SECONDS)
        try:
            ray.get(the_supervisor().unregister.remote(self._name), timeout=CALL_SECONDS)
        except (ray.exceptions.RayError, ValueError):  # it forgets who is silent
            _log.warning("engine %s could not unregister", self._name)

    def _keep(self) -> None:
        """Register again and again, and replace actors that died."""
        while not self._stopping.wait(_REGISTER_SECONDS):
            for index, member in enumerate(self._members):
                if self._failure:
                    break
                if member.is_dead():
                    self._replace(index)
                elif not member.has_worked and member.age_seconds > self._start_seconds:
                    name, seconds = self._configs[index].name, self._start_seconds
                    self._give_up(TimeoutError(f"{name} did not come up again within {seconds:g} s"))
            self._try_to_register()

    def _try_to_register(self) -> None:
        try:
            self._register()
        except (ray.exceptions.RayError, ValueError) as error:  # the supervisor starts anew, or is slow
            _log.warning("engine %s cannot register yet: %s", self._name, type(error).__name__)

    def _replace(self, index: int) -> None:
        name = self._configs[index].name
        _log.warning("%s is gone; starting another", name)
        if not self._members[index].has_worked:  # nor would the next one
            self._give_up(RuntimeError(f"attention actor {name} does not start"))
        self._members[index] = _Member(self._start(self._configs[index]))

    def _give_up(self, failure: Exception) -> None:
        """This engine cannot go on: Serve learns it when it asks, and starts another."""
        if not self._failure:
            self._tell_failure(failure)
        self._failure = failure

    def _tell_failure(self, error: Exception) -> None:
        try:
            told = the_supervisor().failed.remote(self._role, reason_of(error))
            ray.get(told, timeout=CALL_SECONDS)
        except (ray.exceptions.RayError, ValueError):  # it starts anew, and will hear of the next
            _log.warning("engine %s does not come up, and nobody hears why", self._name)

    def _register(self) -> None:
        """Make known who works; one that is starting follows later, and holds up nobody."""
        names = [config.name for config in self._configs]
        working = {
            name: (member, place)
            for name, member in zip(names, self._members, strict=True)
            if (place := member.place())
        }
        entries = tuple(
            WorkerEntry(self._role, self._name, place.node, place.pid, address)
            for _, (address, place) in working.values()
        )
        actors = {name: member.actor for name, (member, _) in working.items()}
        statuses = {name: status for name, (member, _) in working.items() if (status := member.status())}
        told = the_supervisor().register.remote(self._name, entries, actors, statuses)
        ray.get(told, timeout=CALL_SECONDS)

    def _start(self, config: AttentionActorConfig) -> Any:
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": self._gpus, "max_concurrency": 4}
        if self._labels:
            options["label_selector"] = self._labels
        return ray.remote(AttentionActor).options(**options).remote(config)


class _Member:
    """An attention actor and the calls that are pending on it."""

    def __init__(self, actor: Any) -> None:
        self.actor, self.has_worked = actor, False
        self._began = time.monotonic()
        self.start = [actor.start.remote(), place_of(actor)]
        self._witness = actor.wait_until_stopped.remote()
        self._status: WorkerStatus | None = None
        self._asked: ray.ObjectRef[WorkerStatus] | None = None

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self._began

    def is_dead(self) -> bool:
        """A call that is pending for as long as the actor lives has ended."""
        return bool(ray.wait([self._witness], timeout=0)[0])

    def has_left(self) -> bool:
        """Whether nobody misses it when it ends: it was told to leave and all have noted, or it is dead."""
        if self.is_dead() or not self.place():
            return True
        try:
            return bool(ray.get(self.actor.has_left.remote(), timeout=CALL_SECONDS))
        except ray.exceptions.RayError:  # it is slow, or dies
            return False

    def status(self) -> WorkerStatus | None:
        """What it said last, which is not waited for."""
        if self._asked and ray.wait([self._asked], timeout=0)[0]:
            try:
                self._status = ray.get(self._asked)
            except ray.exceptions.RayError:  # it dies, which is seen elsewhere
                self._status = None
            self._asked = None
        if self._asked is None:
            self._asked = self.actor.status.remote()
        return self._status

    def place(self) -> tuple[Address, Place] | None:
        """Where it is reached and where it runs; None while it starts, or if it died."""
        if len(ray.wait(self.start, num_returns=len(self.start), timeout=0)[0]) < len(self.start):
            return None
        try:
            address, place = ray.get(self.start)
        except ray.exceptions.RayError:
            return None
        self.has_worked = True
        return address, place


def _actor_config(name: str, role: Role, config: ClusterConfig, secrets: Secrets) -> AttentionActorConfig:
    section = config.role(role)
    longest = ModelConfig.load(config.model.directory).max_position_embeddings
    return AttentionActorConfig(
        name,
        role,
        config.model.directory.resolve(),
        config.model.options(),
        config.engine.config(),
        room(section.tokens, longest),
        config.router.lease_seconds,
        config.experts.layer_seconds if config.experts.placement == "pool" else None,
        config.carriers.page_carrier,
        secrets.token,
        secrets.pages,
        tcp_host=None if config.ray.address == "local" else own_host,
        row_carrier=config.carriers.row_carrier,
    )


def deployment(role: Role, config: ClusterConfig) -> serve.Application:
    """The Serve application of a role: one deployment, an engine a replica."""
    section = config.role(role)
    options: dict[str, Any] = {"num_cpus": 0}
    if section.node_labels:  # its actors end with it: it belongs where they are
        options["label_selector"] = section.node_labels
    make = serve.deployment(
        name=role,
        **_number_of_replicas(role, section),
        health_check_period_s=2,
        graceful_shutdown_timeout_s=config.gateway.limits.total_seconds + _DRAIN_MARGIN_SECONDS,
        max_constructor_retry_count=_STARTS,  # of 20 the user would wait for the end
        ray_actor_options=options,
    )
    return make(EngineReplica).bind(role, config)


def _number_of_replicas(role: Role, section: RoleSection) -> dict[str, Any]:
    if not section.autoscale:
        return {"num_replicas": section.engines}
    names = {"role": role, "supervisor": NAME, "namespace": NAMESPACE}
    policy = AutoscalingPolicy(policy_function=SupervisorPolicy, policy_kwargs=names)  # type: ignore[no-untyped-call]
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=section.engines,
            max_replicas=section.autoscale.max,
            policy=policy,
            upscale_delay_s=0,  # whoever decides has waited as long as it should
            downscale_delay_s=0,
        )
    }

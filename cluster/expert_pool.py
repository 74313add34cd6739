"""The expert pool on Ray: an actor a node, who holds what, and a successor for each that dies.

A change of placement is a new epoch. An actor that dies is noticed by a Ray call that is pending on it as
long as it lives; a new one takes its name and groups, everybody adopts the next epoch, and dispatchers, who
ask for the current placement at every layer, go on. Experts are stateless: nothing is lost but a layer.
"""

import logging
import secrets
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.directory import ExpertEntry
from cluster.ray_runtime import Place, place_of, started
from workers.actors import ExpertActor, ExpertActorConfig, ExpertActorStats, TcpHost
from workers.local import ModelOptions, open_checkpoint
from workers.placement import ExpertPlacement
from workers.transport.config import CarrierKind
from workers.transport.protocol import Address

_log = logging.getLogger(__name__)

Spread = Literal["loose", "strict"]

PLACE_SECONDS = 30.0
START_SECONDS = 120.0  # of the small model that is meant where nobody says
CALL_SECONDS = 10.0
_WATCH_SECONDS = 0.2
_CPUS = 0.01  # of Ray's count: a bundle must ask for something


class ExpertPool:
    """Starts the expert actors of a model and keeps them alive. Ray must be running.

    It is the `PlacementSource` of `RemoteExperts`. One thread of its own watches the actors.
    """

    def __init__(
        self,
        directory: Path,
        num_nodes: int,
        *,
        options: ModelOptions = ModelOptions(),  # noqa: B008 - frozen
        gpus: float = 1.0,
        token: bytes | None = None,
        first_epoch: int = 1,
        spread: Spread = "loose",
        node_labels: dict[str, str] | None = None,
        place_seconds: float = PLACE_SECONDS,
        start_seconds: float = START_SECONDS,
        tcp_host: TcpHost = None,
        row_carrier: CarrierKind | None = None,
    ) -> None:
        """Start the actors and wait until each has loaded its experts.

        Args:
            num_nodes: expert actors, each with a run of whole groups; at most `n_group`.
            gpus: what each actor takes of a GPU, where the device is one.
            token: the cluster's secret; None for one of its own.
            first_epoch: higher than any of an earlier pool that its peers may remember.
            spread: `strict` for a node of Ray each, `loose` for as many as there are.
            node_labels: of the nodes that may be used.
            place_seconds: how long to wait for such nodes.
            start_seconds: how long an actor may take from its process to its experts.
            tcp_host, row_carrier: as of `ExpertActorConfig`.

        Raises:
            PlacementError: more nodes than groups.
            TimeoutError: the nodes that were asked for are not there, or an actor did not come up in time.
        """
        self._start_seconds = start_seconds
        self.token = token or secrets.token_bytes(32)
        self._model = open_checkpoint(directory, options).config
        shares = _runs(self._model.n_group, num_nodes)
        self._configs = [
            ExpertActorConfig(
                f"experts-{node}", directory.resolve(), groups, options, self.token, tcp_host, row_carrier
            )
            for node, groups in enumerate(shares)
        ]
        self._subscribers: dict[str, Any] = {}
        self._gpus = gpus if options.device == "cuda" else 0
        self._group = _placement_group(num_nodes, self._gpus, spread, node_labels or {}, place_seconds)
        self._actors = [self._start(node) for node in range(num_nodes)]
        self._witnesses = [actor.wait_until_stopped.remote() for actor in self._actors]
        try:
            self._places, addresses = self._wait_for(self._actors)
            self._place(addresses, first_epoch)
        except BaseException:
            self._kill_all()
            raise
        self._stopping = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="expert-pool", daemon=True)
        self._watcher.start()

    def current(self) -> ExpertPlacement:
        """The newest placement."""
        return self._placement

    def subscribe(self, name: str, actor: Any) -> None:
        """Tell an actor this placement and every later one, in place of an earlier actor of its name."""
        self._subscribers[name] = actor
        ray.get(actor.adopt.remote(self._placement), timeout=CALL_SECONDS)

    def unsubscribe(self, name: str) -> None:
        """It is gone."""
        self._subscribers.pop(name, None)

    def stats(self) -> list[ExpertActorStats]:
        """What each actor did since its start."""
        found: list[ExpertActorStats] = ray.get(
            [actor.stats.remote() for actor in self._actors], timeout=CALL_SECONDS
        )
        return found

    def entries(self) -> tuple[ExpertEntry, ...]:
        """Who holds which groups, and where."""
        places = list(self._places)
        return tuple(
            ExpertEntry(share.peer, share.groups.start, len(share.groups), place.node, place.pid)
            for share, place in zip(self._placement.shares, places, strict=True)
        )

    def close(self) -> None:
        """End the watching and the actors."""
        self._stopping.set()
        self._watcher.join()
        self._kill_all()

    def _place(self, addresses: Sequence[Address], epoch: int) -> None:
        """Make a new epoch known: first to those who answer, then to those who ask."""
        model = self._model
        placement = ExpertPlacement.even(epoch, model.n_routed_experts, model.n_group, addresses)
        ray.get([actor.adopt.remote(placement) for actor in self._actors], timeout=CALL_SECONDS)
        self._placement = placement
        told = [actor.adopt.remote(placement) for actor in list(self._subscribers.values())]
        if told:  # one that is dying must not keep the others waiting
            ray.wait(told, num_returns=len(told), timeout=CALL_SECONDS)

    def _watch(self) -> None:
        while not self._stopping.is_set():
            dead, _ = ray.wait(self._witnesses, num_returns=1, timeout=_WATCH_SECONDS)
            if dead and not self._stopping.is_set():
                try:
                    self._replace(self._witnesses.index(dead[0]))
                except Exception:  # e.g. another one died meanwhile: look again
                    _log.exception("an expert actor could not be replaced yet")
                    self._stopping.wait(_WATCH_SECONDS)

    def _replace(self, node: int) -> None:
        _log.warning("expert actor %s is gone; starting another", self._configs[node].name)
        ray.kill(self._actors[node])
        actor = self._start(node)
        (self._places[node],), (address,) = self._wait_for([actor])
        self._actors[node], self._witnesses[node] = actor, actor.wait_until_stopped.remote()
        addresses = [share.address for share in self._placement.shares]
        addresses[node] = address
        self._place(addresses, self._placement.epoch + 1)
        _log.warning("expert actor %s is back, epoch %d", self._configs[node].name, self._placement.epoch)

    def _wait_for(self, actors: Sequence[Any]) -> tuple[list[Place], list[Address]]:
        """Where actors that start run, and where they are reached.

        Raises:
            TimeoutError: not in time.
        """
        told = [*map(place_of, actors), *(actor.address.remote() for actor in actors)]
        found = started(told, "expert actors", self._start_seconds)
        return found[: len(actors)], found[len(actors) :]

    def _kill_all(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        remove_placement_group(self._group)

    def _start(self, node: int) -> Any:
        """An actor in its place; a few Ray calls at a time, one of which is the witness."""
        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=node)
        options = {"num_cpus": 0, "num_gpus": self._gpus, "max_concurrency": 4, "scheduling_strategy": place}
        return ray.remote(ExpertActor).options(**options).remote(self._configs[node])


def _runs(num_groups: int, num_nodes: int) -> list[range]:
    """The groups of each node, as `ExpertPlacement.even` deals them out."""
    nobody = [Address(f"experts-{node}") for node in range(num_nodes)]
    placement = ExpertPlacement.even(0, num_groups, num_groups, nobody)
    return [share.groups for share in placement.shares]


def _placement_group(
    num_nodes: int, gpus: float, spread: Spread, labels: dict[str, str], seconds: float
) -> PlacementGroup:
    """A place for each actor.

    Raises:
        TimeoutError: the nodes that were asked for are not there.
    """
    group: PlacementGroup = placement_group(
        [{"CPU": _CPUS, "GPU": gpus} if gpus else {"CPU": _CPUS}] * num_nodes,
        strategy="STRICT_SPREAD" if spread == "strict" else "SPREAD",
        bundle_label_selector=[labels] * num_nodes if labels else None,
    )
    if not group.wait(seconds):
        remove_placement_group(group)
        asked = f" with labels {labels}" if labels else ""
        raise TimeoutError(
            f"no place for {num_nodes} expert actors ({spread} spread{asked}) after {seconds:.0f} s"
        )
    return group

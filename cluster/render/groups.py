"""The groups of pods that a description asks for, and how many of each."""

import math
from dataclasses import dataclass
from typing import Literal

from cluster.config import ClusterConfig, ConfigError
from cluster.render.section import KubernetesSection, PodsSection
from workers.wire import Role

GroupRole = Literal["head", "gateways", "prefill", "decode", "experts"]

NODE_LABEL = "role"  # of Ray's nodes, where a description does not say which label


@dataclass(frozen=True)
class Group:
    """Pods that are alike.

    Attributes:
        pods: how many.
        section: what each of them has.
        node_labels: of the Ray nodes in them, by which actors find their place.
        hosts: how many machines they must be spread over, a pod each; None for as many as there are.
    """

    role: GroupRole
    pods: int
    section: PodsSection
    node_labels: dict[str, str]
    hosts: int | None = None


def groups(config: ClusterConfig, kubernetes: KubernetesSection) -> tuple[Group, ...]:
    """The head's, and one for each part of the cluster.

    Raises:
        ConfigError: what a pod has and what its actors need do not go together.
    """
    found = [
        Group("head", 1, kubernetes.head, {NODE_LABEL: "head"}),
        Group("gateways", kubernetes.gateways.pods or 1, kubernetes.gateways, {NODE_LABEL: "gateways"}),
    ]
    if kubernetes.head.pods not in (None, 1):
        raise ConfigError("", "kubernetes.head.pods", f"is {kubernetes.head.pods}; a cluster has one head")
    on_gpus = config.model.device == "cuda"
    roles: tuple[Role, ...] = ("prefill", "decode")
    for role in roles:
        section, pods = config.role(role), getattr(kubernetes, role)
        actors = _Actors(section.most_engines * section.attention_actors, section.gpus if on_gpus else None)
        number = _number(role, pods, actors, usual=section.most_engines, least=1)
        found.append(Group(role, number, pods, section.node_labels or {NODE_LABEL: role}))
    experts = config.experts
    if experts.placement == "pool":
        hosts = experts.nodes if experts.spread == "strict" else None
        actors = _Actors(experts.nodes, experts.gpus if on_gpus else None)
        number = _number("experts", kubernetes.experts, actors, usual=experts.nodes, least=hosts or 1)
        labels = experts.node_labels or {NODE_LABEL: "experts"}
        found.append(Group("experts", number, kubernetes.experts, labels, hosts))
    _check_gpus(found, on_gpus)
    return tuple(found)


@dataclass(frozen=True)
class _Actors:
    number: int
    gpus: float | None  # of each; None where none is used


def _number(role: GroupRole, section: PodsSection, actors: _Actors, *, usual: int, least: int) -> int:
    """Of pods for so many actors."""
    if actors.gpus is not None:
        if not section.gpus:
            problem = f"is 0; {actors.number} actors take {actors.gpus:g} of a GPU each"
            raise ConfigError("", f"kubernetes.{role}.gpus", problem)
        least = max(least, math.ceil(actors.number / (section.gpus * math.floor(1 / actors.gpus))))
        usual = least
    if section.pods and section.pods < least:
        problem = f"is {section.pods}; {actors.number} actors need {least} such pods"
        raise ConfigError("", f"kubernetes.{role}.pods", problem)
    return section.pods or usual


def _check_gpus(found: list[Group], on_gpus: bool) -> None:
    for group in found:
        if group.section.gpus and not (on_gpus and group.role in ("prefill", "decode", "experts")):
            raise ConfigError(
                "", f"kubernetes.{group.role}.gpus", f"is {group.section.gpus}; nothing there uses a GPU"
            )

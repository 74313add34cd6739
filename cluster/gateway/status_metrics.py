"""A `ClusterStatus` as metrics: what gateway and workers are at this moment, and what workers counted.

Every gateway shows all workers. Where there are several, `max by (role, worker)` counts each worker once.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from cluster.directory import RoleEngines
from cluster.gateway.backend import WorkerReport
from workers.wire import WorkerStatus

if TYPE_CHECKING:
    from cluster.gateway.status import ClusterStatus

_WORKER = ("role", "worker")

Sample = tuple[tuple[str, ...], float]


class StatusMetrics(Collector):
    """What there is to see of one status. Every family is always there, with or without samples."""

    def __init__(self, status: "ClusterStatus") -> None:
        self._status, self._workers = status, status.parts.workers

    def collect(self) -> Iterator[Metric]:
        yield from self._gateway()
        yield from self._engines()
        yield from self._scaling()
        yield from self._load()
        yield from self._counts()
        yield self._hand_overs()
        yield self._drafts()

    def _gateway(self) -> Iterator[Metric]:
        status = self._status
        facts = {"model": status.model, "weights": status.weights_digest[:16]}
        yield InfoMetricFamily("eightfold_model", "What this gateway serves.", value=facts)
        yield _gauge("eightfold_ready", "Whether this gateway takes requests.", (), [((), status.ready)])
        yield _gauge(
            "eightfold_requests_open", "Requests that wait for a token, or run.", ("phase",),
            [(("waiting",), status.waiting), (("running",), status.running)],
        )  # fmt: skip
        yield _gauge(
            "eightfold_epoch", "Of the expert placement; it rises with each change.", (),
            [((), status.parts.epoch)],
        )  # fmt: skip
        yield _gauge(
            "eightfold_expert_workers", "Expert actors that hold groups of experts.", (),
            [((), len(status.parts.experts))],
        )  # fmt: skip
        roles = [worker.status.role for worker in self._workers]
        yield _gauge(
            "eightfold_workers", "Attention workers that were heard of lately.", ("role",),
            [((role,), roles.count(role)) for role in ("prefill", "decode")],
        )  # fmt: skip

    def _engines(self) -> Iterator[Metric]:
        roles = self._status.parts.engines
        yield _gauge(
            "eightfold_engines", "Engines: running with all their workers, starting or lost, or draining.",
            ("role", "state"),
            [((role.role, state), count) for role in roles for state, count in self._states(role).items()],
        )  # fmt: skip
        yield _gauge(
            "eightfold_engines_wanted", "Engines that there shall be.", ("role",),
            [((role.role,), role.wanted) for role in roles],
        )  # fmt: skip
        yield _counter(
            "eightfold_engine_failed_starts", "Engines that did not come up.", ("role",),
            [((role.role,), role.failed_starts) for role in roles],
        )  # fmt: skip

    def _states(self, role: RoleEngines) -> dict[str, int]:
        members: defaultdict[str, list[WorkerStatus]] = defaultdict(list)
        for worker in self._workers:
            if worker.status.role == role.role:
                members[worker.engine].append(worker.status)
        draining = sum(any(status.leaving for status in engine) for engine in members.values())
        whole = sum(
            len(engine) == role.workers and not any(status.leaving for status in engine)
            for engine in members.values()
        )
        return {"running": whole, "starting": max(0, role.wanted - whole), "draining": draining}

    def _scaling(self) -> Iterator[Metric]:
        roles = self._status.parts.scaling
        yield _gauge(
            "eightfold_scaling_need", "Engines that a role needs, for each reason by itself.",
            ("role", "reason"),
            [((role.role, reason), engines) for role in roles for reason, engines in role.parts],
        )  # fmt: skip
        yield _gauge(
            "eightfold_scaling_predicted_seconds",
            "Prefill: to the first token of a prompt that comes now. Decode: from token to token of late.",
            ("role",),
            [
                ((role.role,), role.predicted_seconds)
                for role in roles
                if role.predicted_seconds is not None
            ],
        )  # fmt: skip
        yield _gauge(
            "eightfold_scaling_objective_seconds", "What that is to be at most.", ("role",),
            [((role.role,), role.objective_seconds) for role in roles],
        )  # fmt: skip
        yield _counter(
            "eightfold_scaling_decisions", "Times that other engines were wanted, and why.",
            ("role", "direction", "reason"),
            [((role.role, *why), count) for role in roles for *why, count in role.counts],
        )  # fmt: skip

    def _load(self) -> Iterator[Metric]:
        yield _gauge(
            "eightfold_worker_requests",
            "Requests by state: waiting for a token, running, or parked with pages and not running.",
            (*_WORKER, "state"),
            [
                ((*_key(worker), state), getattr(worker.status.load, state))
                for worker in self._workers
                for state in ("waiting", "running", "parked")
            ],
        )
        yield _gauge(
            "eightfold_worker_queued_tokens", "Tokens of prompts that have not been run.", _WORKER,
            [(_key(worker), worker.status.load.queued_tokens) for worker in self._workers],
        )  # fmt: skip
        yield _gauge(
            "eightfold_worker_pages",
            "Pages of 64 tokens: used by sequences, cached prefixes that nobody uses, or free.",
            (*_WORKER, "state"),
            [sample for worker in self._workers for sample in _pages(worker)],
        )
        yield _gauge(
            "eightfold_worker_drafts_per_step", "Drafts that each sequence made in the last step.", _WORKER,
            [(_key(worker), worker.status.num_drafts) for worker in self._workers],
        )  # fmt: skip
        yield _gauge(
            "eightfold_worker_nodes_per_token_max", "Expert nodes that one token was sent to at most.",
            _WORKER, [(_key(worker), worker.status.most_nodes) for worker in self._workers],
        )  # fmt: skip

    def _counts(self) -> Iterator[Metric]:
        for name, what, field in _COUNTS:
            samples = [(_key(worker), getattr(worker.status, field)) for worker in self._workers]
            yield _counter(f"eightfold_worker_{name}", what, _WORKER, samples)
        yield _counter(
            "eightfold_worker_dispatched_copies",
            "Copies of dispatched tokens, one for each expert worker that holds one of their experts.",
            (*_WORKER, "expert_worker"),
            [
                ((*_key(worker), peer), count)
                for worker in self._workers
                for peer, count in worker.status.copies_to
            ],
        )

    def _hand_overs(self) -> Metric:
        family = SummaryMetricFamily(
            "eightfold_worker_hand_over_seconds",
            "From a sequence's first token until the decode worker has adopted it.",
            labels=_WORKER,
        )
        for worker in self._workers:
            family.add_metric(_key(worker), worker.status.hand_overs, worker.status.hand_over_seconds)
        return family

    def _drafts(self) -> Metric:
        counts = [
            (worker, state, per_place)
            for worker in self._workers
            for state, per_place in (("judged", worker.status.drafted), ("accepted", worker.status.accepted))
        ]
        return _counter(
            "eightfold_worker_drafts",
            "Drafts by their place behind the known tokens: judged by the model, and accepted.",
            (*_WORKER, "place", "state"),
            [
                ((*_key(worker), str(place), state), count)
                for worker, state, per_place in counts
                for place, count in enumerate(per_place, start=1)
            ],
        )


# Name, help, and the field of `WorkerStatus`.
_COUNTS = (
    ("steps", "Steps run.", "steps"),
    ("tokens", "Tokens drawn.", "tokens"),
    ("prompt_tokens", "Tokens of prompts that were started.", "prompt_tokens"),
    ("hit_tokens", "Those of them that were found in cached pages.", "hit_tokens"),
    ("dispatched_tokens", "Tokens sent to experts, once a layer.", "dispatched"),
    ("hand_over_bytes", "Bytes of pages sent to decode workers.", "sent_bytes"),
    ("stray_messages", "Messages with pages that came after their lease was over; dropped.", "stray"),
)


def _key(worker: WorkerReport) -> tuple[str, str]:
    return worker.status.role, worker.name


def _pages(worker: WorkerReport) -> list[Sample]:
    load = worker.status.load
    states = {
        "used": load.num_pages - load.free_pages,
        "cached": load.cached_pages,
        # An engine in this process goes on while it is looked at.
        "free": max(0, load.free_pages - load.cached_pages),
    }
    return [((*_key(worker), state), count) for state, count in states.items()]


def _gauge(name: str, what: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> Metric:
    return _filled(GaugeMetricFamily(name, what, labels=labels), samples)


def _counter(name: str, what: str, labels: tuple[str, ...], samples: Iterable[Sample]) -> Metric:
    return _filled(CounterMetricFamily(name, what, labels=labels), samples)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, samples: Iterable[Sample]) -> Metric:
    for labels, value in samples:
        family.add_metric(labels, float(value))
    return family

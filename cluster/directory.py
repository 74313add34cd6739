"""Who is there: what the supervisor knows and gateways ask for."""

from dataclasses import dataclass
from typing import Protocol

from cluster.autoscaling import RoleScaling
from cluster.starts import FailedStart
from workers.transport.protocol import Address
from workers.wire import Role


@dataclass(frozen=True)
class WorkerEntry:
    """An attention worker: its role, its engine (a Serve replica), where it runs, and where to reach it."""

    role: Role
    engine: str
    node: str
    pid: int
    address: Address


@dataclass(frozen=True)
class ExpertEntry:
    """An expert actor: the groups it holds, and where it runs."""

    name: str
    first_group: int
    num_groups: int
    node: str
    pid: int


@dataclass(frozen=True)
class RoleEngines:
    """The engines that a role shall have.

    Attributes:
        wanted: so many.
        workers: attention workers of each.
        failed_starts: engines that did not come up, since the supervisor began.
        last_failure: the last of them, as long as none has come up since.
    """

    role: Role
    wanted: int
    workers: int
    failed_starts: int = 0
    last_failure: FailedStart | None = None


@dataclass(frozen=True)
class Directory:
    """The cluster at one moment.

    Attributes:
        epoch: that of the expert placement, 0 where there is no pool.
        engines: of each role, what there shall be.
        scaling: of each role whose engines come and go.
    """

    epoch: int = 0
    workers: tuple[WorkerEntry, ...] = ()
    experts: tuple[ExpertEntry, ...] = ()
    engines: tuple[RoleEngines, ...] = ()
    scaling: tuple[RoleScaling, ...] = ()


class DirectorySource(Protocol):
    """Whoever can be asked who is there."""

    async def __call__(self, calls_prefill: bool) -> Directory:
        """The newest directory; may fail or take long, the asker has a deadline.

        Args:
            calls_prefill: requests came, since it was asked last, that found no prefill engine.
        """
        ...

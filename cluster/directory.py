"""Who is there: what the supervisor knows and gateways ask for."""

from dataclasses import dataclass
from typing import Protocol

from cluster.autoscaling import RoleScaling
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
class Directory:
    """The cluster at one moment.

    Attributes:
        epoch: that of the expert placement, 0 where there is no pool.
        scaling: of each role whose engines come and go.
    """

    epoch: int = 0
    workers: tuple[WorkerEntry, ...] = ()
    experts: tuple[ExpertEntry, ...] = ()
    scaling: tuple[RoleScaling, ...] = ()


class DirectorySource(Protocol):
    """Whoever can be asked who is there."""

    async def __call__(self) -> Directory:
        """The newest directory; may fail or take long, the asker has a deadline."""
        ...

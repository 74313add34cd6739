"""Who an endpoint is, and what it offers."""

import time
from dataclasses import dataclass, field, replace
from typing import Literal

from workers.transport.handshake import MAX_NAME_BYTES, MIN_TOKEN_BYTES
from workers.transport.limits import Limits
from workers.transport.local import LocalSwitch
from workers.transport.protocol import Peer

CarrierKind = Literal["ipc", "copy", "nccl"]

OPENING_SECONDS = 60.0  # of a way: NCCL's first communicator, and kernels that are compiled first


@dataclass(frozen=True)
class WayConfig:
    """How one GPU reaches others: by which carrier, under which name, and how other hosts reach us."""

    kind: CarrierKind
    name: str
    token: bytes = field(repr=False)
    tcp_host: str | None = None

    def named(self, end: str) -> "WayConfig":
        """For ways to one end, whose endpoints have names of their own."""
        return replace(self, name=f"{self.name}/{end}")


@dataclass(frozen=True)
class EndpointConfig:
    """Who an endpoint is and what it offers.

    Attributes:
        name: unique in the cluster among those alive.
        token: the cluster's secret, at least 16 bytes.
        incarnation: which life of the name this is; a later life has a higher number.
        epoch: placement epoch that it names in greetings.
        switch: where endpoints of this process meet, None to stay out.
        same_host: whether processes of this host may connect by shared memory.
        tcp_host: address to listen on for other hosts, None to listen on none; tcp_port 0 picks one.
    """

    name: str
    token: bytes = field(repr=False)
    incarnation: int = field(default_factory=time.time_ns)
    epoch: int = 0
    switch: LocalSwitch | None = None
    same_host: bool = True
    tcp_host: str | None = None
    tcp_port: int = 0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if not 0 < len(self.name.encode()) <= MAX_NAME_BYTES:
            raise ValueError(f"a peer's name takes 1 to {MAX_NAME_BYTES} bytes, not {self.name!r}")
        if len(self.token) < MIN_TOKEN_BYTES:
            raise ValueError(f"a cluster token has at least {MIN_TOKEN_BYTES} bytes")

    @property
    def peer(self) -> Peer:
        """As others know it."""
        return Peer(self.name, self.incarnation, self.epoch)

"""What a part of the cluster sees of the others: named peers, messages, deadlines.

    TransportError
    ├── DeadlineExceeded    the time for one operation is over
    ├── PeerLost            a peer that was connected is gone; also an event that `receive` returns
    ├── PeerUnreachable     nobody answers at an address
    ├── PeerRefused         somebody answers and does not want us: token, version, an older incarnation
    └── MalformedMessage    bytes that are no message; whoever sent them is cut off

Every wait has a `Deadline`. Every queue has a bound, and a sender who meets it waits until his deadline.
"""

import math
import time
from dataclasses import dataclass
from typing import Protocol

from workers.transport.message import MalformedMessage, Message, TransportError

__all__ = [
    "Address",
    "Deadline",
    "DeadlineExceeded",
    "Endpoint",
    "MalformedMessage",
    "Peer",
    "PeerLost",
    "PeerRefused",
    "PeerUnreachable",
    "Received",
    "TransportError",
]


class DeadlineExceeded(TransportError):
    """The time for one operation is over.

    Args:
        what: the operation that did not end in time.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"deadline exceeded: {self.what}"


class PeerLost(TransportError):
    """A peer that was connected is gone, with everything it had not yet sent.

    Args:
        peer: its name.
        incarnation: which life of that name.
        reason: how we know.
    """

    def __init__(self, peer: str, incarnation: int, reason: str) -> None:
        super().__init__(peer, incarnation, reason)
        self.peer, self.incarnation, self.reason = peer, incarnation, reason

    def __str__(self) -> str:
        return f"peer {self.peer} is lost: {self.reason}"


class PeerUnreachable(TransportError):
    """Nobody answers at an address.

    Args:
        peer: the name that was sought.
        reason: what happened instead.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason

    def __str__(self) -> str:
        return f"peer {self.peer} cannot be reached: {self.reason}"


class PeerRefused(TransportError):
    """Somebody answers at an address and one of the two sides does not want the other.

    Args:
        peer: the name that was sought.
        reason: which condition was not met.
    """

    def __init__(self, peer: str, reason: str) -> None:
        super().__init__(peer, reason)
        self.peer, self.reason = peer, reason

    def __str__(self) -> str:
        return f"no connection with peer {self.peer}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point of this process's monotonic clock. Between processes only the time left travels."""

    at: float

    @classmethod
    def after(cls, seconds: float) -> "Deadline":
        return cls(time.monotonic() + seconds)

    def left(self) -> float:
        """Seconds; never negative."""
        return max(0.0, self.at - time.monotonic())

    def left_us(self) -> int:
        """Microseconds, as a header carries them: 0 is no deadline, so one that is over has a moment left."""
        return max(1, int(self.left() * 1e6)) if math.isfinite(self.at) else 0

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.at


@dataclass(frozen=True, slots=True)
class Address:
    """Where an endpoint can be reached, by each carrier it offers.

    Attributes:
        name: the peer's name.
        switch: its `LocalSwitch`, "" for none; the same one means the same process.
        host: machine and network namespace; the same one means that shared memory works.
        unix: name of its abstract unix socket, "" for none.
        tcp_host, tcp_port: where it listens for other hosts, "" and 0 for nowhere.
    """

    name: str
    switch: str = ""
    host: str = ""
    unix: str = ""
    tcp_host: str = ""
    tcp_port: int = 0


@dataclass(frozen=True, slots=True)
class Peer:
    """A connected peer. A higher `incarnation` of a name replaces a lower one, never the other way round.

    `epoch` is the placement epoch it named when it connected.
    """

    name: str
    incarnation: int
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Received:
    """A message, who sent it, and when its sender's budget ends (never, where he gave none)."""

    peer: Peer
    message: Message
    deadline: Deadline


class Endpoint(Protocol):
    """One end of every connection that a part of the cluster has. It belongs to one thread."""

    @property
    def address(self) -> Address:
        """What others need to connect."""
        ...

    @property
    def peers(self) -> dict[str, Peer]:
        """Who is connected now."""
        ...

    def connect(self, address: Address, deadline: Deadline) -> Peer:
        """Meet the peer at an address by the nearest carrier; one that is connected already is kept.

        Raises:
            PeerUnreachable, PeerRefused, DeadlineExceeded.
        """
        ...

    def send(self, peer: str, message: Message, deadline: Deadline) -> None:
        """Hand a message over; afterwards its tensors are the caller's again.

        It may not have arrived when this returns: a peer's loss is the only news of that.

        Raises:
            PeerLost: it is not, or no longer, connected.
            DeadlineExceeded: it does not read. If a part was already sent, the peer is given up as well.
        """
        ...

    def receive(self, deadline: Deadline, peer: str | None = None) -> Received | PeerLost:
        """The next event of any peer, or of one; of one that is not connected, its loss, with incarnation 0.

        What a peer sent before its loss comes before the loss, as far as our inbox had room for it.

        Raises:
            DeadlineExceeded: there was none.
        """
        ...

    def disconnect(self, peer: str) -> None:
        """Part from a peer without an event on our side; unread messages of it are dropped."""
        ...

    def close(self) -> None:
        """Part from everybody and free every resource. May be called twice."""
        ...

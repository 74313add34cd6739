"""How an endpoint goes to others, and which carrier it takes.

The same switch: inside the process. The same host: a unix connection that passes the rings. Otherwise TCP. Of
two peers one connects and the other does not: both at once may replace each other's connection.
"""

import hmac
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from workers.transport.config import EndpointConfig
from workers.transport.handshake import Meeting, Status
from workers.transport.links import Link, StreamLink
from workers.transport.local import LocalLink, make_pair
from workers.transport.message import MalformedMessage, TransportError
from workers.transport.protocol import (
    Address,
    Deadline,
    DeadlineExceeded,
    Peer,
    PeerRefused,
    PeerUnreachable,
)
from workers.transport.shared_memory import NUM_DESCRIPTORS, RingCarrier
from workers.transport.sockets import TcpCarrier, tune

_SMALLEST_RING = 4096
_OUR_REASONS = {
    Status.OLD_INCARNATION: "we met a later incarnation of this name",
    Status.FULL: "we have as many peers as we take",
}


class House(Protocol):
    """What reception needs of its endpoint."""

    def watch(self, fd: int, handler: Callable[[], None]) -> None: ...

    def unwatch(self, fd: int) -> None: ...

    def pump(self, timeout: float) -> None: ...

    def is_full(self, name: str) -> bool: ...

    def seat(self, link: Link) -> None: ...


def host_identity() -> str:
    """The same text for processes that can share memory through an abstract unix socket."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}"


class Connector:
    """Makes links to addresses; runs in the thread of its endpoint."""

    def __init__(self, config: EndpointConfig, house: House, judge: Callable[[Peer], Status]) -> None:
        self._config, self._house, self._judge = config, house, judge

    def connect(self, address: Address, deadline: Deadline) -> Peer:
        """As `Endpoint.connect`, for a peer that is not connected."""
        config = self._config
        if config.switch and address.switch == config.switch.uid:
            link: Link = self._connect_inside(address)
        elif address.unix and config.same_host and address.host == host_identity():
            link = self._connect_by(socket.AF_UNIX, "\0" + address.unix[1:], address.name, deadline)
        elif address.tcp_port:
            family = socket.AF_INET6 if ":" in address.tcp_host else socket.AF_INET
            link = self._connect_by(family, (address.tcp_host, address.tcp_port), address.name, deadline)
        else:
            raise PeerUnreachable(address.name, "it offers no carrier that reaches from here")
        status = self._judge(link.peer)
        if status != Status.WELCOME:
            link.close()
            raise PeerRefused(address.name, _OUR_REASONS[status])
        self._house.seat(link)
        return link.peer

    def _connect_inside(self, address: Address) -> LocalLink:
        assert self._config.switch is not None
        port = self._config.switch.find(address.name)
        if port is None:
            raise PeerUnreachable(address.name, "it left this process")
        if not hmac.compare_digest(port.token, self._config.token):
            raise PeerRefused(address.name, "the cluster tokens differ")
        ours, theirs = make_pair(self._config.peer, port.peer, self._config.limits)
        port.arrive(theirs)
        return ours

    def _connect_by(
        self, family: int, where: str | tuple[str, int], name: str, deadline: Deadline
    ) -> StreamLink:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(deadline.left(), 1e-3))
            connection.connect(where)
        except TimeoutError as error:
            connection.close()
            raise DeadlineExceeded(f"connecting to {name}") from error
        except OSError as error:
            connection.close()
            raise PeerUnreachable(name, error.strerror or "the connection failed") from error
        if family == socket.AF_UNIX:
            connection.setblocking(False)
        else:
            tune(connection)
        meeting = Meeting(connection, self._config.peer, self._config.token, deadline, expected=name)
        self._greet(meeting, name)
        assert meeting.peer is not None
        if family != socket.AF_UNIX:
            return StreamLink(meeting.peer, TcpCarrier(connection), self._config.limits)
        if (
            len(meeting.fds) != NUM_DESCRIPTORS
            or not _SMALLEST_RING <= meeting.ring_bytes <= self._config.limits.message_bytes
        ):
            meeting.close()
            raise PeerRefused(name, "it offers no rings that we can use")
        try:
            carrier = RingCarrier(connection, meeting.fds, meeting.ring_bytes, is_acceptor=False)
        except MalformedMessage as error:
            raise PeerRefused(name, str(error)) from error
        return StreamLink(meeting.peer, carrier, self._config.limits)

    def _greet(self, meeting: Meeting, name: str) -> None:
        """Run a greeting to its end, and everything else meanwhile: the other may be greeting us."""
        failure: list[TransportError] = []

        def advance() -> None:
            try:
                meeting.advance()
            except TransportError as error:
                failure.append(error)

        fd = meeting.connection.fileno()
        self._house.watch(fd, advance)
        try:
            while not meeting.is_done:
                if failure:
                    raise failure[0]
                if meeting.deadline.is_over:
                    raise DeadlineExceeded(f"greeting {name}")
                self._house.pump(meeting.deadline.left())
        finally:
            self._house.unwatch(fd)
            if not meeting.is_done:
                meeting.close()

"""How peers come to an endpoint: listeners and greetings.

Inside the process through a `LocalSwitch`; inside the host through a unix socket in the abstract namespace
(no file), over which the rings are passed; from elsewhere through TCP, on the one address that was given.
"""

import os
import secrets
import socket
import threading
from collections import OrderedDict, deque
from contextlib import suppress
from dataclasses import replace

from workers.transport.config import EndpointConfig
from workers.transport.connector import House, host_identity
from workers.transport.descriptors import clear_event, new_event
from workers.transport.handshake import Meeting, Status
from workers.transport.links import Link, StreamLink
from workers.transport.local import LocalLink, Port
from workers.transport.message import TransportError
from workers.transport.protocol import (
    Address,
    Deadline,
    Peer,
)
from workers.transport.shared_memory import NUM_DESCRIPTORS, RingCarrier, make_rings
from workers.transport.sockets import TcpCarrier, tune

_BACKLOG = 64
_MOST_GUESTS = 32  # greetings at once; more wait in the kernel's backlog
_GREETING_SECONDS = 2.0
_MOST_NAMES = 1024  # of which we remember the incarnation


class Reception:
    """Listeners and greetings of one endpoint; runs in its thread."""

    def __init__(self, config: EndpointConfig, house: House) -> None:
        self._config, self._house = config, house
        self._latest: OrderedDict[str, int] = OrderedDict()  # name -> highest incarnation seen
        self._guests: dict[int, Meeting] = {}  # by descriptor
        self._listeners: list[socket.socket] = []
        self._arrived: deque[LocalLink] = deque()
        self._lock = threading.Lock()  # guards the next two against `_arrive`
        self._is_open = True
        self._bell = new_event()
        self._port: Port | None = None
        self.address = Address(config.name)
        try:
            house.watch(self._bell, self._seat_arrived)
            self._listen()
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        config = self._config
        if config.switch:
            self._port = Port(config.peer, config.token, self._arrive)
            config.switch.join(self._port)
            self.address = replace(self.address, switch=config.switch.uid)
        if config.same_host:
            name = f"@eightfold/{secrets.token_hex(8)}"
            self._add_listener(socket.AF_UNIX, "\0" + name[1:])
            self.address = replace(self.address, host=host_identity(), unix=name)
        if config.tcp_host is not None:
            family = socket.AF_INET6 if ":" in config.tcp_host else socket.AF_INET
            listener = self._add_listener(family, (config.tcp_host, config.tcp_port))
            self.address = replace(self.address, tcp_host=config.tcp_host, tcp_port=listener.getsockname()[1])

    def _add_listener(self, family: int, where: str | tuple[str, int]) -> socket.socket:
        listener = socket.socket(family, socket.SOCK_STREAM)
        self._listeners.append(listener)
        if family != socket.AF_UNIX:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setblocking(False)
        listener.bind(where)
        listener.listen(_BACKLOG)
        self._house.watch(listener.fileno(), lambda: self._accept(listener))
        return listener

    @property
    def has_guests(self) -> bool:
        return bool(self._guests)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(BlockingIOError, ConnectionAbortedError):
            connection, _ = listener.accept()
            if len(self._guests) >= _MOST_GUESTS:
                connection.close()
                return
            if connection.family == socket.AF_UNIX:
                connection.setblocking(False)
            else:
                tune(connection)
            deadline = Deadline.after(_GREETING_SECONDS)
            meeting = Meeting(connection, self._config.peer, self._config.token, deadline)
            self._guests[connection.fileno()] = meeting
            self._house.watch(connection.fileno(), lambda: self._advance(meeting))

    def _advance(self, meeting: Meeting) -> None:
        """Go on with a guest's greeting; whoever fails it is gone without a word to anybody here."""
        try:
            meeting.advance()
        except TransportError:
            self._dismiss(meeting)
            return
        if meeting.is_done:
            self._house.unwatch(meeting.connection.fileno())
            del self._guests[meeting.connection.fileno()]
            with suppress(TransportError, OSError):
                self._welcome(meeting)

    def _welcome(self, meeting: Meeting) -> None:
        """Tell an authenticated guest the verdict, and seat him."""
        assert meeting.peer is not None
        connection, ring_bytes = meeting.connection, self._config.limits.ring_bytes
        status = self.judge(meeting.peer)
        if status != Status.WELCOME:
            meeting.refuse(status)
            meeting.close()
            return
        link: Link
        if connection.family == socket.AF_UNIX:
            fds = make_rings(ring_bytes)
            carrier = RingCarrier(connection, fds, ring_bytes, is_acceptor=True)
            link = StreamLink(meeting.peer, carrier, self._config.limits)
        else:
            fds, ring_bytes = [], 0
            link = StreamLink(meeting.peer, TcpCarrier(connection), self._config.limits)
        try:
            meeting.welcome(fds[:NUM_DESCRIPTORS], ring_bytes)
        except TransportError:
            link.close()
            raise
        self._house.seat(link)

    def _dismiss(self, meeting: Meeting) -> None:
        self._house.unwatch(meeting.connection.fileno())
        del self._guests[meeting.connection.fileno()]
        meeting.close()

    def drop_late(self) -> None:
        """Dismiss guests who did not end their greeting in time."""
        for meeting in list(self._guests.values()):
            if meeting.deadline.is_over:
                self._dismiss(meeting)

    def judge(self, peer: Peer) -> Status:
        """Whether a peer may be seated now; remembers its incarnation."""
        if not self._is_latest(peer):
            return Status.OLD_INCARNATION
        return Status.FULL if self._house.is_full(peer.name) else Status.WELCOME

    def _is_latest(self, peer: Peer) -> bool:
        """Whether no later incarnation of the name was here; remembers this one."""
        latest = self._latest.pop(peer.name, 0)
        self._latest[peer.name] = max(latest, peer.incarnation)
        while len(self._latest) > _MOST_NAMES:
            self._latest.popitem(last=False)
        return peer.incarnation >= latest

    def _arrive(self, link: LocalLink) -> None:
        """A peer of this process connected; called in its thread."""
        with self._lock:
            if self._is_open:
                self._arrived.append(link)
                os.eventfd_write(self._bell, 1)
                return
        link.close()

    def _seat_arrived(self) -> None:
        clear_event(self._bell)
        while self._arrived:
            link = self._arrived.popleft()
            if self.judge(link.peer) == Status.WELCOME:
                self._house.seat(link)
            else:
                link.close()

    def close(self) -> None:
        """Leave every place where we can be met."""
        if self._port and self._config.switch:
            self._config.switch.leave(self._port)
        with self._lock:
            self._is_open = False
        for meeting in list(self._guests.values()):
            self._dismiss(meeting)
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()
        while self._arrived:
            self._arrived.popleft().close()
        os.close(self._bell)

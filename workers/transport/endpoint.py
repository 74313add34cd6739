"""One end of every connection of a part: picks the carrier by address, waits for all of them at once.

Who owns what: an endpoint starts no thread and belongs to the thread that calls it. That thread runs one
epoll over every connection, greeting and listener whenever it waits in `connect`, `send` or `receive`.
Between those calls the kernel's buffers and the rings fill, and senders wait. A `send` that finds no room
goes on reading, so that two peers that send to each other do not wait for each other. Only the ports of a
`LocalSwitch` are called by other threads.
"""

import select
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from workers.transport.config import EndpointConfig
from workers.transport.connector import Connector
from workers.transport.links import Link, LinkClosed, Outgoing
from workers.transport.message import MalformedMessage, Message
from workers.transport.protocol import (
    Address,
    Deadline,
    DeadlineExceeded,
    Peer,
    PeerLost,
    Received,
)
from workers.transport.reception import Reception

_NEVER = Deadline(float("inf"))
_LONGEST_WAIT = 3600.0  # epoll takes no infinity


@dataclass(eq=False)
class _Seat:
    """A connected peer, and how much of it waits to be received."""

    link: Link
    queued_bytes: int = 0
    is_paused: bool = False


_Item = tuple[_Seat, Received | PeerLost, int]
"""An event, of whom, and its bytes."""


class PeerEndpoint:
    """The `Endpoint` of `protocol.py` over all carriers. See there for what its methods promise."""

    def __init__(self, config: EndpointConfig) -> None:
        """Open the listeners.

        Raises:
            OSError: an address to listen on cannot be had.
        """
        self._config, self._limits = config, config.limits
        self._seats: dict[str, _Seat] = {}
        self._inbox: deque[_Item] = deque()
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._is_open = True
        try:
            self._reception = Reception(config, self)
            self._connector = Connector(config, self, self._reception.judge)
        except BaseException:
            self._epoll.close()
            raise

    @property
    def address(self) -> Address:
        return self._reception.address

    @property
    def peers(self) -> dict[str, Peer]:
        return {name: seat.link.peer for name, seat in self._seats.items()}

    def fileno(self) -> int:
        """Readable when something has happened; for who waits in a loop of its own and then receives."""
        return self._epoll.fileno()

    def connect(self, address: Address, deadline: Deadline) -> Peer:
        if seat := self._seats.get(address.name):
            return seat.link.peer
        return self._connector.connect(address, deadline)

    def send(self, peer: str, message: Message, deadline: Deadline) -> None:
        seat = self._seats.get(peer)
        if seat is None:
            raise PeerLost(peer, 0, "it is not connected")
        left: Outgoing | None = None
        try:
            left = seat.link.offer(message)
            while left and not seat.link.push(left):
                if deadline.is_over:
                    raise DeadlineExceeded(f"sending to {peer}")
                self._wait_for_room(seat, deadline)
            left = None
        except LinkClosed as error:
            self._read(seat)  # what it sent before it went comes first, then the loss
            self._lose(seat, str(error))
            raise PeerLost(peer, seat.link.peer.incarnation, str(error)) from None
        finally:
            if left and left.is_begun:  # nothing can follow half a message
                self._lose(seat, "it did not read a message to its end")

    def _wait_for_room(self, seat: _Seat, deadline: Deadline) -> None:
        """Until there may be room; meanwhile everybody is read."""
        room, mask = seat.link.room
        poller = select.poll()
        poller.register(room, mask)
        poller.register(self._epoll, select.POLLIN)
        poller.poll(deadline.left() * 1000)
        self.pump(0)
        if self._seats.get(seat.link.peer.name) is not seat:
            raise LinkClosed("it went away while we waited for room")

    def receive(self, deadline: Deadline, peer: str | None = None) -> Received | PeerLost:
        is_last_look = False
        while True:
            if event := self._take(peer):
                return event
            if peer is not None and peer not in self._seats:
                return PeerLost(peer, 0, "it is not connected")
            if is_last_look:
                raise DeadlineExceeded(f"receiving from {peer or 'anybody'}")
            left = deadline.left()
            is_last_look = left == 0
            self.pump(left)

    def _take(self, peer: str | None) -> Received | PeerLost | None:
        if not self._inbox:
            return None
        if peer is None:
            seat, event, size = self._inbox.popleft()
        else:
            found = next((item for item in self._inbox if _is_of(item, peer)), None)
            if found is None:
                return None
            self._inbox.remove(found)
            seat, event, size = found
        seat.queued_bytes -= size
        if seat.is_paused and seat.queued_bytes < self._limits.inbox_bytes:
            seat.is_paused = False
            if self._is_seated(seat):
                self._epoll.modify(seat.link.arrival, select.EPOLLIN)
                self._read(seat)
        return event

    def disconnect(self, peer: str) -> None:
        if seat := self._seats.get(peer):
            self._unseat(seat)
            self._forget(seat)

    def close(self) -> None:
        if not self._is_open:
            return
        self._is_open = False
        self._reception.close()
        for seat in list(self._seats.values()):
            self._unseat(seat)
        self._inbox.clear()
        self._epoll.close()

    # Below: what reception and carriers use.

    def watch(self, fd: int, handler: Callable[[], None]) -> None:
        """Call the handler whenever the descriptor is readable."""
        self._handlers[fd] = handler
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Stop that; before the descriptor is closed."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def pump(self, timeout: float) -> None:
        """Wait for something to happen, at most so many seconds, and handle it."""
        timeout = min(timeout, _LONGEST_WAIT)
        if self._reception.has_guests:
            timeout = min(timeout, 1.0)  # somebody who connects and is silent is dropped in time
            self._reception.drop_late()
        for fd, _ in self._epoll.poll(timeout):
            # A handler of this round may have unwatched it.
            if handler := self._handlers.get(fd):
                handler()

    def is_full(self, name: str) -> bool:
        """Whether there is no seat for a peer of this name."""
        return name not in self._seats and len(self._seats) >= self._limits.peers

    def seat(self, link: Link) -> None:
        """Take in a peer; a connection of the same name ends."""
        if old := self._seats.get(link.peer.name):
            self._unseat(old)
            if old.link.peer.incarnation != link.peer.incarnation:
                self._forget(old)  # late messages of an earlier life
            self._inbox.append((old, self._loss(old, "a new connection took its place"), 0))
        seat = _Seat(link)
        self._seats[link.peer.name] = seat
        for fd in (link.arrival, *link.life):
            self.watch(fd, partial(self._read, seat))

    def _is_seated(self, seat: _Seat) -> bool:
        return self._seats.get(seat.link.peer.name) is seat

    def _read(self, seat: _Seat) -> None:
        """Queue what a peer sent, up to its bound; notice its end."""
        if not self._is_seated(seat):
            return
        try:
            if not self._drain(seat) and seat.link.is_gone():
                self._drain(seat)  # sent between our look and its end
                self._lose(seat, "it closed the connection")
        except LinkClosed as error:
            self._lose(seat, str(error))
        except MalformedMessage as error:
            self._lose(seat, f"it sent what is no message: {error}")

    def _drain(self, seat: _Seat) -> bool:
        """Whether there was a message."""
        link, more, any_taken = seat.link, True, False
        while more and not seat.is_paused:
            message, more = link.take()
            if message is not None:
                any_taken = True
                deadline = Deadline.after(message.budget_us / 1e6) if message.budget_us else _NEVER
                size = message.num_bytes
                self._inbox.append((seat, Received(link.peer, message, deadline), size))
                seat.queued_bytes += size
                if seat.queued_bytes >= self._limits.inbox_bytes:
                    seat.is_paused = True
                    self._epoll.modify(link.arrival, 0)
        return any_taken

    def _lose(self, seat: _Seat, reason: str) -> None:
        if self._is_seated(seat):
            self._unseat(seat)
            self._inbox.append((seat, self._loss(seat, reason), 0))

    def _loss(self, seat: _Seat, reason: str) -> PeerLost:
        return PeerLost(seat.link.peer.name, seat.link.peer.incarnation, reason)

    def _unseat(self, seat: _Seat) -> None:
        del self._seats[seat.link.peer.name]
        for fd in (seat.link.arrival, *seat.link.life):
            self.unwatch(fd)
        seat.link.close()

    def _forget(self, seat: _Seat) -> None:
        """Drop the unread messages of a connection."""
        self._inbox = deque(item for item in self._inbox if item[0] is not seat)


def _is_of(item: _Item, peer: str) -> bool:
    return item[0].link.peer.name == peer

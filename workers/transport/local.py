"""Inside one process: messages pass from thread to thread through two bounded queues.

Tensors are copied once, on sending, so that the rule of the other carriers holds: after `send` they are the
sender's again.
"""

import os
import secrets
import select
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from workers.transport.descriptors import clear_event, new_event
from workers.transport.limits import Limits
from workers.transport.links import LinkClosed, Outgoing
from workers.transport.message import Message, check
from workers.transport.protocol import Peer


class _Queue:
    """One direction. Shared by the two ends; every field is guarded by `lock`."""

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()
        self._messages: deque[Message] = deque()
        self._num_bytes, self._capacity = 0, capacity
        self._num_ends = 2
        self.filled = new_event()
        self.freed = new_event()

    @property
    def is_closed(self) -> bool:
        return self._num_ends < 2

    def put(self, message: Message) -> bool:
        """Whether there was room. An empty queue takes any message."""
        with self._lock:
            if self.is_closed:
                raise LinkClosed("it closed the connection")
            size = message.num_bytes
            if self._messages and self._num_bytes + size > self._capacity:
                clear_event(self.freed)  # room that was there before does not count
                return False
            self._messages.append(message)
            self._num_bytes += size
            if len(self._messages) == 1:
                os.eventfd_write(self.filled, 1)
            return True

    def get(self) -> tuple[Message | None, bool]:
        """The first message, and whether there are more."""
        with self._lock:
            if not self._messages:
                if self.is_closed:
                    raise LinkClosed("it closed the connection")
                return None, False
            message = self._messages.popleft()
            self._num_bytes -= message.num_bytes
            os.eventfd_write(self.freed, 1)
            if not self._messages and not self.is_closed:  # closed: it stays readable
                clear_event(self.filled)
            return message, bool(self._messages)

    def leave(self) -> None:
        """One end is done with it; the second to say so frees the descriptors."""
        with self._lock:
            self._num_ends -= 1
            if self._num_ends:
                os.eventfd_write(self.filled, 1)
                os.eventfd_write(self.freed, 1)
            else:
                os.close(self.filled)
                os.close(self.freed)


@dataclass(frozen=True)
class _Waiting:
    message: Message
    is_begun: bool = False


class LocalLink:
    """One end of a pair of queues."""

    def __init__(self, peer: Peer, incoming: _Queue, outgoing: _Queue, limits: Limits) -> None:
        self.peer = peer
        self._incoming, self._outgoing, self._limits = incoming, outgoing, limits
        self._is_open = True

    @property
    def arrival(self) -> int:
        return self._incoming.filled

    @property
    def life(self) -> tuple[int, ...]:
        return ()

    @property
    def room(self) -> tuple[int, int]:
        return self._outgoing.freed, select.POLLIN

    def offer(self, message: Message) -> Outgoing | None:
        check(message, self._limits)
        message = replace(message, tensors=tuple(tensor.clone() for tensor in message.tensors))
        return None if self._outgoing.put(message) else _Waiting(message)

    def push(self, outgoing: Outgoing) -> bool:
        assert isinstance(outgoing, _Waiting)
        return self._outgoing.put(outgoing.message)

    def take(self) -> tuple[Message | None, bool]:
        return self._incoming.get()

    def is_gone(self) -> bool:
        return self._incoming.is_closed

    def close(self) -> None:
        if self._is_open:
            self._is_open = False
            self._incoming.leave()
            self._outgoing.leave()


def make_pair(connector: Peer, acceptor: Peer, limits: Limits) -> tuple[LocalLink, LocalLink]:
    """The connector's end and the acceptor's end."""
    there, back = _Queue(limits.ring_bytes), _Queue(limits.ring_bytes)
    return LocalLink(acceptor, back, there, limits), LocalLink(connector, there, back, limits)


@dataclass(frozen=True)
class Port:
    """How an endpoint can be met inside its process. `arrive` may be called from any thread."""

    peer: Peer
    token: bytes
    arrive: Callable[[LocalLink], None]


class LocalSwitch:
    """The endpoints that may meet inside this process: those that were given the same switch."""

    def __init__(self) -> None:
        self.uid = secrets.token_hex(8)
        self._lock = threading.Lock()
        self._ports: dict[str, Port] = {}

    def join(self, port: Port) -> None:
        """The newest of a name is who answers to it."""
        with self._lock:
            self._ports[port.peer.name] = port

    def leave(self, port: Port) -> None:
        with self._lock:
            if self._ports.get(port.peer.name) is port:
                del self._ports[port.peer.name]

    def find(self, name: str) -> Port | None:
        with self._lock:
            return self._ports.get(name)

"""A link to one peer: messages in, messages out, nothing waits here.

`Link` is what an endpoint handles. `StreamLink` makes one out of a `Carrier`, which moves bytes; a link
inside one process moves the messages themselves (`local.py`). Whoever owns the endpoint owns its links: one
thread.
"""

from typing import Protocol

from workers.transport.limits import Limits
from workers.transport.message import Decoder, Message, encode
from workers.transport.protocol import Peer


class LinkClosed(Exception):
    """The other end is gone. The argument says how we know."""


class Outgoing(Protocol):
    """What is left of a message that found no room."""

    @property
    def is_begun(self) -> bool:
        """Whether a part of it is on its way: then it must be finished, or the link given up."""
        ...


class Link(Protocol):
    """Both directions to one peer."""

    peer: Peer

    @property
    def arrival(self) -> int:
        """The descriptor that is readable while messages wait."""
        ...

    @property
    def life(self) -> tuple[int, ...]:
        """Descriptors that turn readable when the other end is gone, if `arrival` does not tell."""
        ...

    @property
    def room(self) -> tuple[int, int]:
        """The descriptor and the `poll` mask that tell of room for sending."""
        ...

    def offer(self, message: Message) -> "Outgoing | None":
        """Send; what found no room comes back. Raises `LinkClosed`."""
        ...

    def push(self, outgoing: "Outgoing") -> bool:
        """Go on with what found no room; whether it is all gone now. Raises `LinkClosed`."""
        ...

    def take(self) -> tuple[Message | None, bool]:
        """A message, if one is there, and whether another may be. Raises `LinkClosed`, `MalformedMessage`."""
        ...

    def is_gone(self) -> bool:
        """Whether the other end is gone; its last messages may still wait."""
        ...

    def close(self) -> None: ...


class Carrier(Protocol):
    """Both directions of a stream of bytes to one peer."""

    @property
    def arrival(self) -> int: ...

    @property
    def life(self) -> tuple[int, ...]: ...

    @property
    def room(self) -> tuple[int, int]: ...

    @property
    def has_unread(self) -> bool:
        """Whether bytes are known to wait; False may also mean that nobody looked."""
        ...

    def write(self, views: list[memoryview]) -> list[memoryview]:
        """Send what there is room for; what is left comes back. Raises `LinkClosed`."""
        ...

    def read_into(self, view: memoryview) -> int:
        """Bytes put at the beginning of the view; 0 when there are none now. Raises `LinkClosed`."""
        ...

    def is_gone(self) -> bool: ...

    def close(self) -> None: ...


class _Rest:
    """Bytes that found no room."""

    def __init__(self, views: list[memoryview], num_bytes: int) -> None:
        self.views, self._num_bytes = views, num_bytes

    @property
    def is_begun(self) -> bool:
        return sum(map(len, self.views)) < self._num_bytes


class StreamLink:
    """Messages over a carrier of bytes."""

    def __init__(self, peer: Peer, carrier: Carrier, limits: Limits) -> None:
        self.peer = peer
        self._carrier, self._limits = carrier, limits
        self._decoder = Decoder(limits)

    @property
    def arrival(self) -> int:
        return self._carrier.arrival

    @property
    def life(self) -> tuple[int, ...]:
        return self._carrier.life

    @property
    def room(self) -> tuple[int, int]:
        return self._carrier.room

    def offer(self, message: Message) -> Outgoing | None:
        views = encode(message, self._limits)
        left = self._carrier.write(views)
        return _Rest(left, sum(map(len, views))) if left else None

    def push(self, outgoing: Outgoing) -> bool:
        assert isinstance(outgoing, _Rest)
        outgoing.views = self._carrier.write(outgoing.views)
        return not outgoing.views

    def take(self) -> tuple[Message | None, bool]:
        message = self._decoder.pull(self._carrier.read_into)
        return message, message is not None and (self._decoder.has_staged or self._carrier.has_unread)

    def is_gone(self) -> bool:
        return self._carrier.is_gone()

    def close(self) -> None:
        self._carrier.close()


def without_first(views: list[memoryview], count: int) -> list[memoryview]:
    """The views less their first `count` bytes."""
    for index, view in enumerate(views):
        if count < len(view):
            return [view[count:], *views[index + 1 :]]
        count -= len(view)
    return []

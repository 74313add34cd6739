"""Between hosts: a TCP connection without delay.

A process that dies closes its connections, and we read that at once. A host or a cable that dies says
nothing; keepalive, and for bytes on their way the user timeout, end the connection after about three seconds.
Who cannot wait so long has his own deadline.
"""

import select
import socket
from contextlib import suppress

from workers.transport.links import LinkClosed, without_first

_SILENCE_MS = 3000
_MOST_VIEWS = 64  # of one call; the kernel takes 1024
_BUFFER_BYTES = 2 * 2**20  # a message of 64 tokens passes without its sender waiting for the reader


def tune(connection: socket.socket) -> None:
    """No delay, no blocking, and an end to silence."""
    connection.setblocking(False)
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS),
        (socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES),
    ):
        connection.setsockopt(level, option, value)


class TcpCarrier:
    """One end of a connection. Owns it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._death = select.poll()
        self._death.register(connection, 0)  # POLLERR and POLLHUP are always told

    @property
    def arrival(self) -> int:
        return self._connection.fileno()

    @property
    def life(self) -> tuple[int, ...]:
        return ()

    @property
    def room(self) -> tuple[int, int]:
        return self._connection.fileno(), select.POLLOUT

    @property
    def has_unread(self) -> bool:
        return False

    def is_gone(self) -> bool:
        return bool(self._death.poll(0))

    def write(self, views: list[memoryview]) -> list[memoryview]:
        while views:
            try:
                sent = self._connection.sendmsg(views[:_MOST_VIEWS])
            except BlockingIOError:
                return views
            except OSError as error:
                raise LinkClosed(error.strerror or "the connection failed") from error
            views = without_first(views, sent)
        return views

    def read_into(self, view: memoryview) -> int:
        try:
            count = self._connection.recv_into(view)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise LinkClosed(error.strerror or "the connection failed") from error
        if count == 0:
            raise LinkClosed("it closed the connection")
        return count

    def close(self) -> None:
        with suppress(OSError):
            self._connection.close()

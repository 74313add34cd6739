"""Between processes of one host: a ring of shared memory for each direction, woken by eventfds.

The acceptor of a unix connection makes a sealed memfd and four eventfds and passes them over the connection,
so nothing has a name and nothing is left behind however the two processes end.

    memfd       [0, C) acceptor to connector, [C, 2 C) connector to acceptor, C = `ring_bytes`
    eventfds    for each direction: `filled`, bytes written and not yet fetched by the reader
                                    `freed`, bytes read and not yet fetched by the writer

The rings hold data and nothing else. How far the other side has come travels as the value of an eventfd,
added by a write and fetched by a read: the kernel's lock orders it after the copy on any processor, one
system call both counts and wakes, and a count that cannot be is seen before it is believed. The reader gives
room back in quarters of a ring, so that a small message costs one write here and one read there.

Death is seen in two ways: the unix connection closes, and the other process's pidfd turns readable (a child
that was forked off it keeps the connection open).
"""

import fcntl
import mmap
import os
import select
import socket
import struct
from contextlib import suppress

from workers.transport.descriptors import clear_event, close_all, new_event
from workers.transport.links import LinkClosed
from workers.transport.message import MalformedMessage

NUM_DESCRIPTORS = 5  # the memfd and four eventfds
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


def make_rings(ring_bytes: int) -> list[int]:
    """The caller's new descriptors of a pair: the memfd, then filled and freed of either direction."""
    fds = [os.memfd_create("eightfold-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)]
    try:
        os.ftruncate(fds[0], 2 * ring_bytes)
        fcntl.fcntl(fds[0], fcntl.F_ADD_SEALS, _SEALS)
        fds.extend(new_event() for _ in range(NUM_DESCRIPTORS - 1))
    except BaseException:
        close_all(fds)
        raise
    return fds


class RingCarrier:
    """One end of a pair of rings. Owns the connection, the descriptors and the mapping."""

    def __init__(
        self, connection: socket.socket, fds: list[int], ring_bytes: int, *, is_acceptor: bool
    ) -> None:
        """Take over both, also when this fails.

        Raises:
            MalformedMessage: the descriptors are not what the layout says.
        """
        self._connection, self._fds = connection, fds
        try:
            # Without the seals the other side could cut the file and our next access would kill us.
            if fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise MalformedMessage("the memory of a ring is not sealed")
            if os.fstat(fds[0]).st_size != 2 * ring_bytes:
                raise MalformedMessage("the memory of a ring has another size")
            self._mapping = mmap.mmap(fds[0], 2 * ring_bytes)
            for fd in fds[1:]:
                os.set_blocking(fd, False)
        except (OSError, MalformedMessage) as error:
            connection.close()
            close_all(fds)
            raise MalformedMessage(str(error)) from error
        halves = memoryview(self._mapping)
        to_connector, to_acceptor = halves[:ring_bytes], halves[ring_bytes:]
        halves.release()
        _, *events = fds
        if is_acceptor:
            self._out, self._in = to_connector, to_acceptor
            self._filled_out, self._freed_out, self._filled_in, self._freed_in = events
        else:
            self._out, self._in = to_acceptor, to_connector
            self._filled_in, self._freed_in, self._filled_out, self._freed_out = events
        self._capacity = ring_bytes
        self._write_at = self._read_at = 0
        self._free = ring_bytes  # that we know of
        self._unread = 0  # that we know of
        self._to_give_back = 0
        self._life = [connection.fileno()]
        with suppress(OSError):  # a peer in another process namespace has no pid here
            pid, _, _ = _CREDENTIALS.unpack(
                connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            pidfd = os.pidfd_open(pid)
            self._fds.append(pidfd)
            self._life.append(pidfd)
        self._death = select.poll()
        for fd in self._life:
            self._death.register(fd, select.POLLIN)

    @property
    def arrival(self) -> int:
        return self._filled_in

    @property
    def life(self) -> tuple[int, ...]:
        return tuple(self._life)

    @property
    def room(self) -> tuple[int, int]:
        return self._freed_out, select.POLLIN

    @property
    def has_unread(self) -> bool:
        return self._unread > 0

    def is_gone(self) -> bool:
        # Nothing is ever sent on the connection after the greeting: readable means closed.
        return bool(self._death.poll(0))

    def write(self, views: list[memoryview]) -> list[memoryview]:
        total = sum(map(len, views))
        if self._free < total:
            self._fetch_freed()
        room = min(self._free, total)
        left: list[memoryview] = []
        if room == total <= self._capacity - self._write_at:  # as most messages lie: in one piece
            at, out = self._write_at, self._out
            for view in views:
                stop = at + len(view)
                out[at:stop] = view
                at = stop
            self._write_at = at % self._capacity
        else:
            for index, view in enumerate(views):
                count = min(len(view), room)
                self._copy_out(view, count)
                room -= count
                if count < len(view):
                    left = [view[count:], *views[index + 1 :]]
                    break
            total -= sum(map(len, left))
        if total:
            self._free -= total
            os.eventfd_write(self._filled_out, total)
        return left

    def _fetch_freed(self) -> None:
        self._free += clear_event(self._freed_out)
        if self._free > self._capacity:
            raise LinkClosed("it freed more of the ring than there is")

    def _copy_out(self, view: memoryview, count: int) -> None:
        at = self._write_at
        first = min(count, self._capacity - at)
        self._out[at : at + first] = view[:first]
        if first < count:
            self._out[: count - first] = view[first:count]
        self._write_at = (at + count) % self._capacity

    def read_into(self, view: memoryview) -> int:
        if not self._unread:
            self._unread = clear_event(self._filled_in)
            if not self._unread:
                return 0
            if self._unread > self._capacity - self._to_give_back:
                raise LinkClosed("it filled more of the ring than there is")
        at, count = self._read_at, min(len(view), self._unread)
        first = min(count, self._capacity - at)
        view[:first] = self._in[at : at + first]
        if first < count:
            view[first:count] = self._in[: count - first]
        self._read_at = (at + count) % self._capacity
        self._unread -= count
        self._to_give_back += count
        if self._to_give_back >= self._capacity // 4:
            os.eventfd_write(self._freed_in, self._to_give_back)
            self._to_give_back = 0
        return count

    def close(self) -> None:
        self._connection.close()
        self._out.release()
        self._in.release()
        self._mapping.close()
        close_all(self._fds)
        self._fds = []

"""What a hop costs at least: 64 KiB through bare primitives to a forked process and back."""

import ctypes
import mmap
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIZE = 64 * 1024
Hop = Callable[[], None]
"""One round trip."""


class Semaphores:
    """Two POSIX semaphores and a buffer for each direction, in an anonymous shared mapping."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._memory = mmap.mmap(-1, 2 * SIZE + 4096)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._semaphores = [ctypes.c_void_p(base + 2 * SIZE + 64 * index) for index in range(2)]
        for semaphore in self._semaphores:
            self._libc.sem_init(semaphore, 1, 0)
        view = memoryview(self._memory)
        self._places = view[:SIZE], view[SIZE : 2 * SIZE]

    def send(self, direction: int, data: memoryview) -> None:
        self._places[direction][:] = data
        self._libc.sem_post(self._semaphores[direction])

    def receive(self, direction: int, data: memoryview) -> None:
        while self._libc.sem_wait(self._semaphores[direction]):
            pass
        data[:] = self._places[direction]


class Events:
    """The same with a blocking eventfd for each direction."""

    def __init__(self) -> None:
        self._fds = [os.eventfd(0), os.eventfd(0)]
        view = memoryview(mmap.mmap(-1, 2 * SIZE))
        self._places = view[:SIZE], view[SIZE:]

    def send(self, direction: int, data: memoryview) -> None:
        self._places[direction][:] = data
        os.eventfd_write(self._fds[direction], 1)

    def receive(self, direction: int, data: memoryview) -> None:
        os.eventfd_read(self._fds[direction])
        data[:] = self._places[direction]


class Stream:
    """A TCP connection without delay."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self._ends = [socket.create_connection(listener.getsockname()), listener.accept()[0]]
        for end in self._ends:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, direction: int, data: memoryview) -> None:
        self._ends[direction].sendall(data)

    def receive(self, direction: int, data: memoryview) -> None:
        filled = 0
        while filled < SIZE:
            filled += self._ends[1 - direction].recv_into(data[filled:])


BARE: dict[str, type[Semaphores | Events | Stream]] = {
    "bare memory + semaphore": Semaphores,
    "bare memory + eventfd": Events,
    "bare TCP": Stream,
}


@contextmanager
def bare(kind: type[Semaphores | Events | Stream], core: int) -> Iterator[Hop]:
    """A forked process answers on that core: it shares the mapping and the descriptors."""
    primitive, data = kind(), memoryview(bytearray(SIZE))
    child = os.fork()
    if child == 0:
        os.sched_setaffinity(0, {core})
        while True:
            primitive.receive(0, data)
            primitive.send(1, data)

    def hop() -> None:
        primitive.send(0, data)
        primitive.receive(1, data)

    try:
        yield hop
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

"""Descriptors that wake and that nothing names."""

import os
from collections.abc import Iterable
from contextlib import suppress


def new_event() -> int:
    """An eventfd that never blocks and that no child inherits. The caller closes it."""
    return os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)


def clear_event(fd: int) -> int:
    """The sum of what was written to it since the last time; 0 if nothing."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def close_all(fds: Iterable[int]) -> None:
    """Close them, whatever became of them."""
    for fd in fds:
        with suppress(OSError):
            os.close(fd)

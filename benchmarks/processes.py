"""What the benchmarks of the transport share: processes that answer, and endpoints."""

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.protocol import Deadline

TOKEN = b"nothing secret in a benchmark..."


def soon() -> Deadline:
    return Deadline.after(60)


def new_endpoint(name: str, **offers: Any) -> PeerEndpoint:
    return PeerEndpoint(EndpointConfig(name, TOKEN, **{"same_host": False, **offers}))


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[Connection]:
    """A process that runs `target(pipe, *args)` and should end when the pipe does."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=target, args=(theirs, *args), daemon=True)
    child.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # to the child: go home
        child.join(5)
        child.kill()
        child.join()

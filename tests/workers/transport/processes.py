"""Peers in processes of their own, for tests: what they do, and how they are started."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.limits import Limits
from workers.transport.message import Message
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Endpoint, Received

TOKEN = b"a token of the tests, 32 bytes.."
SMALL = Limits(message_bytes=64 * 2**20, ring_bytes=2**20, inbox_bytes=8 * 2**20)
PATIENCE = 30.0  # for what must come, on a machine with other things to do


def soon() -> Deadline:
    return Deadline.after(PATIENCE)


def new_endpoint(name: str, carrier: str = "shared_memory", **overrides: Any) -> PeerEndpoint:
    """An endpoint that others reach by one carrier only."""
    offers = {"same_host": carrier == "shared_memory", "tcp_host": "127.0.0.1" if carrier == "tcp" else None}
    return PeerEndpoint(EndpointConfig(name, **{"token": TOKEN, "limits": SMALL, **offers, **overrides}))


def receive(endpoint: Endpoint, peer: str | None = None) -> Received:
    """The next event, which must be a message."""
    event = endpoint.receive(soon(), peer)
    assert isinstance(event, Received), event
    return event


def echo(endpoint: Endpoint, pipe: Connection) -> None:
    """Send every message back, for ever."""
    while True:
        with suppress(DeadlineExceeded):
            event = endpoint.receive(Deadline.after(PATIENCE))
            if isinstance(event, Received):
                endpoint.send(event.peer.name, event.message, soon())


def greet_only(endpoint: Endpoint, pipe: Connection) -> None:
    """Let one peer connect, then look at the transport no more."""
    with suppress(DeadlineExceeded):
        while not endpoint.peers:
            endpoint.receive(Deadline.after(0.01))
    while not endpoint.peers:
        greet_only(endpoint, pipe)
    pipe.recv()


def speak_and_die(endpoint: Endpoint, pipe: Connection) -> None:
    """Answer the first message with ten and die at once."""
    sender = receive(endpoint).peer.name
    for number in range(10):
        endpoint.send(sender, Message(7, sequence=number), soon())
    os.kill(os.getpid(), signal.SIGKILL)


Role = Callable[[Endpoint, Connection], None]


def _run(role: Role, pipe: Connection, name: str, carrier: str, overrides: dict[str, Any]) -> None:
    endpoint = new_endpoint(name, carrier, **overrides)
    pipe.send(endpoint.address)
    role(endpoint, pipe)
    endpoint.close()


@dataclass
class PeerProcess:
    """A peer elsewhere."""

    process: BaseProcess
    address: Address
    pipe: Connection

    def signal(self, number: int) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)


@contextmanager
def peer_process(
    role: Role, name: str = "other", carrier: str = "shared_memory", **overrides: Any
) -> Iterator[PeerProcess]:
    """A process that plays a role; killed at the end."""
    # The fork server has torch loaded already and shares no descriptor with the tests.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    process = context.Process(target=_run, args=(role, theirs, name, carrier, overrides), daemon=True)
    process.start()
    theirs.close()
    try:
        yield PeerProcess(process, ours.recv(), ours)
    finally:
        process.kill()
        process.join()
        process.close()
        ours.close()

"""Peers that die, freeze and come back; rings that are tampered with."""

import os
import signal
import socket
import threading
import time

import pytest
import torch

from tests.workers.transport.processes import (
    echo,
    greet_only,
    new_endpoint,
    peer_process,
    receive,
    soon,
    speak_and_die,
)
from workers.transport.descriptors import close_all
from workers.transport.links import LinkClosed
from workers.transport.message import MalformedMessage, Message
from workers.transport.protocol import Deadline, DeadlineExceeded, PeerLost
from workers.transport.shared_memory import RingCarrier, make_rings

CARRIERS = ["shared_memory", "tcp"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_killed_while_we_wait(carrier: str) -> None:
    in_shared_memory = os.listdir("/dev/shm")
    with peer_process(echo, carrier=carrier) as other:
        endpoint = new_endpoint("a")
        endpoint.connect(other.address, soon())
        killed: list[float] = []

        def kill() -> None:
            killed.append(time.monotonic())
            other.signal(signal.SIGKILL)

        timer = threading.Timer(0.1, kill)
        timer.start()
        event = endpoint.receive(soon())
        assert isinstance(event, PeerLost)
        assert time.monotonic() - killed[0] < 5
        assert endpoint.peers == {}
        with pytest.raises(PeerLost):
            endpoint.send("other", Message(1), soon())
        timer.join()
        endpoint.close()
    assert os.listdir("/dev/shm") == in_shared_memory


@pytest.mark.parametrize("carrier", CARRIERS)
def test_killed_while_we_send(carrier: str) -> None:
    """It is stopped and reads nothing, so the message does not fit; the wait for room ends with the peer."""
    with peer_process(greet_only, carrier=carrier) as other:
        endpoint = new_endpoint("a")
        endpoint.connect(other.address, soon())
        other.signal(signal.SIGSTOP)
        killer = threading.Timer(0.1, other.signal, [signal.SIGKILL])
        killer.start()
        started = time.monotonic()
        try:
            with pytest.raises(PeerLost):
                endpoint.send("other", Message(1, (torch.zeros(60 * 2**20, dtype=torch.uint8),)), soon())
            assert time.monotonic() - started < 5
        finally:
            killer.join()
            endpoint.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_what_the_dead_had_sent_arrives(carrier: str) -> None:
    with peer_process(speak_and_die, carrier=carrier) as other:
        endpoint = new_endpoint("a")
        endpoint.connect(other.address, soon())
        endpoint.send("other", Message(1), soon())
        other.process.join()
        assert [receive(endpoint).message.sequence for _ in range(10)] == list(range(10))
        assert isinstance(endpoint.receive(soon()), PeerLost)
        endpoint.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_frozen(carrier: str) -> None:
    """A peer that is stopped is no dead peer: only the deadline tells, and it may answer later."""
    with peer_process(echo, carrier=carrier) as other:
        endpoint = new_endpoint("a")
        endpoint.connect(other.address, soon())
        other.signal(signal.SIGSTOP)
        endpoint.send("other", Message(1), soon())
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            endpoint.receive(Deadline.after(0.2))
        assert time.monotonic() - started < 5
        other.signal(signal.SIGCONT)
        assert receive(endpoint).message.kind == 1
        endpoint.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_fresh_peer_under_the_same_name(carrier: str) -> None:
    with peer_process(echo, carrier=carrier, incarnation=1) as first:
        endpoint = new_endpoint("a")
        endpoint.connect(first.address, soon())
    assert isinstance(endpoint.receive(soon()), PeerLost)
    with peer_process(echo, carrier=carrier, incarnation=2) as second:
        assert endpoint.connect(second.address, soon()).incarnation == 2
        endpoint.send("other", Message(5), soon())
        assert receive(endpoint).peer.incarnation == 2
    endpoint.close()


def ring_pair() -> tuple[RingCarrier, RingCarrier, list[int]]:
    """Both ends in this process, and the acceptor's descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    theirs.setblocking(False)
    fds = make_rings(4096)
    copies = [os.dup(fd) for fd in fds]
    return (
        RingCarrier(ours, fds, 4096, is_acceptor=True),
        RingCarrier(theirs, copies, 4096, is_acceptor=False),
        copies,
    )


def test_ring_wraps() -> None:
    one, other, _ = ring_pair()
    data = bytes(range(251)) * 200
    received = bytearray()
    buffer = memoryview(bytearray(1500))
    left = [memoryview(data)]
    while len(received) < len(data):
        left = one.write(left)
        count = other.read_into(buffer)
        received += buffer[:count]
    assert bytes(received) == data
    assert not left
    one.close()
    assert other.is_gone()
    other.close()


def test_a_count_that_cannot_be_ends_the_ring() -> None:
    one, other, fds = ring_pair()
    one.write([memoryview(b"x" * 100)])
    os.eventfd_write(fds[1], 5000)
    with pytest.raises(LinkClosed, match="filled more"):
        other.read_into(memoryview(bytearray(10)))
    os.eventfd_write(fds[2], 101)
    with pytest.raises(LinkClosed, match="freed more"):
        one.write([memoryview(b"x" * 4000)])
    one.close()
    other.close()


@pytest.mark.parametrize("fault", ["unsealed", "short", "no memory"])
def test_descriptors_are_checked(fault: str) -> None:
    ours, theirs = socket.socketpair()
    fds = make_rings(8192 if fault == "short" else 4096)
    if fault != "short":
        os.close(fds[0])
        fds[0] = os.memfd_create("plain") if fault == "unsealed" else os.eventfd(0)
    with pytest.raises(MalformedMessage):
        RingCarrier(ours, fds, 4096, is_acceptor=False)
    close_all(fds)  # they are closed already
    theirs.close()

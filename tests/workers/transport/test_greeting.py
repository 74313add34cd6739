"""Who is let in: names and incarnations, tokens, versions, strangers; and who cannot be reached."""

import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

from tests.workers.transport.pairs import CARRIERS, attended
from tests.workers.transport.processes import (
    PATIENCE,
    SMALL,
    TOKEN,
    new_endpoint,
    receive,
    soon,
)
from workers.transport import handshake
from workers.transport.config import EndpointConfig
from workers.transport.endpoint import PeerEndpoint
from workers.transport.handshake import HELLO
from workers.transport.local import LocalSwitch
from workers.transport.message import Message
from workers.transport.protocol import (
    Address,
    Deadline,
    DeadlineExceeded,
    Peer,
    PeerLost,
    PeerRefused,
    PeerUnreachable,
)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_later_incarnation_replaces_an_earlier_one(carrier: str) -> None:
    switch = LocalSwitch() if carrier == "local" else None
    b = new_endpoint("b", carrier, switch=switch, epoch=4)
    lives = [
        new_endpoint("a", carrier, switch=switch, incarnation=incarnation, epoch=9) for incarnation in (5, 6)
    ]
    try:
        with attended(b):
            assert lives[0].connect(b.address, soon()).epoch == 4
            lives[0].send("b", Message(1), soon())
            while not b._inbox:
                time.sleep(0.001)
            lives[1].connect(b.address, soon())
            while Peer("a", 6, 9) not in b.peers.values():
                time.sleep(0.001)
        assert b.peers == {"a": Peer("a", 6, 9)}
        lives[1].send("b", Message(2), soon())
        lost = b.receive(soon())  # and nothing of what the earlier life had sent
        assert isinstance(lost, PeerLost)
        assert lost.incarnation == 5
        assert receive(b).message.kind == 2
        lives[0].disconnect("b")
        with attended(b):
            if carrier == "local":  # there the refusal comes after the connection
                lives[0].connect(b.address, soon())
                assert isinstance(lives[0].receive(soon()), PeerLost)
            else:
                with pytest.raises(PeerRefused, match="later incarnation"):
                    lives[0].connect(b.address, soon())
        assert b.peers == {"a": Peer("a", 6, 9)}
    finally:
        for endpoint in (b, *lives):
            endpoint.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_another_token_is_refused(carrier: str) -> None:
    switch = LocalSwitch() if carrier == "local" else None
    b = new_endpoint("b", carrier, switch=switch)
    stranger = new_endpoint("a", carrier, switch=switch, token=b"another token of thirty-two byte")
    try:
        with attended(b), pytest.raises(PeerRefused, match="token"):
            stranger.connect(b.address, soon())
        assert b.peers == {}
        assert stranger.peers == {}
    finally:
        b.close()
        stranger.close()


def test_a_guest_who_cannot_prove_the_token_is_refused() -> None:
    """One who ignores that our proof is wrong, and sends a proof of his own."""
    with new_tcp("b") as b, attended(b):
        with socket.create_connection((b.address.tcp_host, b.address.tcp_port), PATIENCE) as guest:
            hello = handshake._pack_hello(Peer("a", 1), handshake.Status.WELCOME, bytes(32))
            guest.sendall(hello + bytes(32))
            answer = b""
            while data := guest.recv(1000):
                answer += data
        assert answer[HELLO.size] == handshake.Status.TOKEN
        assert b.peers == {}


@contextmanager
def new_tcp(name: str) -> Iterator[PeerEndpoint]:
    endpoint = new_endpoint(name, "tcp")
    try:
        yield endpoint
    finally:
        endpoint.close()


def test_another_version_is_refused() -> None:
    with new_tcp("b") as b, attended(b):
        with socket.create_connection((b.address.tcp_host, b.address.tcp_port), PATIENCE) as guest:
            hello = bytearray(handshake._pack_hello(Peer("a", 1), handshake.Status.WELCOME, bytes(32)))
            struct.pack_into("<H", hello, 4, 99)
            guest.sendall(hello)
            answer = guest.recv(1000, socket.MSG_WAITALL)
        assert answer[6] == handshake.Status.VERSION

    with socket.create_server(("127.0.0.1", 0)) as listener:
        a = new_endpoint("a")

        def answer_as_another_version() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(HELLO.size, socket.MSG_WAITALL)
                connection.sendall(hello)

        thread = threading.Thread(target=answer_as_another_version)
        thread.start()
        where = Address("b", tcp_host="127.0.0.1", tcp_port=listener.getsockname()[1])
        with pytest.raises(PeerRefused, match="version 99"):
            a.connect(where, soon())
        thread.join()
        a.close()


def test_strangers_do_not_disturb() -> None:
    """Noise and silence at the door; the second is shown out in time."""
    with new_tcp("b") as b, attended(b):
        where = b.address.tcp_host, b.address.tcp_port
        with socket.create_connection(where, PATIENCE) as silent, socket.create_connection(where) as noisy:
            noisy.sendall(b"GET / HTTP/1.1\r\n\r\n" * 20)
            with suppress(ConnectionResetError):
                assert noisy.recv(10) == b""
            assert silent.recv(10) == b""
        a = new_endpoint("a")
        a.connect(b.address, soon())
        a.close()


def test_nobody_there() -> None:
    a = new_endpoint("a")
    gone = new_endpoint("b", "tcp")
    address = gone.address
    gone.close()
    with pytest.raises(PeerUnreachable):
        a.connect(address, soon())
    with pytest.raises(PeerUnreachable):
        a.connect(Address("b"), soon())
    unix = Address("b", host=a.address.host, unix="@eightfold/nobody")
    with pytest.raises(PeerUnreachable):
        a.connect(unix, soon())
    other_name = Address("c", host=a.address.host, unix=a.address.unix)
    with pytest.raises(PeerUnreachable):
        a.connect(other_name, soon())
    a.close()


def test_one_who_does_not_answer_the_door() -> None:
    with new_tcp("b") as b:  # listens, and nobody looks after it
        a = new_endpoint("a")
        with pytest.raises(DeadlineExceeded):
            a.connect(b.address, Deadline.after(0.1))
        a.close()


def test_too_many_peers_are_refused() -> None:
    b = new_endpoint("b", limits=replace(SMALL, peers=1))
    first, second = new_endpoint("first"), new_endpoint("second")
    with attended(b):
        first.connect(b.address, soon())
        with pytest.raises(PeerRefused, match="as many peers"):
            second.connect(b.address, soon())
    for endpoint in (b, first, second):
        endpoint.close()


def test_bad_configurations() -> None:
    with pytest.raises(ValueError, match="token"):
        EndpointConfig("a", b"short")
    with pytest.raises(ValueError, match="name"):
        EndpointConfig("a" * 65, TOKEN)
    assert "short" not in repr(EndpointConfig("a", b"short but long enough"))

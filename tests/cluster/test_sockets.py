"""The list of sockets must be able to fail: real sockets of this process that are not on it."""

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.checkpoints import DEMO
from tests.cluster.gateway.serving import serve
from tests.cluster.sockets import Socket, listening, unlisted, written
from workers.local import LocalModel, ModelOptions

LISTED = [
    ("127.0.0.1", "gateway"),
    ("127.0.0.1", "gateway"),
    ("127.0.0.1", "loopback"),
    ("\0listed", "abstract"),
]


@contextmanager
def listener(where: str) -> Iterator[int]:
    """A socket at an address, or at a path; returns its port."""
    if where.startswith(("/", "\0")):
        made, address = socket.socket(socket.AF_UNIX), where
    else:
        made = socket.socket(socket.AF_INET6 if ":" in where else socket.AF_INET)
        address = (where, 0)  # type: ignore[assignment]
    with made:
        made.bind(address)
        made.listen()
        yield 0 if isinstance(address, str) else made.getsockname()[1]


def complaints(*extra: str) -> list[str]:
    """What is said of this process with the sockets that a gateway may have, and some that it may not."""
    before = listening([os.getpid()])
    with ExitStack() as stack:
        ports = [stack.enter_context(listener(where)) for where, _ in LISTED]
        at = {("127.0.0.1", port) for port in ports[:2]}
        for where in extra:
            stack.enter_context(listener(where))
        mine = [found for found in listening([os.getpid()]) if found not in before]
        assert len(mine) == len(LISTED) + len(extra)
        return [why for _, why in unlisted(mine, os.getpid(), at, "/session")]


def test_what_is_on_the_list_may_listen() -> None:
    assert complaints() == []


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ("0.0.0.0", "eightfold: number 1 of tcp at 'every'"),
        ("::", "eightfold: number 1 of tcp at 'every'"),
        ("::1", "eightfold: number 2 of tcp at 'loopback'"),
        ("127.0.0.1", "eightfold: number 2 of tcp at 'loopback'"),
        ("\0another", "eightfold: number 2 of unix at 'abstract'"),
    ],
)
def test_one_more_is_found(extra: str, said: str) -> None:
    assert complaints(extra) == [said]


def test_a_unix_socket_elsewhere_is_found(tmp_path: Path) -> None:
    assert complaints(str(tmp_path / "s")) == ["eightfold: number 1 of unix at '/'"]


def test_a_udp_socket_is_found() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
        (found,) = [one for one in listening([os.getpid()]) if one.port == port]
        assert unlisted([found], os.getpid(), [], "/session")


def test_a_process_that_nobody_knows_is_found() -> None:
    with listener("127.0.0.1"):
        found = listening([os.getpid()])
        assert unlisted(found, 0, [], "/session")


def test_one_process_listens_at_its_two_ports() -> None:
    before = listening([os.getpid()])
    with serve(LocalModel(DEMO, ModelOptions())) as served:
        mine = [found for found in listening([os.getpid()]) if found not in before]
        at = {("127.0.0.1", served.server.http_port), ("127.0.0.1", served.server.grpc_port)}
    assert {(found.address, found.port) for found in mine} == at
    assert unlisted(mine, os.getpid(), at, "/session") == []


@pytest.mark.parametrize(
    ("title", "allowed"),
    [
        ("ray::supervisor:Supervisor.directory", 1),
        ("ray::ServeReplica:decode:decode", 1),
        ("ray::AttentionActor.run()", 1),
        ("/usr/bin/python -u /ray/autoscaler/_private/monitor.py --logs-dir=/x", 1),
        ("/ray/core/src/ray/raylet/raylet --raylet_socket_name=/x", 2),
        ("ray::Stranger", 0),
        ("/usr/bin/python -m http.server", 0),
    ],
)
def test_a_process_is_known_by_its_title(title: str, allowed: int) -> None:
    sockets = [Socket(1, title, "tcp", "127.0.0.1", port) for port in (1, 2, 3)]
    assert len(unlisted(sockets, 0, [], "/session")) == 3 - allowed


def test_only_one_socket_is_open_to_other_machines() -> None:
    everywhere = {
        row: number for row, number in written().items() if row[2] not in ("loopback", "session", "abstract")
    }
    assert everywhere == {("eightfold", "tcp", "gateway"): 2, ("ray::ServeReplica", "tcp", "every"): 1}

"""Endpoints over every carrier: messages, bounds and deadlines."""

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.workers.transport.pairs import CARRIERS, attended, pair
from tests.workers.transport.processes import (
    SMALL,
    echo,
    new_endpoint,
    peer_process,
    receive,
    soon,
)
from workers.transport.endpoint import PeerEndpoint
from workers.transport.local import LocalSwitch
from workers.transport.message import DTYPES, Message
from workers.transport.protocol import (
    Deadline,
    DeadlineExceeded,
    PeerLost,
    Received,
)

MIB = 2**20


def ask_around(endpoint: PeerEndpoint, message: Message) -> Message:
    endpoint.send("other", message, soon())
    return receive(endpoint).message


def is_same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))
    )


@pytest.mark.parametrize("carrier", ["shared_memory", "tcp"])
def test_between_processes(carrier: str) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 256, (3, 5, 8), dtype=torch.uint8, generator=generator)
    every_dtype = tuple(numbers.view(dtype) for dtype in DTYPES)
    large = torch.randint(0, 256, (60 * MIB,), dtype=torch.uint8, generator=generator)
    with peer_process(echo, carrier=carrier) as other:
        endpoint = new_endpoint("a")
        endpoint.connect(other.address, soon())
        found = ask_around(endpoint, Message(1, every_dtype, epoch=3, step=4, sequence=5, layer=6))
        assert (found.kind, found.epoch, found.step, found.sequence, found.layer) == (1, 3, 4, 5, 6)
        assert all(map(is_same, found.tensors, every_dtype))
        nothing = (torch.empty(0, 7168, dtype=torch.bfloat16), torch.empty(0))
        assert all(map(is_same, ask_around(endpoint, Message(1, nothing)).tensors, nothing))
        assert ask_around(endpoint, Message(1)).tensors == ()
        # 60 MiB through a ring of 1 MiB, while the other side sends its own 60 MiB back.
        assert is_same(ask_around(endpoint, Message(1, (large,))).tensors[0], large)
        endpoint.close()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_a_sent_tensor_is_the_senders_again(carrier: str) -> None:
    with pair(carrier) as (a, b):
        tensor = torch.ones(1000)
        a.send("b", Message(1, (tensor,)), soon())
        tensor.zero_()
        assert receive(b).message.tensors[0].sum() == 1000


@pytest.mark.parametrize("carrier", CARRIERS)
def test_order_and_choice_of_the_peer(carrier: str) -> None:
    with pair(carrier) as (a, b):
        for number in range(100):
            a.send("b", Message(1, sequence=number), soon())
        assert receive(b).message.sequence == 0
        assert [receive(b, "a").message.sequence for _ in range(99)] == list(range(1, 100))
        lost = b.receive(soon(), "nobody")
        assert isinstance(lost, PeerLost)
        with pytest.raises(PeerLost):
            b.send("nobody", Message(1), soon())


@pytest.mark.parametrize("carrier", CARRIERS)
def test_two_that_send_at_once_do_not_wait_for_each_other(carrier: str) -> None:
    with pair(carrier) as (a, b):
        large = torch.zeros(MIB // 2, dtype=torch.uint8)

        def exchange(endpoint: PeerEndpoint, peer: str) -> None:
            for _ in range(12):
                endpoint.send(peer, Message(1, (large,)), soon())
            for _ in range(12):
                receive(endpoint)

        thread = threading.Thread(target=exchange, args=(b, "a"))
        thread.start()
        exchange(a, "b")
        thread.join()


@pytest.mark.parametrize("carrier", CARRIERS)
def test_back_pressure(carrier: str) -> None:
    """Nobody reads: a sender is held up to his deadline, and little is queued."""
    with pair(carrier) as (a, b):
        piece = torch.zeros(MIB // 2, dtype=torch.uint8)
        sent = 0
        with suppress(DeadlineExceeded):
            while True:
                started = time.monotonic()
                a.send("b", Message(1, (piece,)), Deadline.after(0.2))
                sent += 1
        assert 0.2 <= time.monotonic() - started < 5
        assert 1 <= sent <= 32
        # A link with half a message in it is given up; one that lies between messages goes on.
        if a.peers:
            for _ in range(sent):
                receive(b)
            a.send("b", Message(2), soon())
            assert receive(b).message.kind == 2
        else:
            event = a.receive(soon())
            assert isinstance(event, PeerLost)
            assert "did not read" in event.reason


@pytest.mark.parametrize("carrier", CARRIERS)
def test_unread_messages_are_bounded(carrier: str) -> None:
    """One peer's flood stops at its bound, and does not keep another peer's messages out."""
    with pair(carrier) as (a, b):
        piece = torch.zeros(MIB, dtype=torch.uint8)
        flood = threading.Thread(
            target=lambda: [a.send("b", Message(1, (piece,)), soon()) for _ in range(40)]
        )
        flood.start()
        look(b, 0.3)
        assert sum(size for _, _, size in b._inbox) <= SMALL.inbox_bytes + MIB
        for _ in range(40):
            receive(b)
        flood.join()


def look(endpoint: PeerEndpoint, seconds: float) -> None:
    """Look at the transport for a while without taking anything."""
    deadline = Deadline.after(seconds)
    while not deadline.is_over:
        endpoint.pump(0.01)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_deadline_of_receive(carrier: str) -> None:
    with pair(carrier) as (a, _):
        started = time.monotonic()
        with pytest.raises(DeadlineExceeded):
            a.receive(Deadline.after(0.05))
        with pytest.raises(DeadlineExceeded):
            a.receive(Deadline.after(0.05), "b")
        assert 0.1 <= time.monotonic() - started < 5


@pytest.mark.parametrize("carrier", CARRIERS)
def test_last_words_come_before_the_loss(carrier: str) -> None:
    with pair(carrier) as (a, b):
        for number in range(3):
            a.send("b", Message(1, (torch.ones(100),), sequence=number), soon())
        a.close()
        assert [receive(b).message.sequence for _ in range(3)] == [0, 1, 2]
        event = b.receive(soon())
        assert isinstance(event, PeerLost)
        assert event.peer == "a"
        assert b.peers == {}


@pytest.mark.parametrize("carrier", CARRIERS)
def test_budget_travels(carrier: str) -> None:
    with pair(carrier) as (a, b):
        a.send("b", Message(1, budget_us=Deadline.after(5).left_us()), soon())
        a.send("b", Message(1), soon())
        assert 0 < receive(b).deadline.left() <= 5
        assert receive(b).deadline.left() == float("inf")


@pytest.mark.parametrize("carrier", ["shared_memory", "tcp"])
def test_whoever_sends_what_is_no_message_is_cut_off(carrier: str) -> None:
    with pair(carrier) as (a, b):
        link = a._seats["b"].link
        link._carrier.write([memoryview(b"this is no message" * 100)])  # type: ignore[attr-defined]
        event = b.receive(soon())
        assert isinstance(event, PeerLost)
        assert "no message" in event.reason
        assert isinstance(a.receive(soon()), PeerLost)


def test_the_carrier_is_the_nearest() -> None:
    switch = LocalSwitch()
    b = new_endpoint("b", "tcp", same_host=True, switch=switch)
    for overrides, kind in (
        ({"switch": switch}, "LocalLink"),
        ({"switch": LocalSwitch()}, "RingCarrier"),
        ({"same_host": False}, "TcpCarrier"),
    ):
        a = new_endpoint("a", **overrides)
        with attended(b):
            a.connect(b.address, soon())
        link = a._seats["b"].link
        assert kind in {type(link).__name__, type(getattr(link, "_carrier", None)).__name__}
        a.close()
    b.close()


def resources() -> tuple[int, int, list[str], list[str]]:
    names = [sorted(os.listdir(place)) for place in ("/dev/shm", "/tmp")]
    return len(os.listdir("/proc/self/fd")), threading.active_count(), names[0], names[1]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_nothing_is_left_behind(carrier: str) -> None:
    with pair(carrier):
        pass
    before = resources()
    for _ in range(100):
        with pair(carrier) as (a, b):
            a.send("b", Message(1, (torch.ones(10),)), soon())
            assert isinstance(b.receive(soon()), Received)
    after = resources()
    assert after[:3] == before[:3]
    assert not [name for name in set(after[3]) - set(before[3]) if "eightfold" in name]
    assert Path("/proc/net/unix").read_text().count(f"{a.address.unix}") == 0 or not a.address.unix

"""What is said before two GPUs are a pair; the carriers themselves are in `test_gpu_carriers.py`."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.workers.transport.pairs import pair
from tests.workers.transport.processes import soon
from workers.transport import pairing
from workers.transport.carrier import Carrier, CarrierFailed
from workers.transport.endpoint import PeerEndpoint
from workers.transport.message import MalformedMessage, Message
from workers.transport.pairing import CarrierKind, Kind, Offer, _agree, _Talk, keep_watch
from workers.transport.protocol import Deadline, DeadlineExceeded, Received
from workers.transport.slots import SlotPlan

KEY = torch.arange(64, dtype=torch.uint8)
PLAN = SlotPlan(2, 4096)


def agree(
    a: PeerEndpoint, b: PeerEndpoint, ours: Offer, theirs: Offer, epochs: tuple[int, int] = (3, 3)
) -> list[Offer]:
    talks = _Talk(a, "b", epochs[0], soon()), _Talk(b, "a", epochs[1], soon())
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(_agree, talks, (ours, theirs)))


def is_same(one: Offer, other: Offer) -> bool:
    return (one.kind, one.plan) == (other.kind, other.plan) and torch.equal(one.key, other.key)


@pytest.mark.parametrize("connection", ["local", "shared_memory", "tcp"])
def test_offers_cross(connection: str) -> None:
    ours, theirs = Offer("ipc", PLAN, KEY), Offer("ipc", SlotPlan(5, 999), KEY + 1)
    with pair(connection) as (a, b):
        a.send("b", Message(Kind.PAIR, epoch=2), soon())  # an earlier attempt of ours that came to nothing
        b.send("a", Message(Kind.READY, epoch=1), soon())
        found = agree(a, b, ours, theirs)
        assert is_same(found[0], theirs)
        assert is_same(found[1], ours)


@pytest.mark.parametrize(
    ("kind", "plan", "epochs", "problem"),
    [
        ("copy", PLAN, (3, 3), "it offers"),
        ("nccl", SlotPlan(2, 4097), (3, 3), "it offers"),
        ("ipc", PLAN, (3, 4), "not PAIR of epoch 3"),
    ],
)
def test_offers_that_do_not_go_together(
    kind: CarrierKind, plan: SlotPlan, epochs: tuple[int, int], problem: str
) -> None:
    key = torch.cat([KEY, KEY]) if kind == "nccl" else KEY
    ours = Offer("nccl" if kind == "nccl" else "ipc", PLAN, key)
    with pair("local") as (a, b):
        b.send("a", Message(Kind.PAIR, Offer(kind, plan, key).pack(), epoch=epochs[1]), soon())
        with pytest.raises(CarrierFailed, match=problem):
            _agree(_Talk(a, "b", epochs[0], soon()), ours)


def test_somebody_else_or_nobody_answers() -> None:
    with pair("local") as (a, b):
        talk = _Talk(a, "b", 3, soon())
        b.send("a", Message(17, epoch=3), soon())
        with pytest.raises(CarrierFailed, match="a message of kind 17"):
            talk.exchange(Kind.READY)
        with pytest.raises(DeadlineExceeded):
            _Talk(a, "b", 3, Deadline.after(0.01)).exchange(Kind.READY)
        b.close()
        with pytest.raises(CarrierFailed, match="peer b is lost"):
            talk.exchange(Kind.READY)


@pytest.mark.parametrize(
    "tensors",
    [
        (),
        (KEY,),
        (torch.tensor([1, 2, 3], dtype=torch.int32), KEY),
        (torch.tensor([1, 2]), KEY),
        (torch.tensor([9, 2, 4096]), KEY),
        (torch.tensor([1, 0, 4096]), KEY),
        (torch.tensor([1, 2, -1]), KEY),
        (torch.tensor([1, 2, 4096]), KEY[:63]),
        (torch.tensor([1, 2, 4096]), KEY.view(torch.int8)),
        (torch.tensor([3, 2, 4096]), KEY),
    ],
)
def test_malformed_offers(tensors: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(MalformedMessage):
        Offer.unpack(tensors)


class _Heard:
    """A carrier that remembers why it was told to stop."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def abort(self, reason: str) -> None:
        self.reasons.append(reason)


def test_the_end_of_a_connection_aborts_its_carrier() -> None:
    carriers: dict[str, Carrier] = {"b": _Heard(), "c": _Heard()}  # type: ignore[dict-item]
    stop, delivered = threading.Event(), list[Received]()
    with pair("tcp") as (a, b):
        watch = threading.Thread(target=keep_watch, args=(a, carriers, stop, delivered.append))
        watch.start()
        b.send("a", Message(17), soon())
        while not delivered:
            time.sleep(0.001)
        assert not carriers["b"].reasons  # type: ignore[attr-defined]
        b.close()
        deadline = soon()
        while not carriers["b"].reasons and not deadline.is_over:  # type: ignore[attr-defined]
            time.sleep(0.001)
        stop.set()
        watch.join()
    assert [event.message.kind for event in delivered] == [17]
    assert len(carriers["b"].reasons) == 1  # type: ignore[attr-defined]
    assert "peer b is lost" in carriers["b"].reasons[0]  # type: ignore[attr-defined]
    assert not carriers["c"].reasons  # type: ignore[attr-defined]


class _Waiting(_Heard):
    """A carrier that somebody waits for on a device."""

    peer, epoch = "b", 3


def test_a_peer_that_dies_while_it_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has the carrier yet, so nobody else could end what it waits for."""
    made = _Waiting()
    key = torch.zeros(128, dtype=torch.uint8)
    monkeypatch.setattr(pairing, "unique_id", lambda: key)
    with pair("local") as (a, b):

        def meet(*arguments: object, **options: object) -> _Waiting:
            b.close()
            return made

        monkeypatch.setattr(pairing, "NcclCarrier", meet)
        b.send("a", Message(Kind.PAIR, Offer("nccl", PLAN, key[:0]).pack(), epoch=3), soon())
        with pytest.raises(CarrierFailed, match="peer b is lost"):
            pairing.pair(a, "b", "nccl", 3, PLAN, torch.device("cpu"), timeout=1.0, deadline=soon())
    assert len(made.reasons) == 1

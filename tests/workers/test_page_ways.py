"""How ways for pages open, fail and end. What lies between the GPUs: `transport/test_gpu_carriers.py`."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from model.pages import PageCache
from tests.workers.workers import TOKEN, soon
from workers import page_ways, ways
from workers.local import LocalModel
from workers.page_ways import PageWay, PageWays
from workers.transport.carrier import CarrierFailed
from workers.transport.config import WayConfig


class Carrier:
    """The part of a carrier that a way sees."""

    def __init__(self, peer: str) -> None:
        self.peer, self.reason, self.is_closed = peer, "", False

    def check(self) -> None:
        if self.reason:
            raise CarrierFailed(self.peer, self.reason)

    def abort(self, reason: str) -> None:
        self.reason = self.reason or reason

    def close(self) -> None:
        self.is_closed = True


class Gpus:
    """What pairs, instead of GPUs: once it may, and unless it fails."""

    def __init__(self) -> None:
        self.may_pair, self.is_idle, self.failure = threading.Event(), True, ""
        self.may_pair.set()
        self.num_pairing = 0
        self.carriers: list[Carrier] = []

    def pair(self, endpoint: Any, peer: str, *rest: Any, **options: Any) -> Carrier:
        self.num_pairing += 1
        assert self.may_pair.wait(30)
        if self.failure:
            raise CarrierFailed(peer, self.failure)
        self.carriers.append(Carrier(peer))
        return self.carriers[-1]

    def staged(self, carrier: Carrier, num_slots: int, pools: list[torch.Tensor]) -> "Gpus":
        return self


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Gpus:
    found = Gpus()
    monkeypatch.setattr(ways, "pair", found.pair)
    monkeypatch.setattr(page_ways, "StagedPages", found.staged)
    return found


@contextmanager
def both_ends(demo: LocalModel) -> Iterator[tuple[PageWays, PageWays]]:
    """Those of the sender and of the receiver, which leave no thread behind."""
    cache: PageCache = demo.cache(64)
    ends = [PageWays(WayConfig("ipc", f"{name}/pages", TOKEN), cache) for name in ("prefill", "decode")]
    try:
        yield ends[0], ends[1]
    finally:
        for end in ends:
            end.close()
        soon(lambda: not [thread for thread in threading.enumerate() if "/pages/" in thread.name])


def opened(out: PageWays, into: PageWays) -> tuple[PageWay, PageWay]:
    theirs = into.open_for("prefill")
    ours = out.join("decode", theirs.address)
    assert ours.address.epoch == theirs.address.epoch
    soon(lambda: ours.is_open and theirs.is_open)
    return ours, theirs


def fails(way: PageWay) -> bool:
    try:
        way.check()
    except CarrierFailed:
        return True
    return False


def test_a_way_is_opened_once(demo: LocalModel, gpus: Gpus) -> None:
    gpus.may_pair.clear()
    with both_ends(demo) as (out, into):
        theirs = into.open_for("prefill")
        ours = out.join("decode", theirs.address)
        assert ours.is_opening
        assert not ours.has_room
        gpus.may_pair.set()
        soon(lambda: ours.is_open and theirs.is_open)
        assert ours.has_room
        assert not ours.is_opening
        assert into.open_for("prefill") is into.of("prefill") is theirs
        assert out.join("decode", theirs.address) is out.of("decode") is ours
        assert len(gpus.carriers) == 2
        with pytest.raises(CarrierFailed, match="no way"):
            out.of("somebody")


def test_the_end_of_one_side_is_heard_at_the_other(demo: LocalModel, gpus: Gpus) -> None:
    """Whose memory stays until its worker has been told too: it may just be posting something."""
    with both_ends(demo) as (out, into):
        ours, theirs = opened(out, into)
        out.end("decode", "enough")
        soon(lambda: fails(theirs))
        (carrier,) = [carrier for carrier in gpus.carriers if not carrier.reason.startswith("enough")]
        assert "is lost" in carrier.reason
        assert not carrier.is_closed
        late = out.join("decode", theirs.address)  # granted before it was heard
        soon(lambda: fails(late))
        another = into.open_for("prefill")
        assert another.address.epoch > theirs.address.epoch
        soon(lambda: all(carrier.is_closed for carrier in gpus.carriers))
        assert fails(ours)


def test_memory_goes_back_when_the_gpu_has_done_with_it(demo: LocalModel, gpus: Gpus) -> None:
    with both_ends(demo) as (out, into):
        opened(out, into)
        gpus.is_idle = False
        out.end("decode", "enough")
        soon(lambda: all(carrier.reason for carrier in gpus.carriers))
        assert not any(carrier.is_closed for carrier in gpus.carriers)
        gpus.is_idle = True
        into.end("prefill", "enough")
        soon(lambda: all(carrier.is_closed for carrier in gpus.carriers))


def test_a_way_that_is_closed_while_it_pairs(demo: LocalModel, gpus: Gpus) -> None:
    gpus.may_pair.clear()
    with both_ends(demo) as (out, into):
        out.join("decode", into.open_for("prefill").address)
        soon(lambda: gpus.num_pairing == 2)
        out.end("decode", "enough")
        into.end("prefill", "enough")
        gpus.may_pair.set()
        soon(lambda: [carrier.is_closed for carrier in gpus.carriers] == [True, True])
        assert all(carrier.reason for carrier in gpus.carriers)


def test_what_does_not_pair_is_tried_anew(demo: LocalModel, gpus: Gpus) -> None:
    gpus.failure = "its greeting was garbled"
    with both_ends(demo) as (out, into):
        theirs = into.open_for("prefill")
        ours = out.join("decode", theirs.address)
        soon(lambda: fails(ours) and fails(theirs))
        assert not ours.is_opening
        with pytest.raises(CarrierFailed, match="garbled"):
            ours.check()
        gpus.failure = ""
        assert opened(out, into)[1] is not theirs


def test_nobody_joins(demo: LocalModel, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "OPENING_SECONDS", 0.1)
    with both_ends(demo) as (_, into):
        way = into.open_for("prefill")
        soon(lambda: fails(way))
        with pytest.raises(CarrierFailed, match="waiting for the peer"):
            into.of("prefill")

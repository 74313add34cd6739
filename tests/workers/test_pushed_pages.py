"""Sequences whose pages move by ways of their own. GPUs, and what joins them, are played by a board."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from model.pages import PageCache
from tests.workers.handoffs import NO_DRAFTS, greedy
from tests.workers.workers import Client, Worker, client, running, soon
from workers.handoff import MOST_PUSHES, Lease
from workers.local import LocalModel
from workers.page_receiver import PageReceiver
from workers.sequence import Request
from workers.transport.carrier import CarrierFailed
from workers.transport.message import MalformedMessage, Message
from workers.transport.protocol import Address, Deadline, DeadlineExceeded, Peer
from workers.wire import Kind, WayAddress

ROOM = 2


@dataclass
class Move:
    """An event of a device."""

    board: "Board"
    is_posted: bool = False

    def query(self) -> bool:
        return self.is_posted and not self.board.is_held


@dataclass
class Board:
    """What lies between two devices. While it is held nothing ends; once it is broken nothing works."""

    queue: deque[tuple[list[torch.Tensor], Move]] = field(default_factory=deque)
    is_open: bool = True
    is_held: bool = False
    is_broken: bool = False
    room: int = ROOM
    pushed: int = 0
    skipped: int = 0


class Way:
    """As `PageWay`."""

    def __init__(self, board: Board, cache: PageCache, epoch: int = 1) -> None:
        self._board, self._cache = board, cache
        self._under_way: list[Move] = []
        self.address = WayAddress(Address("board"), epoch)
        self.failure = ""
        self.num_settled = 0

    @property
    def is_open(self) -> bool:
        return self._board.is_open

    @property
    def is_opening(self) -> bool:
        return not self.is_open and not self.failure

    @property
    def has_room(self) -> bool:
        self._under_way = [move for move in self._under_way if not move.query()]
        return self.is_open and len(self._under_way) < self._board.room

    def check(self) -> None:
        if self._board.is_broken or self.failure:
            raise CarrierFailed("peer", self.failure or "it is broken")

    def close(self, reason: str) -> None:
        self.failure = self.failure or reason

    def settle(self) -> None:
        self.num_settled += 1

    def push(self, layer: int, pages: Sequence[int]) -> Move:
        move = Move(self._board)
        self._under_way.append(move)
        self._board.queue.append(([pool[list(pages)].clone() for pool in self._pools(layer)], move))
        self._board.pushed += 1
        return move

    def expect(self, layer: int, pages: Sequence[int]) -> Move:
        tensors, move = self._board.queue.popleft()
        for pool, tensor in zip(self._pools(layer), tensors, strict=True):
            pool[list(pages)] = tensor
        move.is_posted = True
        return move

    def skip(self, layer: int, num_pages: int) -> None:
        tensors, move = self._board.queue.popleft()
        assert len(tensors[0]) == num_pages
        move.is_posted = True
        self._board.skipped += 1

    def _pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        pages = self._cache.layers[layer]
        return pages.latents, pages.index_keys


class PageWays:
    """As `page_ways.PageWays`."""

    def __init__(self, board: Board, cache: PageCache) -> None:
        self._board, self._cache = board, cache
        self._ways: dict[str, Way] = {}

    def open_for(self, peer: str) -> Way:
        if peer not in self._ways or self._ways[peer].failure:
            self._ways[peer] = Way(self._board, self._cache)
        return self._ways[peer]

    def join(self, peer: str, where: WayAddress) -> Way:
        assert where.address == Address("board")
        return self.open_for(peer)

    def of(self, peer: str) -> Way:
        if peer not in self._ways:
            raise CarrierFailed(peer, "there is no way for pages")
        self._ways[peer].check()
        return self._ways[peer]

    def end(self, peer: str, reason: str) -> None:
        if way := self._ways.pop(peer, None):
            way.close(reason)


class Ways:
    """As `page_ways.Ways`."""

    def __init__(self, board: Board, cache: PageCache) -> None:
        self.out, self.into = PageWays(board, cache), PageWays(board, cache)

    def close(self) -> None:
        pass


@contextmanager
def workers(
    demo: LocalModel,
    board: Board,
    *,
    with_ways: tuple[bool, bool] = (True, True),
    lease_seconds: float = 10.0,
) -> Iterator[tuple[Worker, Worker, Client]]:
    def make(cache: PageCache) -> Ways:
        return Ways(board, cache)

    out, into = (make if has_ways else None for has_ways in with_ways)
    both = {"config": NO_DRAFTS, "lease_seconds": lease_seconds}
    with (
        running(demo, "prefill", "prefill", make_ways=out, **both) as prefill,
        running(demo, "decode", "decode", make_ways=into, **both) as decode,
        client() as reader,
    ):
        reader.meet(prefill, decode)
        yield prefill, decode, reader


def test_answers_are_those_of_one_engine(demo: LocalModel, oracle) -> None:
    board = Board()
    names = ["chat", "code", "lookup_300", "lookup_1000"]
    with workers(demo, board) as (prefill, decode, reader):
        for name in names:
            reader.generate(Request(name, oracle[name].prompt_ids, greedy(6)), prefill, decode)
        answers = reader.answers(*names)
        assert {name: oracle[name].output_ids[:6] for name in names} == answers
        assert all(reader.heard_from[name] == {"prefill", "decode"} for name in names)
    assert board.pushed >= demo.config.num_hidden_layers
    assert not board.queue


def test_what_finds_no_room_follows(demo: LocalModel, oracle) -> None:
    """With more pushes than the way holds, and nothing moving for a while."""
    board = Board(is_held=True)
    prompt = oracle["lookup_1000"]
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", prompt.prompt_ids, greedy(6)), prefill, decode)
        reader.read_until(lambda: "r" in reader.tokens)
        soon(lambda: board.pushed == ROOM)
        assert len(reader.tokens["r"]) == 1
        board.is_held = False
        assert reader.answers("r") == {"r": prompt.output_ids[:6]}


def test_pages_announced_before_the_way_is_open_wait(demo: LocalModel, oracle) -> None:
    board = Board()
    prompt = oracle["lookup_300"]
    with workers(demo, board) as (prefill, decode, reader):
        shut = Board(is_open=False)
        into = decode.worker._receiver._ways
        into._ways["prefill"] = late = Way(board, into._cache)
        late._board = shut
        reader.generate(Request("r", prompt.prompt_ids, greedy(6)), prefill, decode)
        soon(lambda: decode.worker._receiver._announced["prefill"])
        late._board = board
        assert reader.answers("r") == {"r": prompt.output_ids[:6]}


def test_a_way_that_breaks_fails_the_request_and_frees_its_pages(demo: LocalModel, oracle) -> None:
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        soon(lambda: decode.worker._receiver._arrivals and board.pushed == ROOM)
        board.is_broken = True
        assert reader.why_failed("r") == "replica_lost"
        board.is_held = False


def test_pages_that_are_still_written_are_nobody_elses(demo: LocalModel, oracle) -> None:
    """A request that ends while its pages are on their way keeps them until the device is done with them."""
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        receiver = decode.worker._receiver
        soon(lambda: any(arrival.landing for arrival in receiver._arrivals.values()))
        reader.cancel("r", prefill, decode)
        soon(lambda: not receiver._arrivals)
        assert decode.engine.pool.num_free < decode.engine.pool.num_pages
        board.is_held = False
        soon(lambda: decode.engine.pool.num_free == decode.engine.pool.num_pages)


def test_what_comes_after_its_lease_is_taken_and_forgotten(demo: LocalModel, oracle) -> None:
    """Else the next push would be taken for this one."""
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        soon(lambda: any(arrival.landing for arrival in decode.worker._receiver._arrivals.values()))
        reader.cancel("r", decode)
        board.is_held = False
        soon(lambda: board.skipped)
        reader.cancel("r", prefill)
        prompt = oracle["lookup_300"]
        reader.generate(Request("s", prompt.prompt_ids, greedy(6)), prefill, decode)
        assert reader.answers("s") == {"s": prompt.output_ids[:6]}


@pytest.mark.parametrize(("count", "message_bytes"), [(0, 2**23), (-1, 2**23), (10**9, 2**23), (2, 1)])
def test_announcements_of_nonsense_fail_the_request(
    demo: LocalModel, oracle, count: int, message_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of more pages than a push has: the slots of a carrier have no room for them."""
    monkeypatch.setattr("workers.handoff.MESSAGE_BYTES", message_bytes)
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        receiver = decode.worker._receiver
        soon(lambda: any(arrival.landing for arrival in receiver._arrivals.values()))
        (arrival,) = receiver._arrivals.values()
        arrival.landing[0].board.is_held = False
        receiver._announced["prefill"].appendleft(_announcement(arrival.lease + 1, count))
        assert reader.why_failed("r") == "replica_lost"


def test_announcements_have_a_bound(demo: LocalModel) -> None:
    cache = demo.cache(1024)
    ways = PageWays(Board(is_open=False), cache)
    receiver = PageReceiver(None, cache, None, Lease("", 1.0), 1, ways)  # type: ignore[arg-type]
    for _ in range(4 * MOST_PUSHES):
        receiver.announce(Peer("prefill", 1), _announcement(1, 1))
    with pytest.raises(MalformedMessage, match="under way"):
        receiver.announce(Peer("prefill", 1), _announcement(1, 1))


def test_announcements_of_an_older_way_are_passed_over(demo: LocalModel, oracle) -> None:
    """Their pushes never come; whoever waits for one takes the next push for it."""
    board = Board(is_held=True)
    prompt = oracle["lookup_300"]
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", prompt.prompt_ids, greedy(6)), prefill, decode)
        receiver = decode.worker._receiver
        soon(lambda: any(arrival.landing for arrival in receiver._arrivals.values()))
        receiver._announced["prefill"].append(_announcement(77, 1, epoch=9))
        soon(lambda: receiver.num_stray == 1)
        board.is_held = False
        assert reader.answers("r") == {"r": prompt.output_ids[:6]}
    assert board.skipped == 0


def test_pages_of_a_way_that_failed_are_not_completed_by_another(demo: LocalModel, oracle) -> None:
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        receiver, into = decode.worker._receiver, decode.worker._receiver._ways
        soon(lambda: any(arrival.landing for arrival in receiver._arrivals.values()))
        into._ways["prefill"] = Way(board, into._cache, epoch=2)  # as for the next request after a failure
        assert reader.why_failed("r") == "replica_lost"
        board.is_held = False


@pytest.mark.parametrize("with_ways", [(True, False), (False, True)])
def test_workers_with_and_without_ways_do_not_go_together(
    demo: LocalModel, oracle, with_ways: tuple[bool, bool], caplog: pytest.LogCaptureFixture
) -> None:
    with workers(demo, Board(), with_ways=with_ways) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["chat"].prompt_ids, greedy(6)), prefill, decode)
        assert reader.why_failed("r") == "replica_lost"
    assert "another carrier" in caplog.text


def test_a_lease_outlives_the_opening_of_its_way(demo: LocalModel, oracle) -> None:
    board = Board(is_open=False)
    prompt = oracle["chat"]
    with workers(demo, board, lease_seconds=0.3) as (prefill, decode, reader):
        reader.generate(Request("r", prompt.prompt_ids, greedy(6)), prefill, decode)
        reader.read_until(lambda: "r" in reader.tokens)
        soon(lambda: any(handoff.way for handoff in prefill.worker._sender._handoffs.values()))
        time.sleep(0.9)
        assert not prefill.worker._sender.is_busy  # nobody spins for so long
        board.is_open = True
        assert reader.answers("r") == {"r": prompt.output_ids[:6]}


def test_a_push_that_is_not_announced_ends_its_way(
    demo: LocalModel, oracle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next would be taken for it, and another request's pages be read as this one's."""
    board = Board()
    with workers(demo, board) as (prefill, decode, reader):
        send, closed = prefill.endpoint.send, list[str]()

        def refuse(peer: str, message: Message, deadline: Deadline) -> None:
            if message.kind == Kind.PUSHED:
                raise DeadlineExceeded("sending")
            send(peer, message, deadline)

        monkeypatch.setattr(prefill.endpoint, "send", refuse)
        monkeypatch.setattr(Way, "close", lambda way, reason: closed.append(reason))
        reader.generate(Request("r", oracle["chat"].prompt_ids, greedy(6)), prefill, decode)
        assert reader.why_failed("r") == "replica_lost"
        assert "a push was not announced" in closed
        assert not prefill.worker._sender._ways._ways  # nor does it stay for a worker that was given up
        assert board.pushed == 1


def test_pages_are_read_before_they_are_somebody_elses(demo: LocalModel, oracle) -> None:
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        soon(lambda: board.pushed == ROOM)
        way = prefill.worker._sender._ways.of("decode")
        assert way.num_settled == 0
        reader.cancel("r", prefill, decode)
        soon(lambda: way.num_settled == 1)
        board.is_held = False


def test_a_bad_hand_over_takes_no_other_with_it(demo: LocalModel, oracle) -> None:
    """Of several that land at once, the first goes on and its client hears of it."""
    board = Board(is_held=True, room=1000)
    first, second = oracle["chat"], oracle["code"]
    with workers(demo, board) as (prefill, decode, reader):
        arrivals = decode.worker._receiver._arrivals
        reader.generate(Request("first", first.prompt_ids, greedy(6)), prefill, decode)
        reader.generate(Request("second", second.prompt_ids, greedy(6)), prefill, decode)
        soon(lambda: len(arrivals) == 2 and all(arrival.handed for arrival in arrivals.values()))
        list(arrivals.values())[1].arrived[0] -= 1
        board.is_held = False
        assert reader.why_failed("second") == "replica_lost"
        assert reader.answers("first") == {"first": first.output_ids[:6]}


def _announcement(lease: int, count: int, epoch: int = 1) -> Message:
    return Message(Kind.PUSHED, (torch.tensor([count]),), epoch=epoch, sequence=lease)

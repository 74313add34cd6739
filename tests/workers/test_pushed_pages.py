"""Sequences whose pages move by ways of their own. GPUs, and what joins them, are played by a board."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch

from model.pages import PageCache
from tests.workers.handoffs import NO_DRAFTS, greedy
from tests.workers.workers import Client, Worker, client, running, soon
from workers.local import LocalModel
from workers.sequence import Request
from workers.transport.carrier import CarrierFailed
from workers.transport.protocol import Address
from workers.wire import WayAddress

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
    pushed: int = 0
    skipped: int = 0


class Way:
    """As `PageWay`."""

    def __init__(self, board: Board, cache: PageCache) -> None:
        self._board, self._cache = board, cache
        self._under_way: list[Move] = []

    @property
    def is_open(self) -> bool:
        return self._board.is_open

    @property
    def has_room(self) -> bool:
        self._under_way = [move for move in self._under_way if not move.query()]
        return self.is_open and len(self._under_way) < ROOM

    def check(self) -> None:
        if self._board.is_broken:
            raise CarrierFailed("peer", "it is broken")

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

    def open_for(self, peer: str) -> WayAddress:
        self._ways[peer] = self._ways.get(peer) or Way(self._board, self._cache)
        return WayAddress(Address("board"), 1)

    def join(self, peer: str, where: WayAddress) -> None:
        assert where == WayAddress(Address("board"), 1)
        self.open_for(peer)

    def of(self, peer: str) -> Way:
        if peer not in self._ways:
            raise CarrierFailed(peer, "there is no way for pages")
        self._ways[peer].check()
        return self._ways[peer]

    def end(self, peer: str, reason: str) -> None:
        self._ways.pop(peer, None)


class Ways:
    """As `page_ways.Ways`."""

    def __init__(self, board: Board, cache: PageCache) -> None:
        self.out, self.into = PageWays(board, cache), PageWays(board, cache)

    def close(self) -> None:
        pass


@contextmanager
def workers(demo: LocalModel, board: Board) -> Iterator[tuple[Worker, Worker, Client]]:
    def make(cache: PageCache) -> Ways:
        return Ways(board, cache)

    with (
        running(demo, "prefill", "prefill", config=NO_DRAFTS, make_ways=make) as prefill,
        running(demo, "decode", "decode", config=NO_DRAFTS, make_ways=make) as decode,
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


@pytest.mark.parametrize("count", [0, 10**9])
def test_announcements_of_nonsense_fail_the_request(demo: LocalModel, oracle, count: int) -> None:
    board = Board(is_held=True)
    with workers(demo, board) as (prefill, decode, reader):
        reader.generate(Request("r", oracle["lookup_1000"].prompt_ids, greedy(6)), prefill, decode)
        receiver = decode.worker._receiver
        soon(lambda: any(arrival.landing for arrival in receiver._arrivals.values()))
        (arrival,) = receiver._arrivals.values()
        arrival.landing[0].board.is_held = False
        receiver._announced["prefill"].appendleft(_announcement(arrival.lease, count))
        assert reader.why_failed("r") == "replica_lost"


def _announcement(lease: int, count: int):  # type: ignore[no-untyped-def]
    from workers.transport.message import Message
    from workers.wire import Kind

    return Message(Kind.PUSHED, (torch.tensor([count]),), sequence=lease)

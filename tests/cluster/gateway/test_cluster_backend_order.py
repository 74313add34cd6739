"""The order in which a stream of the cluster's backend gives out its tokens."""

from typing import Any

from cluster.gateway.cluster_backend import ClusterStream
from tests.cluster.gateway.backends import greedy
from workers.sequence import Request, Token


def a_stream(decode: str | None = "decode") -> ClusterStream:
    request = Request("r", (1, 2, 3), greedy())
    return ClusterStream(request, "prefill", decode, lambda uid: None)


def token(position: int, reason: Any = None) -> Token:
    return Token("r", 10 * position, position, reason)


def queued(stream: ClusterStream) -> list[int]:
    out = []
    while not stream.queue.empty():
        item = stream.queue.get_nowait()
        assert isinstance(item, Token)
        out.append(item.position)
    return out


def test_tokens_are_put_back_in_order() -> None:
    stream = a_stream()
    assert not stream.push(token(4), "decode")
    assert not stream.push(token(5, "stop"), "decode")
    assert queued(stream) == []
    assert stream.push(token(3), "prefill")
    assert queued(stream) == [3, 4, 5]


def test_what_came_before_does_not_come_again() -> None:
    stream = a_stream()
    for position in (3, 4, 3, 4):
        assert not stream.push(token(position), "decode")
    assert queued(stream) == [3, 4]
    assert stream.needs == {"decode"}
    assert stream.push(token(5, "length"), "decode")
    assert queued(stream) == [5]


def test_a_stream_needs_its_first_worker_until_it_has_its_token() -> None:
    stream = a_stream()
    assert stream.needs == {"prefill", "decode"}
    stream.push(token(4), "decode")
    assert stream.needs == {"prefill", "decode"}  # the first token may be lost with the worker
    stream.push(token(3), "prefill")
    assert stream.needs == {"decode"}
    stream = a_stream()
    stream.push(token(3), "prefill")
    assert stream.needs == {"prefill", "decode"}  # not handed over yet
    assert a_stream(None).needs == {"prefill"}

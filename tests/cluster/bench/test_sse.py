"""Events are the same however the bytes are cut."""

import pytest

from cluster.bench.sse import EventReader

STREAM = (
    b": keep-alive\n\n"
    b'data: {"a": 1}\n\n'
    b"event: message\r\ndata: two\r\ndata: lines\r\n\r\n"
    b"data:no space\r\r"
    b"id: 7\n\n"
    b"data: h\xc3\xa4\n\n"
    b"data: [DONE]\n\n"
)
EVENTS = [b'{"a": 1}', b"two\nlines", b"no space", "hä".encode(), b"[DONE]"]


def read(pieces: list[bytes]) -> list[bytes]:
    reader = EventReader()
    return [event for piece in pieces for event in reader.feed(piece)]


def test_a_stream_in_one_piece() -> None:
    assert read([STREAM]) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 11])
def test_a_stream_in_small_pieces(size: int) -> None:
    assert read([STREAM[start : start + size] for start in range(0, len(STREAM), size)]) == EVENTS


@pytest.mark.parametrize("cut", range(len(STREAM)))
def test_a_stream_cut_anywhere(cut: int) -> None:
    assert read([STREAM[:cut], b"", STREAM[cut:]]) == EVENTS


def test_an_event_without_its_end_is_not_given() -> None:
    assert read([b"data: half"]) == []
    assert read([b"data: half\n"]) == []

"""The HTTP client against a scripted server: what is read, and every kind of failure."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from cluster.bench.prompts import TokenCost
from cluster.bench.reading import Api, Asking, Failed, Message, Reading
from cluster.bench.target import open_client, token_cost
from model.errors import RequestError
from tests.cluster.bench.servers import HEAD, USAGE, Answering, Scripted, scripted, words


def asking(api: Api = "chat", ignore_eos: bool = True, key: str | None = None) -> Asking:
    return Asking(api=api, temperature=0.0, ignore_eos=ignore_eos, key=key)


def ask(url: str, how: Asking | None = None, times: int = 1) -> list[Reading]:
    """Asks one after the other with one client."""

    async def work() -> list[Reading]:
        readings = [Reading() for _ in range(times)]
        async with aclosing(open_client(url, how or asking())) as client:
            for reading in readings:
                await client.ask("scripted", [Message("user", "hello")], 3, reading)
        return readings

    return asyncio.run(work())


def failure(script: Callable[[dict[str, Any], Answering], Awaitable[None]]) -> Failed:
    with scripted(script) as server, pytest.raises(Failed) as caught:
        ask(server.url)
    return caught.value


def test_a_whole_answer_is_read_with_its_counts() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await words(answering, 3)

    with scripted(script) as server:
        first, second = ask(server.url, times=2)
        assert server.connections == 1  # kept for the second
    assert first.texts == [" w0", " w1", " w2"]
    assert (first.prompt_tokens, first.cached_tokens, first.answer_tokens) == (30, 10, 3)
    assert list(first.moments) == sorted(first.moments)
    assert first.ended is not None
    assert first.ended >= first.moments[-1]
    assert server.bodies[0] == {
        "model": "scripted",
        "max_tokens": 3,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "messages": [{"role": "user", "content": "hello"}],
    }
    assert second.texts == first.texts


def test_completions_take_a_text_and_ignore_eos_may_be_left_out() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.event({"choices": [{"index": 0, "text": "hm", "finish_reason": None}]})
        await answering.event({"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]})
        await answering.event("[DONE]")
        await answering.raw(b"0\r\n\r\n")

    with scripted(script) as server:
        (reading,) = ask(server.url + "/v1/", asking("completions", ignore_eos=False))
    assert reading.texts == ["hm"]
    assert reading.answer_tokens is None
    assert server.bodies[0]["prompt"] == "hello"
    assert "ignore_eos" not in server.bodies[0]


def test_an_event_without_text_is_no_first_token() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await answering.chunk(b": keep-alive\n\n")
        await asyncio.sleep(0.2)
        await answering.event({"choices": [{"index": 0, "delta": {"reasoning_content": "so"}}]})
        await answering.event(
            {"choices": [{"index": 0, "delta": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}
        )
        await answering.finish()

    with scripted(script) as server:
        sent = time.perf_counter()
        (reading,) = ask(server.url)
    assert reading.texts == ["so", "{}"]
    assert reading.moments[0] - sent > 0.19


def test_events_may_be_cut_across_chunks() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        data = 'data: {"choices": [{"index": 0, "delta": {"content": "bä"}}]}\n\ndata: [DONE]\n\n'.encode()
        for start in range(0, len(data), 5):
            await answering.chunk(data[start : start + 5])
            await asyncio.sleep(0)
        await answering.raw(b"0\r\n\r\n")

    with scripted(script) as server:
        (reading,) = ask(server.url)
    assert reading.texts == ["bä"]


@pytest.mark.parametrize("status", [400, 401, 429, 500, 503])
def test_a_refusal_is_counted_by_its_status_with_the_words_of_the_server(status: int) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.refuse(status, "not now")

    failed = failure(script)
    assert (failed.kind, failed.detail, failed.retry_after) == (f"http {status}", "not now", None)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        (b"Retry-After: 7\r\n", 7.0),
        (b"retry-after: 0\r\n", 0.0),
        (b"Retry-After: Wed, 21 Oct 2026 07:28:00 GMT\r\n", None),
    ],
)
def test_a_refusal_may_say_when_to_come_again(headers: bytes, seconds: float | None) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.refuse(503, "full", headers)

    assert failure(script).retry_after == seconds


def test_nobody_there_is_a_connection_error() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(Failed) as caught:
            ask(f"http://127.0.0.1:{free.getsockname()[1]}")
    assert caught.value.kind == "connection"


def test_a_connection_closed_without_an_answer_is_a_connection_error() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        answering.cut()

    assert failure(script).kind == "connection"


def test_a_stream_that_breaks_off_is_truncated() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.text("half")
        answering.cut()

    assert failure(script).kind == "truncated"


def test_a_stream_without_done_is_truncated() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.text("half")
        await answering.raw(b"0\r\n\r\n")

    assert failure(script).kind == "truncated"


def test_an_error_within_the_stream_is_its_own_kind() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.text("half")
        await answering.event({"error": {"message": "a worker is gone"}})
        answering.cut()

    failed = failure(script)
    assert (failed.kind, failed.detail) == ("stream error", "a worker is gone")


@pytest.mark.parametrize("data", ["data: {not json}\n\n", "data: [1]\n\n", 'data: {"choices": [3]}\n\n'])
def test_events_that_are_none_of_the_api_are_malformed(data: str) -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.chunk(data.encode())
        await answering.finish()

    assert failure(script).kind == "malformed"


def test_what_is_no_http_is_malformed() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        await asyncio.sleep(0.1)
        answering.cut()

    assert failure(script).kind == "malformed"


def test_a_key_goes_along() -> None:
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        body = b'{"data": [{"id": "mine"}]}'
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        writer.close()

    async def work() -> str:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, aclosing(open_client(url, asking(key="sesame"))) as client:
            return await client.model()

    assert asyncio.run(work()) == "mine"
    assert "authorization: bearer sesame" in heads[0]


def test_two_probes_tell_what_words_cost() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        count = len(body["messages"][0]["content"].split())
        await answering.raw(HEAD)
        await answering.text("x")
        await answering.finish(USAGE | {"prompt_tokens": 7 + 2 * count})

    async def cost(server: Scripted) -> TokenCost | None:
        async with aclosing(open_client(server.url, asking())) as client:
            assert await client.model() == "scripted"
            return await token_cost(client, "scripted", seed=0)

    with scripted(script) as server:
        assert asyncio.run(cost(server)) == TokenCost(2.0, 7.0)


def test_a_server_that_counts_nothing_is_known_as_such() -> None:
    async def script(body: dict[str, Any], answering: Answering) -> None:
        await answering.raw(HEAD)
        await answering.text("x")
        await answering.finish(usage=None)

    async def cost(server: Scripted) -> TokenCost | None:
        async with aclosing(open_client(server.url, asking())) as client:
            return await token_cost(client, "scripted", seed=0)

    with scripted(script) as server:
        assert asyncio.run(cost(server)) is None


@pytest.mark.parametrize(
    "url", ["127.0.0.1:80", "ftp://x", "http://", "http://x:port", "grpc://", "grpc://x/y"]
)
def test_what_is_no_url_is_refused(url: str) -> None:
    async def work() -> None:
        open_client(url, asking())

    with pytest.raises(RequestError, match="URL"):
        asyncio.run(work())

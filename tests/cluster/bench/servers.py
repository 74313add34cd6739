"""A scripted HTTP server on a real socket: each request is answered byte by byte as a test says."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Script = Callable[[dict[str, Any], "Answering"], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
USAGE = {"prompt_tokens": 30, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 10}}


@dataclass
class Answering:
    """One exchange, from the server's side."""

    writer: asyncio.StreamWriter
    is_open: bool = True

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def chunk(self, data: bytes) -> None:
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data))

    async def event(self, value: object) -> None:
        text = value if isinstance(value, str) else json.dumps(value)
        await self.chunk(f"data: {text}\n\n".encode())

    async def text(self, text: str) -> None:
        await self.event({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]})

    async def finish(self, usage: object = USAGE) -> None:
        await self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if usage:
            await self.event({"choices": [], "usage": usage})
        await self.event("[DONE]")
        await self.raw(b"0\r\n\r\n")

    async def refuse(self, status: int, message: str, headers: bytes = b"") -> None:
        body = json.dumps({"error": {"message": message}}).encode()
        head = b"HTTP/1.1 %d Told\r\nContent-Length: %d\r\n%s\r\n" % (status, len(body), headers)
        await self.raw(head + body)

    def cut(self) -> None:
        self.is_open = False


async def words(answering: Answering, count: int, pause: float = 0.0) -> None:
    """A whole answer of `count` events."""
    await answering.raw(HEAD)
    for index in range(count):
        await asyncio.sleep(pause)
        await answering.text(f" w{index}")
    await answering.finish(USAGE | {"completion_tokens": count})


@dataclass
class Scripted:
    """What a test knows of the server. `bodies` are of the requests, `connections` those ever made."""

    port: int = 0
    connections: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def scripted(script: Script) -> Iterator[Scripted]:
    """A server in a thread that runs the script for each POST; GETs are answered with a list of one model."""
    found, is_up, loop = Scripted(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found.connections += 1
        answering = Answering(writer)
        try:
            while answering.is_open and (head := await reader.readuntil(b"\r\n\r\n")):
                if head.startswith(b"GET /v1/models"):
                    body = b'{"data": [{"id": "scripted"}]}'
                    await answering.raw(
                        b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                    )
                elif head.startswith(b"GET"):
                    await answering.refuse(404, "nothing here")
                else:
                    length = next(
                        int(line.split(b":")[1])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length")
                    )
                    body = json.loads(await reader.readexactly(length))
                    found.bodies.append(body)
                    await script(body, answering)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def life() -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        found.port = server.sockets[0].getsockname()[1]
        is_up.set()
        await stop.wait()
        server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    thread = threading.Thread(target=lambda: loop.run_until_complete(life()))
    thread.start()
    try:
        assert is_up.wait(10)
        yield found
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

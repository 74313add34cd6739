"""HTTP/1.1 to one server: connections that are kept, and their bytes through h11."""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import SplitResult, urlsplit

import h11

from cluster.bench.reading import Failed
from model.errors import RequestError

_READ_BYTES = 1 << 16
_IDLE_SECONDS = 2.0  # servers close idle connections after 5 s and more; a request must not meet that
_BODY_BYTES = 1 << 22  # of an answer that is no stream

Headers = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Site:
    """Where a server is. `prefix` comes before every path."""

    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None

    @classmethod
    def parse(cls, url: str) -> "Site":
        """From a URL; a `/v1` at its end is left out.

        Raises:
            RequestError: it is no such URL.
        """
        parts = _split(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise RequestError("URL", f"is {url!r}; it begins with http:// or https://")
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, parts.port or (443 if tls else 80), prefix, tls)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError as error:
        raise RequestError("URL", f"is {url!r}: {error}") from None
    return parts


class Connection:
    """One connection, one exchange at a time."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._state = h11.Connection(h11.CLIENT)
        self.idle_since = 0.0
        self.retry_after: float | None = None  # of the answer that is read
        self.has_ended = False  # by the server, in the middle of an exchange

    async def send(self, request: h11.Request, body: bytes) -> int:
        """Sends a request and waits for the head of its answer; returns the status."""
        out = [
            self._state.send(request),
            self._state.send(h11.Data(body)),
            self._state.send(h11.EndOfMessage()),
        ]
        self._writer.write(b"".join(part for part in out if part))
        await self._writer.drain()
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                self.retry_after = _seconds(dict(event.headers).get(b"retry-after"))
                return event.status_code

    async def body(self) -> AsyncIterator[bytes]:
        """The answer's bytes as they come."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            if isinstance(event, h11.Data):
                yield bytes(event.data)

    async def _next(self) -> h11.Event:
        while (event := self._state.next_event()) is h11.NEED_DATA:
            data = await self._reader.read(_READ_BYTES)
            self.has_ended = not data
            self._state.receive_data(data)
        assert isinstance(event, h11.Event), "nothing is sent before the answer has ended"
        return event

    def reuse(self) -> bool:
        """Readies it for another exchange; False where that cannot be."""
        if self._state.our_state is not h11.DONE or self._state.their_state is not h11.DONE:
            return False
        self._state.start_next_cycle()
        self.idle_since = time.perf_counter()
        return True

    @property
    def is_stale(self) -> bool:
        return self._reader.at_eof() or time.perf_counter() - self.idle_since > _IDLE_SECONDS

    def close(self) -> None:
        self._writer.close()


def _seconds(value: bytes | None) -> float | None:
    """Of a Retry-After; None where it is missing, or a date."""
    return float(value) if value is not None and value.isdigit() else None


class ConnectionPool:
    """Connections to one site; as many as there are exchanges at once.

    Args:
        site: whose.
        key: sent as a bearer token where it is not None.
    """

    def __init__(self, site: Site, key: str | None) -> None:
        self._site = site
        host = f"[{site.host}]" if ":" in site.host else site.host
        self._headers = [("Host", f"{host}:{site.port}"), ("Accept", "*/*")]
        if key is not None:
            self._headers.append(("Authorization", f"Bearer {key}"))
        self._idle: deque[Connection] = deque()

    @asynccontextmanager
    async def exchange(
        self, method: str, path: str, body: bytes = b""
    ) -> AsyncIterator[tuple[int, Connection]]:
        """Sends a request; gives the status and a connection to read the answer from.

        Raises:
            Failed: `connection`, where no answer begins; `truncated`, where it breaks off; `malformed`.
        """
        headers = [*self._headers]
        if body:
            headers += [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
        request = h11.Request(method=method, target=f"{self._site.prefix}{path}", headers=headers)
        connection, has_begun = None, False
        try:
            connection = self._take_idle() or await self._connect()
            status = await connection.send(request, body)
            has_begun = True
            yield status, connection
            if connection.reuse():
                self._idle.append(connection)
                connection = None
        except OSError as error:
            raise Failed(
                "truncated" if has_begun else "connection", str(error) or type(error).__name__
            ) from None
        except h11.RemoteProtocolError as error:
            # h11 says the same of an end that comes too early and of bytes that are no HTTP.
            broke_off = connection is not None and connection.has_ended
            kind = "malformed" if not broke_off else "truncated" if has_begun else "connection"
            raise Failed(kind, str(error)) from None
        finally:
            if connection is not None:
                connection.close()

    async def get(self, path: str) -> tuple[int, bytes]:
        """A small answer as a whole: status and body.

        Raises:
            Failed: as `exchange`; `malformed` too where the answer does not end.
        """
        async with self.exchange("GET", path) as (status, connection):
            return status, await whole(connection)

    def _take_idle(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_stale:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        streams = await asyncio.open_connection(
            self._site.host, self._site.port, ssl=self._site.tls, limit=_READ_BYTES
        )
        return Connection(*streams)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()
        self._idle.clear()


async def whole(connection: Connection) -> bytes:
    """All of an answer that is no stream.

    Raises:
        Failed: it does not come to an end.
    """
    parts, size = [], 0
    async for data in connection.body():
        parts.append(data)
        size += len(data)
        if size > _BODY_BYTES:
            raise Failed("malformed", f"an answer of more than {_BODY_BYTES} bytes")
    return b"".join(parts)

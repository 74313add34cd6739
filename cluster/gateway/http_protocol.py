"""HTTP/1.1 on the wire: uvicorn's own, with a time limit for headers, a bound on connections, and refusals
of what is no HTTP in the same shape as all others."""

import asyncio
import json
import sys
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.gateway.errors import Kind, Overloaded, Refusal
from cluster.gateway.http_guard import HttpLimits, new_request_id


def protocol_class(limits: HttpLimits) -> type[asyncio.Protocol]:
    """A protocol class with these limits; uvicorn makes its instances."""

    class Protocol(GuardedProtocol):
        pass

    Protocol.limits = limits
    return Protocol


class GuardedProtocol(H11Protocol):
    """One connection."""

    limits: HttpLimits
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._refuse(Overloaded("too many connections are open"))
        else:
            self._arm()

    def data_received(self, data: bytes) -> None:
        if self._timer is None and not self._has_request:
            self._arm()
        super().data_received(data)
        if self._has_request:
            self._disarm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        problem = sys.exc_info()[1]
        if isinstance(problem, h11.RemoteProtocolError) and problem.error_status_hint == 431:
            self._refuse(
                Refusal(Kind.HEADERS, f"the headers are larger than {self.limits.header_bytes} bytes")
            )
        else:
            self._refuse(Refusal(Kind.BAD_HTTP, "this is not HTTP/1.1 as it should be"))

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _disarm(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._has_request:
            self._refuse(Refusal(Kind.SLOW_BODY, "the headers did not arrive in time"))

    def _refuse(self, refusal: Refusal) -> None:
        """Answers without the application, and closes."""
        body = json.dumps(refusal.body()).encode()
        headers: list[Any] = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", new_request_id().encode()),
        ]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(refusal.retry_after))).encode()))
        events = (
            h11.Response(status_code=refusal.row.http, headers=headers),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        try:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # an answer was on its way already
            pass
        self.transport.close()

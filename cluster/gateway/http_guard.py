"""What stands before every HTTP route: request ids, keys, sizes of headers and bodies, time limits.

Plain ASGI. A request passes only if nothing here refuses it, so a new route is closed unless it is listed
among `OPEN_PATHS`.
"""

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.gateway.auth import ApiKeys
from cluster.gateway.errors import Kind, Refusal, as_refusal
from cluster.gateway.metrics import Metrics

OPEN_PATHS = frozenset({"/healthz", "/readyz"})

# How much of a body that is too large is read for the sake of a proper answer, and for how long.
_MAX_DISCARDED = 16 * 2**20
_DISCARD_SECONDS = 2.0

_log = logging.getLogger(__name__)
_CLIENT_ID = re.compile(rb"[\x21-\x7e]{1,512}")


@dataclass(frozen=True)
class HttpLimits:
    """How large and how slow a request may be."""

    body_bytes: int = 4 * 2**20
    header_bytes: int = 32 * 2**10
    header_seconds: float = 10.0
    body_seconds: float = 30.0
    send_seconds: float = 30.0
    keep_alive_seconds: float = 15.0
    connections: int = 1000


class Guard:
    """The outermost layer of the application."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, limits: HttpLimits, metrics: Metrics) -> None:
        self._app, self._keys, self._limits, self._metrics = app, keys, limits, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing else is served
            return
        exchange = Exchange(scope, send, self._limits.send_seconds)
        try:
            scope["state"]["tenant"] = self._check(scope)
            await self._app(scope, receive, exchange.send)
        except Exception as error:
            refusal = as_refusal(error)
            if refusal.kind is Kind.INTERNAL:
                _log.exception("request %s failed", exchange.request_id)
            self._metrics.requests.labels("http", refusal.row.code).inc()
            await exchange.refuse(refusal)

    def _check(self, scope: Scope) -> str:
        """Refuses what may not come in; returns whose request it is."""
        headers: Sequence[tuple[bytes, bytes]] = scope["headers"]
        if sum(len(name) + len(value) + 4 for name, value in headers) > self._limits.header_bytes:
            raise Refusal(Kind.HEADERS, f"the headers are larger than {self._limits.header_bytes} bytes")
        given = [value for name, value in headers if name == b"authorization"]
        tenant = self._keys.tenant(given[0].decode("latin-1") if len(given) == 1 else None)
        if tenant is None and scope["path"] not in OPEN_PATHS:
            raise Refusal(Kind.NO_KEY, "send a valid API key as Authorization: Bearer KEY")
        return tenant or ""


class Exchange:
    """One request and its response: adds the ids to the head, and gives up on clients that do not read."""

    def __init__(self, scope: Scope, send: Send, send_seconds: float) -> None:
        self.request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = self.request_id
        self._send, self._send_seconds = send, send_seconds
        self._has_begun = False
        self._extra = [(b"x-request-id", self.request_id.encode())]
        for name, value in scope["headers"]:
            if name == b"x-client-request-id" and _CLIENT_ID.fullmatch(value):
                self._extra.append((b"x-client-request-id", value))

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._has_begun = True
            message = {**message, "headers": [*message.get("headers", ()), *self._extra]}
        async with asyncio.timeout(self._send_seconds):
            await self._send(message)

    async def refuse(self, refusal: Refusal) -> None:
        """Answers with an error; behind an answer that has begun, the connection is left to be cut."""
        if self._has_begun:
            return
        body = json.dumps(refusal.body(), ensure_ascii=False).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        if refusal.retry_after is not None:
            headers.append((b"retry-after", str(max(1, round(refusal.retry_after))).encode()))
        if refusal.kind is Kind.NO_KEY:
            headers.append((b"www-authenticate", b"Bearer"))
        if isinstance(refusal, WrongMethod):
            headers.append((b"allow", refusal.allowed.encode()))
        if refusal.kind in (Kind.TOO_LARGE, Kind.SLOW_BODY):
            headers.append((b"connection", b"close"))  # the rest of the body is not read
        await self.send({"type": "http.response.start", "status": refusal.row.http, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


async def read_body(scope: Scope, receive: Receive, limits: HttpLimits) -> bytes:
    """The body of a request that holds JSON.

    Raises:
        Refusal: it is too large, too slow or no plain JSON.
    """
    headers = dict[bytes, bytes](scope["headers"])
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if kind != b"application/json":
        # Browsers send other types across origins without asking first.
        raise Refusal(Kind.MEDIA_TYPE, "send Content-Type: application/json")
    if headers.get(b"content-encoding", b"identity").lower() != b"identity":
        raise Refusal(Kind.MEDIA_TYPE, "send the body without a Content-Encoding")
    too_large = Refusal(Kind.TOO_LARGE, f"the body is larger than {limits.body_bytes} bytes")
    length = headers.get(b"content-length", b"0")
    is_announced = length.isdigit() and int(length[:20]) > limits.body_bytes
    if is_announced and b"expect" in headers:
        raise too_large
    try:
        async with asyncio.timeout(limits.body_seconds):
            body = bytearray()
            while True:
                message: dict[str, Any] = dict(await receive())
                if message["type"] == "http.disconnect":
                    raise ClientGone
                body += message.get("body", b"")
                if is_announced or len(body) > limits.body_bytes:
                    await _discard(message, receive)
                    raise too_large
                if not message.get("more_body"):
                    return bytes(body)
    except TimeoutError:
        problem = f"the body did not arrive within {limits.body_seconds:g} s"
        raise Refusal(Kind.SLOW_BODY, problem) from None


async def _discard(message: dict[str, Any], receive: Receive) -> None:
    """Reads what follows, within bounds: closing on unread bytes would take the answer back on its way."""
    left = _MAX_DISCARDED
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            while message.get("more_body") and left > 0:
                message = dict(await receive())
                left -= len(message.get("body", b""))


def new_request_id() -> str:
    return f"req_{secrets.token_hex(12)}"


class WrongMethod(Refusal):
    """The path exists and takes other methods."""

    def __init__(self, allowed: str) -> None:
        super().__init__(Kind.NO_METHOD, f"this path takes {allowed}")
        self.allowed = allowed

    def __reduce__(self) -> tuple[type["WrongMethod"], tuple[str]]:
        return type(self), (self.allowed,)


class ClientGone(Exception):
    """The client closed its connection; there is nobody to tell."""

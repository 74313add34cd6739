"""The OpenAI-compatible HTTP interface: routes, and answers as JSON or as server-sent events."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from cluster.gateway.answer import Answer, AnswerEvent, Usage
from cluster.gateway.auth import ApiKeys
from cluster.gateway.calls import Call, chat_call, completion_call
from cluster.gateway.core import Gateway
from cluster.gateway.errors import Kind, Overloaded, Refusal, as_refusal
from cluster.gateway.http_guard import ClientGone, Guard, HttpLimits, WrongMethod, read_body
from cluster.gateway.metrics import CONTENT_TYPE
from cluster.gateway.openai_format import ChatFormat, CompletionFormat, Format, Json, usage_json
from cluster.gateway.openapi import PREFIXES, openapi
from cluster.gateway.status import ClusterStatus
from cluster.gateway.strict_json import parse_object
from cluster.gateway.tracing import RequestSpan

# Bodies up to this size are parsed in the event loop: a thread would cost more than they do.
_SMALL_BODY = 64 * 1024

_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

T = TypeVar("T")

_Open = Callable[[Json, str, RequestSpan], Awaitable[tuple[Call, Answer, type[Format]]]]


def http_app(gateway: Gateway, keys: ApiKeys, limits: HttpLimits, version: str) -> ASGIApp:
    """The whole HTTP interface as an ASGI application."""
    description = openapi(gateway, keys, version)
    routes = [
        Route("/healthz", GetRoute(lambda path: JSONResponse({"status": "ok"}))),
        Route("/readyz", GetRoute(lambda path: _ready(gateway))),
        Route("/metrics", GetRoute(lambda path: _metrics(gateway))),
        Route("/status", GetRoute(lambda path: _status(gateway))),
        Route("/version", GetRoute(lambda path: _version(gateway, version))),
        Route("/openapi.json", GetRoute(lambda path: JSONResponse(description))),
    ]
    for prefix in PREFIXES:
        routes += [
            Route(f"{prefix}/models", GetRoute(lambda path: _models(gateway))),
            Route(f"{prefix}/models/{{name:path}}", GetRoute(lambda path: _model(gateway, path["name"]))),
            Route(f"{prefix}/chat/completions", AnswerRoute(gateway, limits, _open_chat(gateway))),
            Route(f"{prefix}/completions", AnswerRoute(gateway, limits, _open_completion(gateway))),
        ]
    # A bare Router: Starlette's own error pages would answer before the guard can.
    return Guard(Router(routes, redirect_slashes=False, default=_nothing_here), keys, limits, gateway.metrics)


def _open_chat(gateway: Gateway) -> _Open:
    async def open_(body: Json, tenant: str, span: RequestSpan) -> tuple[Call, Answer, type[Format]]:
        call = chat_call(body)
        return call, await gateway.chat(call, tenant, span), ChatFormat

    return open_


def _open_completion(gateway: Gateway) -> _Open:
    async def open_(body: Json, tenant: str, span: RequestSpan) -> tuple[Call, Answer, type[Format]]:
        call = completion_call(body)
        return call, await gateway.complete(call, tenant, span), CompletionFormat

    return open_


class AnswerRoute:
    """An endpoint that answers with the model's words. ASGI, because it must notice that a client leaves."""

    def __init__(self, gateway: Gateway, limits: HttpLimits, open_: _Open) -> None:
        self._gateway, self._limits, self._open = gateway, limits, open_

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] != "POST":
            raise WrongMethod("POST")
        path = scope["path"]
        facts = {"http.request.method": "POST", "http.route": path}
        span, outcome = self._gateway.tracing.request(f"POST {path}", scope["headers"], facts), "cancelled"
        try:
            raw = await read_body(scope, receive, self._limits)
            # The client is watched from here on: whatever runs for it ends when it leaves.
            outcome = await _unless_gone(receive, self._answer(raw, scope["state"]["tenant"], span, send))
            self._count(outcome)
        except ClientGone:
            self._count(outcome)
        except Exception as error:  # the guard tells the client
            outcome = as_refusal(error).row.code
            raise
        finally:
            span.end(outcome)

    def _count(self, outcome: str) -> None:
        self._gateway.metrics.requests.labels("http", outcome).inc()

    async def _answer(self, raw: bytes, tenant: str, span: RequestSpan, send: Send) -> str:
        """Answers; returns `ok`, or the code of the error that cut a stream."""
        body = parse_object(raw) if len(raw) <= _SMALL_BODY else await asyncio.to_thread(parse_object, raw)
        call, answer, kind = await self._open(body, tenant, span)
        try:
            form = kind(
                answer, self._gateway.model, self._gateway.fingerprint, self._gateway.backend.facts.tokenizer,
                logprobs=call.params.logprobs is not None, n=call.params.n,
            )  # fmt: skip
            if call.stream:
                return await self._stream(answer, form, call.include_usage, send)
            whole = form.body([event async for event in answer])
            await JSONResponse(whole)({"type": "http"}, _never, send)
            return "ok"
        finally:
            await answer.aclose()

    async def _stream(self, answer: Answer, form: Format, include_usage: bool, send: Send) -> str:
        """Sends events; returns `ok`, or the code of the error that kept the answer from its end.

        Nothing is sent before the first event, or one keep-alive period, so that a refusal that comes early
        can still be a status. A stream that breaks ends with an error event and without its last chunk,
        which makes the server cut the connection: no client can take it for a whole answer.
        """
        event = await self._next(answer)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        try:
            while not isinstance(event, Usage):
                await _send_chunk(
                    send, _chunk_text(form, event, include_usage) if event else ": keep-alive\n\n"
                )
                event = await self._next(answer)
        except Refusal as refusal:
            await _send_chunk(send, _data(refusal.body()))
            return refusal.row.code
        last = _data((form.chunk(event) or {}) | {"usage": usage_json(event)}) if include_usage else ""
        await _send_chunk(send, f"{last}data: [DONE]\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "ok"

    async def _next(self, answer: Answer) -> AnswerEvent | None:
        """The next event; None after a while without one."""
        try:
            async with asyncio.timeout(self._limits.keep_alive_seconds):
                return await anext(answer)
        except TimeoutError:
            return None


def _chunk_text(form: Format, event: AnswerEvent, include_usage: bool) -> str:
    chunk = form.chunk(event)
    if chunk is None:
        return ""
    return _data(chunk | {"usage": None} if include_usage else chunk)


def _data(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def _send_chunk(send: Send, text: str) -> None:
    if text:
        await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Runs `work` to its end, or cancels it as soon as the client closes its connection."""
    working = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return await working
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _never() -> Any:
    raise AssertionError("this response reads nothing")


async def _nothing_here(scope: Scope, receive: Receive, send: Send) -> None:
    raise Refusal(Kind.NO_PATH, "there is nothing at this path")


class GetRoute:
    """An endpoint that only shows something.

    Args:
        show: from the parameters in the path to the response.
    """

    def __init__(self, show: Callable[[Json], Response]) -> None:
        self._show = show

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in ("GET", "HEAD"):
            raise WrongMethod("GET, HEAD")
        await self._show(scope["path_params"])(scope, receive, send)


def _ready(gateway: Gateway) -> Response:
    if not gateway.is_ready:
        raise Overloaded("not ready", retry_after=5.0)
    return JSONResponse({"status": "ready"})


def _metrics(gateway: Gateway) -> Response:
    page = gateway.metrics.page(ClusterStatus.of(gateway))
    return Response(page, headers={"content-type": CONTENT_TYPE})


def _status(gateway: Gateway) -> Response:
    return Response(ClusterStatus.of(gateway).to_json(), headers={"content-type": "application/json"})


def _version(gateway: Gateway, version: str) -> Response:
    digest = gateway.backend.facts.digest
    return JSONResponse({"version": version, "model": gateway.model, "weights_digest": digest})


def _models(gateway: Gateway) -> Response:
    return JSONResponse({"object": "list", "data": [_model_json(gateway)]})


def _model(gateway: Gateway, name: str) -> Response:
    gateway.check_model(name)
    return JSONResponse(_model_json(gateway))


def _model_json(gateway: Gateway) -> Json:
    return {
        "id": gateway.model,
        "object": "model",
        "created": gateway.created,
        "owned_by": "eightfold",
        "context_length": gateway.backend.facts.context,
    }

"""Answers over HTTP: the OpenAI API, streamed."""

import json
from typing import Any

from cluster.bench.http_connection import Connection, ConnectionPool, Site, whole
from cluster.bench.reading import Asking, Failed, Message, Reading, as_text
from cluster.bench.sse import EventReader

Json = dict[str, Any]

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}
_DONE = b"[DONE]"


class HttpClient:
    """A client of one OpenAI-compatible server.

    Args:
        site: where it is.
        asking: what all requests have in common.
    """

    def __init__(self, site: Site, asking: Asking) -> None:
        self._pool = ConnectionPool(site, asking.key)
        self._asking = asking

    async def model(self) -> str:
        status, body = await self._pool.get("/v1/models")
        if status != 200:
            raise Failed(f"http {status}", _told(body))
        try:
            return str(json.loads(body)["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            raise Failed("malformed", "/v1/models names no model") from None

    async def ask(self, model: str, messages: list[Message], max_tokens: int, reading: Reading) -> None:
        body = json.dumps(self._body(model, messages, max_tokens)).encode()
        async with self._pool.exchange("POST", _PATHS[self._asking.api], body) as (status, connection):
            if status != 200:
                raise Failed(f"http {status}", _told(await whole(connection)), connection.retry_after)
            await _read(connection, reading)

    async def aclose(self) -> None:
        self._pool.close()

    def _body(self, model: str, messages: list[Message], max_tokens: int) -> Json:
        body: Json = {
            "model": model,
            "max_tokens": max_tokens,
            "temperature": self._asking.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._asking.ignore_eos:
            body["ignore_eos"] = True
        if self._asking.api == "completions":
            return body | {"prompt": as_text(messages)}
        return body | {"messages": [{"role": said.role, "content": said.content} for said in messages]}


async def _read(connection: Connection, reading: Reading) -> None:
    """Reads the stream to its end.

    Raises:
        Failed: it breaks off, says an error, or is no such stream.
    """
    events, is_done = EventReader(), False
    async for data in connection.body():
        for event in events.feed(data):
            if event == _DONE:
                is_done = True
            elif not is_done:
                _take(event, reading)
    if not is_done:
        raise Failed("truncated", "the stream ended without [DONE]")


def _take(event: bytes, reading: Reading) -> None:
    try:
        chunk = json.loads(event)
        error, choices, usage = chunk.get("error"), chunk.get("choices") or (), chunk.get("usage")
        if error:
            raise Failed(
                "stream error", str(error.get("message", error) if isinstance(error, dict) else error)
            )
        for choice in choices:
            if text := _text(choice):
                reading.add(text)
            elif choice.get("finish_reason"):
                reading.finish()
        if usage:
            _count(usage, reading)
    except (ValueError, AttributeError, TypeError) as problem:
        raise Failed("malformed", f"{problem} in {event[:100]!r}") from None


def _text(choice: Json) -> str:
    """The text of a chunk's choice: content, reasoning, or the arguments of tool calls."""
    if "text" in choice:
        return choice["text"] or ""
    delta = choice.get("delta") or {}
    parts = [delta.get("reasoning_content") or delta.get("reasoning"), delta.get("content")]
    parts += [(call.get("function") or {}).get("arguments") for call in delta.get("tool_calls") or ()]
    return "".join(part for part in parts if part)


def _count(usage: Json, reading: Reading) -> None:
    reading.prompt_tokens = usage.get("prompt_tokens")
    reading.answer_tokens = usage.get("completion_tokens")
    reading.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")


def _told(body: bytes) -> str:
    """The message of a refusal, as far as it is one."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return body[:200].decode(errors="replace")

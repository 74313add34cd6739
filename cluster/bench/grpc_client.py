"""Answers over Eightfold's own gRPC interface."""

from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import grpc

from cluster.bench.reading import Asking, Failed, Message, Reading, as_text
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1.eightfold_pb2_grpc import InferenceServiceStub
from model.errors import RequestError

_RETRY_AFTER = "grpc-retry-pushback-ms"  # what gRPC has in place of Retry-After


class GrpcClient:
    """A client of one gateway.

    Args:
        url: `grpc://host:port`, or `grpcs://` with TLS.
        asking: what all requests have in common.

    Raises:
        RequestError: it is no such URL.
    """

    def __init__(self, url: str, asking: Asking) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("grpc", "grpcs") or not parts.netloc or parts.path.strip("/"):
            raise RequestError("URL", f"is {url!r}; gRPC takes grpc://host:port")
        self._channel = (
            grpc.aio.insecure_channel(parts.netloc)
            if parts.scheme == "grpc"
            else grpc.aio.secure_channel(parts.netloc, grpc.ssl_channel_credentials())
        )
        self._stub = InferenceServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._asking = asking
        self._metadata = [("authorization", f"Bearer {asking.key}")] if asking.key is not None else []

    async def model(self) -> str:
        try:
            models = (await self._stub.Models(pb.ModelsRequest(), metadata=self._metadata)).models
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        if not models:
            raise Failed("malformed", "no model is served")
        return str(models[0].id)

    async def ask(self, model: str, messages: list[Message], max_tokens: int, reading: Reading) -> None:
        call = self._call(model, messages, max_tokens)
        is_whole = False
        try:
            async for event in call:
                is_whole = _take(event, reading) or is_whole
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        if not is_whole:
            raise Failed("truncated", "the stream ended without usage")

    async def aclose(self) -> None:
        await self._channel.close()

    def _call(self, model: str, messages: list[Message], max_tokens: int) -> AsyncIterator[Any]:
        sampling = pb.Sampling(max_tokens=max_tokens, temperature=self._asking.temperature)
        if self._asking.ignore_eos:
            sampling.ignore_eos = True
        if self._asking.api == "completions":
            text = pb.GenerateRequest(model=model, text=as_text(messages), sampling=sampling)
            return self._stub.Generate(text, metadata=self._metadata)  # type: ignore[no-any-return]
        said = [pb.Message(role=message.role, content=message.content) for message in messages]
        chat = pb.ChatRequest(model=model, messages=said, sampling=sampling)
        return self._stub.Chat(chat, metadata=self._metadata)  # type: ignore[no-any-return]


def _take(event: Any, reading: Reading) -> bool:
    """Notes what an event brings; returns whether it is the last of a whole answer."""
    match event.WhichOneof("event"):
        case "delta" if text := _text(event.delta):
            reading.add(text)
        case "finish":
            reading.finish()
        case "usage":
            reading.prompt_tokens = event.usage.prompt_tokens
            reading.cached_tokens = event.usage.cached_tokens
            reading.answer_tokens = event.usage.completion_tokens
            return True
    return False


def _text(delta: Any) -> str:
    if isinstance(delta, pb.TextDelta):
        return delta.text
    return "".join([delta.reasoning_content, delta.content, *(call.arguments for call in delta.tool_calls)])


def _failed(error: grpc.aio.AioRpcError) -> Failed:
    given = dict(error.trailing_metadata() or ()).get(_RETRY_AFTER)
    seconds = int(given) / 1e3 if given is not None and given.isdigit() else None
    return Failed(f"grpc {error.code().name}", error.details() or "", seconds)

"""The gRPC interface: the service, health, reflection, and a key for everything but health."""

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection, reflection_pb2

from cluster.gateway.answer import Answer, AnswerEvent, Delta
from cluster.gateway.auth import ApiKeys
from cluster.gateway.core import Gateway
from cluster.gateway.errors import Kind, Refusal, as_refusal
from cluster.gateway.grpc_errors import abort
from cluster.gateway.grpc_messages import chat_call_of, chat_response, completion_call_of, text_response
from cluster.gateway.tracing import RequestSpan
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from cluster.proto.eightfold.v1 import eightfold_pb2_grpc as pb_grpc

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name
_HEALTH = "/grpc.health.v1.Health/"
_MAX_STREAMS = 200


@dataclass(frozen=True)
class GrpcLimits:
    """How large a message may be, how long one may wait to be read, and how long a TLS handshake may take."""

    message_bytes: int = 4 * 2**20
    metadata_bytes: int = 32 * 2**10
    send_seconds: float = 30.0
    handshake_seconds: float = 10.0


class GrpcServer:
    """A server that has bound its port and serves once started.

    Args:
        address: host and port; port 0 is any free one.
        credentials: of TLS; None is clear text.
    """

    def __init__(
        self,
        gateway: Gateway,
        keys: ApiKeys,
        limits: GrpcLimits,
        address: str,
        credentials: grpc.ServerCredentials | None = None,
    ) -> None:
        self._server = grpc.aio.server(
            interceptors=[KeyInterceptor(keys), ParseInterceptor()],
            options=[
                ("grpc.max_receive_message_length", limits.message_bytes),
                ("grpc.max_metadata_size", limits.metadata_bytes),
                ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
                ("grpc.max_concurrent_streams", _MAX_STREAMS),
                ("grpc.server_handshake_timeout_ms", round(1000 * limits.handshake_seconds)),
                (
                    "grpc.so_reuseport",
                    0,
                ),  # a second server on the port fails instead of taking half the calls
            ],
        )
        self._health = health_aio.HealthServicer()
        servicer = Servicer(gateway, keys, limits)
        pb_grpc.add_InferenceServiceServicer_to_server(servicer, self._server)  # type: ignore[no-untyped-call]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        _add_reflection(self._server)
        if credentials is None:
            self.port: int = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)

    async def start(self) -> None:
        await self._server.start()
        await self.set_ready(True)

    async def set_ready(self, is_ready: bool) -> None:
        """What health says of the service; the server itself ("") is alive as long as it answers."""
        status = (
            health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        )
        await self._health.set(SERVICE, status)

    async def stop(self, grace: float) -> None:
        await self._server.stop(grace)


class KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses every call without a valid key, known method or not, except those of health."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        allowed = handler_call_details.method.startswith(_HEALTH)
        if allowed or tenant_of(self._keys, handler_call_details.invocation_metadata) is not None:
            return await continuation(handler_call_details)
        return grpc.stream_stream_rpc_method_handler(_refuse_key)


class ParseInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses messages that are no protobuf, for which the library blames the server and fills its log."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        behaviour = handler.unary_stream or handler.unary_unary

        def parse(data: bytes) -> Any:
            try:
                return handler.request_deserializer(data)
            except DecodeError as error:
                return error

        async def checked(request: Any, context: grpc.aio.ServicerContext) -> Any:
            if isinstance(request, DecodeError):
                refusal = Refusal(Kind.INVALID_PROTOBUF, "the message is no protobuf of the method's type")
                await abort(context, refusal, _new_id())
            return await behaviour(request, context)

        which = "unary_stream" if handler.response_streaming else "unary_unary"
        return handler._replace(**{"request_deserializer": parse, which: checked})


async def _refuse_key(requests: Any, context: grpc.aio.ServicerContext) -> None:
    refusal = Refusal(Kind.NO_KEY, "send a valid API key as metadata authorization: Bearer KEY")
    await abort(context, refusal, _new_id())


def tenant_of(keys: ApiKeys, metadata: Sequence[tuple[str, Any]] | None) -> str | None:
    """Whose call this is; None where the key is missing or wrong."""
    given = [value for key, value in metadata or () if key == "authorization"]
    return keys.tenant(given[0] if len(given) == 1 else None)


class Servicer:
    """The service's methods."""

    def __init__(self, gateway: Gateway, keys: ApiKeys, limits: GrpcLimits) -> None:
        self._gateway, self._keys, self._limits = gateway, keys, limits

    async def Generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> None:
        """Continues a prompt."""
        with_logprobs = request.sampling.HasField("logprobs")

        async def open_(tenant: str, span: RequestSpan) -> Answer:
            return await self._gateway.complete(completion_call_of(request), tenant, span)

        def response(answer: Answer, event: AnswerEvent) -> pb.GenerateResponse:
            return text_response(f"cmpl-{answer.uid}", event, with_logprobs=with_logprobs)

        await self._stream(context, "Generate", open_, response)

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        """Answers a conversation."""
        with_logprobs = request.sampling.HasField("logprobs")

        async def open_(tenant: str, span: RequestSpan) -> Answer:
            return await self._gateway.chat(chat_call_of(request), tenant, span)

        def response(answer: Answer, event: AnswerEvent) -> pb.ChatResponse:
            return chat_response(f"chatcmpl-{answer.uid}", event, with_logprobs=with_logprobs)

        await self._stream(context, "Chat", open_, response)

    async def Models(self, request: pb.ModelsRequest, context: grpc.aio.ServicerContext) -> pb.ModelsResponse:
        """What is served here."""
        facts = self._gateway.backend.facts
        model = pb.Model(
            id=self._gateway.model,
            weights_digest=facts.digest,
            context_length=facts.context,
            vocab_size=facts.config.vocab_size,
        )
        return pb.ModelsResponse(models=[model])

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """Ids of a text, or text of ids."""
        request_id = _new_id()
        try:
            self._gateway.check_model(request.model)
            tokenizer = self._gateway.backend.facts.tokenizer
            match request.WhichOneof("input"):
                case "text":
                    ids = await asyncio.to_thread(tokenizer.encode, request.text)
                    return pb.TokenizeResponse(token_ids=ids, text=request.text)
                case "token_ids":
                    ids = list(request.token_ids.ids)
                    return pb.TokenizeResponse(token_ids=ids, text=tokenizer.decode(ids, skip_special=False))
            raise Refusal(Kind.MISSING, "is missing: send text or token_ids", "input")
        except Exception as error:
            await self._fail(context, error, request_id, 0)

    async def _stream(
        self,
        context: grpc.aio.ServicerContext,
        method: str,
        open_: Callable[[str, RequestSpan], Awaitable[Answer]],
        response: Callable[[Answer, AnswerEvent], Any],
    ) -> None:
        """Opens an answer and sends its events; the call is accepted with the initial metadata."""
        request_id, delivered = _new_id(), 0
        metadata = context.invocation_metadata() or ()
        facts = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method}
        span, outcome = self._gateway.tracing.request(f"{SERVICE}/{method}", metadata, facts), "cancelled"
        try:
            answer = await open_(tenant_of(self._keys, metadata) or "", span)
            try:
                await context.send_initial_metadata((("x-request-id", request_id),))
                context.set_trailing_metadata((("x-request-id", request_id),))
                async for event in answer:
                    async with asyncio.timeout(self._limits.send_seconds):
                        await context.write(response(answer, event))
                    delivered += len(event.tokens) if isinstance(event, Delta) else 0
            finally:
                await answer.aclose()
            outcome = "ok"
        except Exception as error:
            outcome = as_refusal(error).row.code
            await self._fail(context, error, request_id, delivered)
        finally:
            self._gateway.metrics.requests.labels("grpc", outcome).inc()
            span.end(outcome)

    async def _fail(
        self, context: grpc.aio.ServicerContext, error: Exception, request_id: str, delivered: int
    ) -> NoReturn:
        refusal = as_refusal(error)
        if refusal.kind is Kind.INTERNAL:
            _log.error("request %s failed", request_id, exc_info=error)
        await abort(context, refusal, request_id, delivered)


def _new_id() -> str:
    return f"req_{secrets.token_hex(12)}"


def _add_reflection(server: grpc.aio.Server) -> None:
    """Reflection v1alpha, and v1, whose messages are the same on the wire under another package's name."""
    names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server)
    handler = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    service = "grpc.reflection.v1.ServerReflection"
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler}),)
    )

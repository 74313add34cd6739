"""Refusals as gRPC statuses with the details of google.rpc, and the ids that every response carries."""

from typing import NoReturn

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cluster.gateway.errors import Kind, Refusal

DOMAIN = "eightfold"

_SAMPLING = {
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty",
    "repetition_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos", "seed", "n", "logprobs",
}  # fmt: skip


async def abort(
    context: grpc.aio.ServicerContext, refusal: Refusal, request_id: str, tokens_delivered: int = 0
) -> NoReturn:
    """Ends a call with a refusal."""
    code = grpc.StatusCode[refusal.row.grpc]
    status = Status(code=code.value[0], message=str(refusal))
    for detail in _details(refusal, request_id, tokens_delivered):
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    trailers = [("x-request-id", request_id), ("grpc-status-details-bin", status.SerializeToString())]
    if refusal.retry_after is not None:
        trailers.append(("grpc-retry-pushback-ms", str(round(refusal.retry_after * 1000))))
    await context.abort(code, str(refusal), tuple(trailers))
    raise AssertionError("abort returned")


def field_path(param: str) -> str:
    """The name that a field of the HTTP interface has in our messages."""
    if param == "top_logprobs":
        return "sampling.logprobs"
    if param.startswith("response_format"):
        return "response_schema_json"
    if param.split(".")[0] in _SAMPLING:
        return f"sampling.{param}"
    return param.replace(".function.parameters", ".parameters_json").replace(".function", "")


def _details(refusal: Refusal, request_id: str, tokens_delivered: int) -> list[Message]:
    info = ErrorInfo(reason=refusal.row.code.upper(), domain=DOMAIN)
    if tokens_delivered:
        info.metadata["tokens_delivered"] = str(tokens_delivered)
    details: list[Message] = [info, RequestInfo(request_id=request_id)]
    if refusal.param is not None and refusal.row.http == 400:
        violation = BadRequest.FieldViolation(field=field_path(refusal.param), description=refusal.message)
        details.append(BadRequest(field_violations=[violation]))
    if refusal.retry_after is not None and refusal.kind is not Kind.TIMEOUT:
        delay = Duration(nanos=0)
        delay.FromMilliseconds(round(refusal.retry_after * 1000))
        details.append(RetryInfo(retry_delay=delay))
    return details

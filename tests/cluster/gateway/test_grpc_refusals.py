"""The table of refusals, over gRPC."""

from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo
from google.rpc.status_pb2 import Status

from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from tests.cluster.gateway.serving import Served

BIG = 10**9
INVALID = ("INVALID_ARGUMENT", "INVALID_VALUE")
MISSING = ("INVALID_ARGUMENT", "MISSING_REQUIRED_PARAMETER")
TOO_LONG = ("INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")
NO_MODEL = ("NOT_FOUND", "MODEL_NOT_FOUND")
USER = [pb.Message(role="user", content="hi")]


def chat(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(**{"model": "demo", "messages": USER, **fields})


def drawn(**sampling: Any) -> pb.ChatRequest:
    return chat(sampling=pb.Sampling(**sampling))


def continued(ids: list[int]) -> pb.GenerateRequest:
    return pb.GenerateRequest(model="demo", token_ids=pb.TokenIds(ids=ids))


@pytest.mark.parametrize(
    ("request_", "expected", "field"),
    [
        (drawn(temperature=3), INVALID, "sampling.temperature"),
        (drawn(temperature=float("nan")), INVALID, "sampling.temperature"),
        (drawn(n=BIG), INVALID, "sampling.n"),
        (drawn(max_tokens=0), INVALID, "sampling.max_tokens"),
        (drawn(max_tokens=BIG), TOO_LONG, "sampling.max_tokens"),
        (drawn(logprobs=99), INVALID, "sampling.logprobs"),
        (drawn(stop=["x"] * 99), INVALID, "sampling.stop"),
        (drawn(stop_token_ids=[9000]), INVALID, "sampling.stop_token_ids"),
        (drawn(logit_bias={9000: 1}), INVALID, "sampling.logit_bias"),
        (drawn(logit_bias={1: float("inf")}), INVALID, "sampling.logit_bias"),
        (chat(messages=[]), INVALID, "messages"),
        (chat(messages=[pb.Message(role="robot")]), INVALID, "messages[0].role"),
        (chat(tool_choice="required"), ("INVALID_ARGUMENT", "UNSUPPORTED_PARAMETER"), "tool_choice"),
        (chat(tools=[pb.Tool(name="a b")]), INVALID, "tools[0].name"),
        (chat(tools=[pb.Tool(name="a", parameters_json="{")]), INVALID, "tools[0].parameters_json"),
        (chat(response_schema_json='{"type": "object"}'), INVALID, "response_schema_json"),
        (chat(response_schema_json="[1]"), INVALID, "response_schema_json"),
        (chat(model=""), MISSING, "model"),
        (chat(model="gpt"), NO_MODEL, None),
        (pb.GenerateRequest(model="demo"), MISSING, "prompt"),
        (continued([]), INVALID, "prompt"),
        (continued([9000]), INVALID, "prompt"),
        (continued([1] * 8192), TOO_LONG, "prompt"),
        (pb.GenerateRequest(model="demo", text="a b " * 300_000), TOO_LONG, "prompt"),
        (pb.GenerateRequest(model="demo", text="x" * 2**22), ("RESOURCE_EXHAUSTED", None), None),
        (pb.TokenizeRequest(model="gpt", text="x"), NO_MODEL, None),
        (pb.TokenizeRequest(model="demo"), MISSING, "input"),
    ],
    ids=lambda case: str(case).replace("\n", " ")[:40],
)
def test_grpc(served: Served, request_: Any, expected: tuple[str, str | None], field: str | None) -> None:
    code, reason = expected
    with served.stub() as stub:
        match request_:
            case pb.ChatRequest():
                call = stub.Chat(request_, timeout=30)
            case pb.GenerateRequest():
                call = stub.Generate(request_, timeout=30)
            case _:
                call = stub.Tokenize.future(request_, timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            call.result() if isinstance(request_, pb.TokenizeRequest) else list(call)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode[code]
    trailers = dict(error.trailing_metadata())
    if reason is None:  # refused by the library
        return
    status = Status.FromString(trailers["grpc-status-details-bin"])
    assert status.message == error.details()
    assert "Traceback" not in status.message
    details = {detail.TypeName(): detail for detail in status.details}
    info, request_info, bad = ErrorInfo(), RequestInfo(), BadRequest()
    assert details["google.rpc.ErrorInfo"].Unpack(info)
    assert details["google.rpc.RequestInfo"].Unpack(request_info)
    assert (info.reason, info.domain) == (reason, "eightfold")
    assert request_info.request_id == trailers["x-request-id"]
    if field is not None:
        assert details["google.rpc.BadRequest"].Unpack(bad)
        assert [violation.field for violation in bad.field_violations] == [field]

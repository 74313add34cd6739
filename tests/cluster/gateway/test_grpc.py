"""The gRPC interface, by an ordinary client."""

import time
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from cluster.gateway.answer import Delta, DrawnToken
from cluster.gateway.grpc_messages import chat_response
from cluster.gateway.grpc_server import SERVICE
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from model.chat.events import ContentDelta, ToolCallDelta, ToolCallEnd, ToolCallStart
from tests.cluster.gateway.serving import HARBOR_ANSWER, Served, wait_until

USER = pb.Message(role="user", content='What does "harbor" mean?')
GREEDY = pb.ChatRequest(model="demo", messages=[USER], sampling=pb.Sampling(temperature=0))
ENDLESS = pb.ChatRequest(
    model="demo", messages=[USER], sampling=pb.Sampling(ignore_eos=True, max_tokens=6000, temperature=1)
)


def test_chat_streams_an_answer_with_usage_last(served: Served) -> None:
    with served.stub() as stub:
        call = stub.Chat(GREEDY, timeout=30)
        responses = list(call)
        initial, trailing = dict(call.initial_metadata()), dict(call.trailing_metadata())
    assert "".join(response.delta.content for response in responses) == HARBOR_ANSWER
    assert [response.WhichOneof("event") for response in responses][-2:] == ["finish", "usage"]
    assert responses[-2].finish.reason == pb.FINISH_REASON_STOP
    usage = responses[-1].usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (13, 15)
    assert sum(len(response.delta.tokens) for response in responses) == 14  # all but the end of sequence
    assert initial["x-request-id"] == trailing["x-request-id"]
    assert len({response.id for response in responses}) == 1


def test_generate_takes_tokens_and_gives_tokens(served: Served) -> None:
    with served.stub() as stub:
        tokens = stub.Tokenize(pb.TokenizeRequest(model="demo", text="def read(path):"), timeout=30)
        sampling = pb.Sampling(temperature=0, max_tokens=8, logprobs=2, n=2)
        by_text = list(
            stub.Generate(pb.GenerateRequest(model="demo", text="def read(path):", sampling=sampling))
        )
        ids = pb.TokenIds(ids=[0, *tokens.token_ids])
        by_ids = list(stub.Generate(pb.GenerateRequest(model="demo", token_ids=ids, sampling=sampling)))
        drawn = [
            token.id for response in by_ids for token in response.delta.tokens if response.delta.choice == 1
        ]
        text = stub.Tokenize(pb.TokenizeRequest(model="demo", token_ids=pb.TokenIds(ids=drawn))).text
    for choice in (0, 1):
        texts = [
            "".join(response.delta.text for response in responses if response.delta.choice == choice)
            for responses in (by_text, by_ids)
        ]
        assert texts == [text, text]
    token = by_ids[0].delta.tokens[0]
    assert token.top_logprobs[0].id == token.id
    assert token.top_logprobs[0].logprob == token.logprob < 0
    assert by_ids[-1].usage.completion_tokens == 16


def test_models(served: Served) -> None:
    with served.stub() as stub:
        (model,) = stub.Models(pb.ModelsRequest(), timeout=30).models
    assert (model.id, model.context_length, model.vocab_size) == ("demo", 8192, 8192)
    assert len(model.weights_digest) == 64


def test_health_of_server_and_service(served: Served) -> None:
    with grpc.insecure_channel(served.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", SERVICE):
            status = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        watched = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=10)
        assert next(watched).status == health_pb2.HealthCheckResponse.SERVING
        watched.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=10)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_in_both_versions(served: Served, version: str) -> None:
    requests = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE),
    ]
    with grpc.insecure_channel(served.target) as channel:
        call = channel.stream_stream(
            f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        listed, described = list(call(iter(requests), timeout=10))
    names = {service.name for service in listed.list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert described.file_descriptor_response.file_descriptor_proto


def test_cancelling_frees_pages_within_a_second(served: Served) -> None:
    with served.stub() as stub:
        call = stub.Chat(ENDLESS)
        next(call)
        assert not served.is_idle()
        call.cancel()
        assert wait_until(served.is_idle) < 5


def test_a_deadline_frees_pages(served: Served) -> None:
    with served.stub() as stub:
        started = time.perf_counter()
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Chat(ENDLESS, timeout=0.5))
        assert time.perf_counter() - started < 2
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert wait_until(served.is_idle) < 5


def test_tool_calls_travel_in_pieces() -> None:
    events = (
        ContentDelta("I look"), ToolCallStart(0, "call_0", "weather"), ToolCallDelta(0, '{"a":'),
        ToolCallDelta(0, " 1}"), ToolCallEnd(0),
    )  # fmt: skip
    delta = chat_response("x", Delta(0, events, (DrawnToken(5, None, False),)), with_logprobs=False).delta
    assert delta.content == "I look"
    assert (delta.tool_calls[0].id, delta.tool_calls[0].name) == ("call_0", "weather")
    assert "".join(call.arguments for call in delta.tool_calls) == '{"a": 1}'
    assert not delta.tokens[0].HasField("logprob")


def test_the_stubs_are_those_of_the_proto(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc")
    root = Path(__file__).parents[3]
    source = "cluster/proto/eightfold/v1/eightfold.proto"
    arguments = [
        "",
        f"--proto_path={root}",
        f"--python_out={tmp_path}",
        f"--grpc_python_out={tmp_path}",
        source,
    ]
    assert protoc.main(arguments) == 0
    for name in ("eightfold_pb2.py", "eightfold_pb2_grpc.py"):
        fresh = (tmp_path / source).with_name(name)
        assert fresh.read_bytes() == (root / source).with_name(name).read_bytes()

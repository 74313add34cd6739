"""What a client sees of each thing that can go wrong: one table for both protocols.

Values of single fields have tables of their own (`test_refusals.py`, `test_grpc_refusals.py`). Not in it,
because nothing here can produce them yet: keys without a right (403), quotas (429), lost pages (data_loss).
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx2
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

import workers.runner
from cluster.config import ClusterConfig
from cluster.gateway import core
from cluster.gateway.errors import Kind
from cluster.gateway.grpc_server import SERVICE
from cluster.proto.eightfold.v1 import eightfold_pb2 as pb
from tests.cluster.gateway.serving import ENDLESS, HARBOR, Served, serve, wait_until
from workers.local import LocalModel

CHAT, JSON = "/v1/chat/completions", {"content-type": "application/json"}
MESSAGES = [pb.Message(**message) for message in HARBOR]
GRPC_ENDLESS = pb.ChatRequest(
    model="demo", messages=MESSAGES, sampling=pb.Sampling(ignore_eos=True, max_tokens=6000)
)
RETRYABLE = {Kind.OVERLOADED, Kind.REPLICA_LOST, Kind.TIMEOUT}


def chat(**fields: Any) -> pb.ChatRequest:
    return pb.ChatRequest(**{"model": "demo", "messages": MESSAGES, **fields})


def drawn(**sampling: Any) -> pb.ChatRequest:
    return chat(sampling=pb.Sampling(**sampling))


@dataclass(frozen=True)
class Row:
    """One condition, and what each protocol says of it.

    Args:
        name: of the condition.
        kind: its row in the gateway's own table.
        http: changes to a good chat request, or the bytes of a whole body; None where HTTP cannot have it.
        grpc: the request, or the bytes of one; None where gRPC cannot have it.
        param: the field that HTTP names, and by default also gRPC.
        situation: the state of the server.
        by_library: the gRPC status, where the library itself refuses and gives no details.
        words: what the message must hold.
    """

    name: str
    kind: Kind
    http: Any = None
    grpc: Any = None
    param: str | None = None
    grpc_field: str | None = None
    situation: str = "as usual"
    by_library: str | None = None
    words: tuple[str, ...] = ()
    headers: dict[str, str] = field(default_factory=dict)
    path: str = CHAT
    method: str = "POST"
    rpc: str = "Chat"


TABLE = [
    Row("no JSON", Kind.INVALID_JSON, http=b"{"),
    Row("no protobuf", Kind.INVALID_PROTOBUF, grpc=b"\xff\xff"),
    Row("no protobuf, one answer", Kind.INVALID_PROTOBUF, grpc=b"\xff\xff", rpc="Tokenize"),
    Row("JSON that is no UTF-8", Kind.INVALID_JSON, http=b'{"model": "\xff"}'),
    Row("a string that is no UTF-8", Kind.INVALID_PROTOBUF, grpc=b"\x0a\x01\xff"),
    Row("a wrong type", Kind.INVALID_TYPE, http={"temperature": "1"}, param="temperature"),
    Row("JSON within a message", Kind.INVALID_VALUE,
        grpc=chat(tools=[pb.Tool(name="f", parameters_json="{")]), grpc_field="tools[0].parameters_json"),
    Row("a field that is missing", Kind.MISSING, http={"model": None}, grpc=chat(model=""), param="model"),
    Row("a field that is not supported", Kind.UNSUPPORTED, http={"tool_choice": "required"},
        grpc=chat(tool_choice="required"), param="tool_choice"),
    Row("too long for the context", Kind.CONTEXT, http={"max_tokens": 8192}, grpc=drawn(max_tokens=8192),
        param="max_tokens", grpc_field="sampling.max_tokens", words=("8192", "13", "8179")),
    Row("a prompt too long", Kind.CONTEXT, http={"messages": [{"role": "user", "content": "a b " * 9000}]},
        grpc=chat(messages=[pb.Message(role="user", content="a b " * 9000)]), param="messages",
        words=("8192",)),
    Row("max_tokens below 1", Kind.INVALID_VALUE, http={"max_tokens": 0}, grpc=drawn(max_tokens=0),
        param="max_tokens", grpc_field="sampling.max_tokens"),
    Row("too many choices", Kind.INVALID_VALUE, http={"n": 10**9}, grpc=drawn(n=10**9), param="n",
        grpc_field="sampling.n"),
    Row("a temperature that is no number", Kind.INVALID_VALUE, grpc=drawn(temperature=math.nan),
        grpc_field="sampling.temperature"),
    Row("NaN in JSON", Kind.INVALID_JSON, http=b'{"temperature": NaN}'),
    Row("no such token", Kind.INVALID_VALUE, http={"stop_token_ids": [8192]},
        grpc=drawn(stop_token_ids=[8192]), param="stop_token_ids", grpc_field="sampling.stop_token_ids"),
    Row("no messages", Kind.INVALID_VALUE, http={"messages": []}, grpc=chat(messages=[]), param="messages"),
    Row("too large", Kind.TOO_LARGE, http={"user": "x" * 2**22},
        grpc=chat(messages=[pb.Message(role="user", content="x" * 2**22)]), by_library="RESOURCE_EXHAUSTED"),
    Row("headers too large", Kind.HEADERS, http={}, grpc=chat(), headers={"x-long": "y" * 40_000},
        by_library="RESOURCE_EXHAUSTED"),
    Row("no key", Kind.NO_KEY, http={}, grpc=chat(), situation="locked"),
    Row("a wrong key", Kind.NO_KEY, http={}, grpc=chat(), situation="locked",
        headers={"authorization": "Bearer nobody"}),
    Row("an unknown model", Kind.NO_MODEL, http={"model": "gpt"}, grpc=chat(model="gpt"), param="model",
        words=("gpt", "demo")),
    Row("an unknown path", Kind.NO_PATH, http={}, path="/v1/nothing", grpc=b"", rpc="Nothing",
        by_library="UNIMPLEMENTED"),
    Row("a wrong method", Kind.NO_METHOD, http={}, method="PUT"),
    Row("a full queue", Kind.OVERLOADED, http={}, grpc=chat(), situation="full"),
    Row("a full journal", Kind.OVERLOADED, http={}, grpc=chat(), situation="little room"),
    Row("a server about to stop", Kind.OVERLOADED, http={}, grpc=chat(), situation="draining"),
    Row("an engine that is not running", Kind.OVERLOADED, http={}, grpc=chat(), situation="stopped"),
    Row("no first token in time", Kind.TIMEOUT, http={}, grpc=chat(), situation="hasty"),
    Row("an engine that fails", Kind.REPLICA_LOST, http={}, grpc=chat(), situation="failing"),
    Row("logits that are no numbers", Kind.NUMERICAL, http={}, grpc=chat(), situation="poisoned"),
    Row("our own bug", Kind.INTERNAL, http={}, grpc=chat(), situation="buggy"),
]  # fmt: skip


def config(engine: dict[str, Any] | None = None, **gateway: Any) -> ClusterConfig:
    gateway = {"http_port": 0, "grpc_port": 0, **gateway}
    return ClusterConfig.model_validate({"engine": {"tokens": 8192, **(engine or {})}, "gateway": gateway})


@contextmanager
def full(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve(demo, config({"max_waiting": 1})) as served:
        journal = served.server.gateway.journal
        with served.stub() as stub:
            running = stub.Chat(GRPC_ENDLESS)
            next(running)
            waiting = stub.Chat(GRPC_ENDLESS)
            wait_until(lambda: len(journal) == 2)
            yield served
            running.cancel()
            waiting.cancel()
            wait_until(served.is_idle)


@contextmanager
def draining(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve(demo, config()) as served:
        served.server.gateway.is_draining = True
        yield served


@contextmanager
def stopped(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    with serve(demo, config()) as served:
        served.run(served.server.gateway.backend.stop())  # type: ignore[attr-defined]
        yield served


@contextmanager
def failing(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    def step(on_layer: Any) -> Any:
        raise RuntimeError("/secret/path")

    with serve(demo, config()) as served:
        patch.setattr(served.engine, "step", step)
        yield served


@contextmanager
def poisoned(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    real = workers.runner.Drawing

    def sample(logits: Any, *arguments: Any, **options: Any) -> Any:
        logits[:] = math.nan
        return real(logits, *arguments, **options)

    with serve(demo, config()) as served:
        patch.setattr(workers.runner, "Drawing", sample)
        yield served


@contextmanager
def buggy(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[Served]:
    def bug(*arguments: Any) -> Any:
        raise KeyError("/secret/path")

    with serve(demo, config()) as served:
        patch.setattr(served.server.gateway, "check_model", bug)
        yield served


SITUATIONS: dict[str, Callable[[LocalModel, pytest.MonkeyPatch], Any]] = {
    "full": full,
    "draining": draining,
    "stopped": stopped,
    "failing": failing,
    "poisoned": poisoned,
    "buggy": buggy,
    "locked": lambda demo, patch: serve(demo, config(api_key_hashes=["0" * 64])),
    "little room": lambda demo, patch: serve(demo, config(limits={"journal_tokens": 20})),
    "hasty": lambda demo, patch: serve(demo, config(limits={"first_token_seconds": 0.0001})),
}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_what_the_client_sees(
    row: Row, served: Served, demo: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        here = served
        if row.situation != "as usual":
            here = stack.enter_context(SITUATIONS[row.situation](demo, monkeypatch))
        if row.http is not None:
            check_http(here, row)
        if row.grpc is not None:
            check_grpc(here, row)
        if row.situation == "as usual":
            wait_until(here.is_idle)


def check_http(served: Served, row: Row) -> None:
    body = row.http
    if isinstance(body, dict):
        good = {"model": "demo", "messages": HARBOR, "max_tokens": 8}
        body = json.dumps(
            {key: value for key, value in {**good, **body}.items() if value is not None}
        ).encode()
    response = httpx2.request(
        row.method,
        served.url + row.path,
        content=body,
        headers=JSON | row.headers,
        timeout=30,
        trust_env=False,
    )
    error = response.json()["error"]
    expected = row.kind.row
    assert (response.status_code, error["type"], error["code"]) == (
        expected.http,
        expected.type,
        expected.code,
    )
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == row.param
    check_message(row, error["message"])
    assert response.headers["x-request-id"].startswith("req_")
    assert ("retry-after" in response.headers) == (row.kind in RETRYABLE)
    assert 1 <= int(response.headers.get("retry-after", 1)) <= 120


def check_grpc(served: Served, row: Row) -> None:
    def serialized(request: Any) -> Any:
        return request if isinstance(request, bytes) else request.SerializeToString()

    with grpc.insecure_channel(served.target) as channel:
        method = channel.unary_stream(f"/{SERVICE}/{row.rpc}", request_serializer=serialized)
        call = method(row.grpc, metadata=tuple(row.headers.items()), timeout=30)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    error: Any = caught.value
    if row.by_library:
        assert error.code().name == row.by_library
        return
    assert error.code().name == row.kind.row.grpc
    trailers = dict(error.trailing_metadata())
    told = details(trailers)
    assert (told["ErrorInfo"].reason, told["ErrorInfo"].domain) == (row.kind.row.code.upper(), "eightfold")
    assert told["RequestInfo"].request_id == trailers["x-request-id"]
    named = row.grpc_field or row.param if row.kind.row.http == 400 else None
    assert [v.field for v in told["BadRequest"].field_violations] == ([named] if named else [])
    check_message(row, error.details())
    assert ("grpc-retry-pushback-ms" in trailers) == (row.kind in RETRYABLE)
    if row.kind in RETRYABLE - {Kind.TIMEOUT}:
        assert told["RetryInfo"].retry_delay.ToMilliseconds() == int(trailers["grpc-retry-pushback-ms"])


def details(trailers: dict[str, Any]) -> dict[str, Any]:
    """The details of a status by their names, each empty where it lacks."""
    status = Status.FromString(trailers["grpc-status-details-bin"])
    found: dict[str, Any] = {}
    for kind in (BadRequest, ErrorInfo, RequestInfo, RetryInfo):
        found[kind.__name__] = message = kind()
        for detail in status.details:
            detail.Unpack(message)
    return found


def check_message(row: Row, message: str) -> None:
    assert 0 < len(message) < 500
    for word in row.words:
        assert word in message
    for inside in ("Traceback", "secret", "KeyError", "RuntimeError", ".py", "0x"):
        assert inside not in message


# Behind the first token


@contextmanager
def broken_later(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Callable[[], None]]]:
    """An engine that fails when it is told to, and when its requests run again."""
    with serve(demo, config()) as served:
        steps = [served.engine.step, served.engine.step]

        def fail(on_layer: Any) -> Any:
            step = steps.pop()
            if not steps:
                patch.setattr(served.engine, "step", step)
                steps.extend((step, step))
            raise RuntimeError("/secret/path")

        yield served, lambda: patch.setattr(served.engine, "step", fail)


@contextmanager
def out_of_time(demo: LocalModel, patch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Callable[[], None]]]:
    with serve(demo, config(limits={"total_seconds": 3})) as served:
        yield served, lambda: None


@pytest.mark.parametrize(
    ("kind", "situation"), [(Kind.REPLICA_LOST, broken_later), (Kind.TIMEOUT, out_of_time)]
)
def test_what_the_client_sees_behind_the_first_token(
    kind: Kind, situation: Any, demo: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with situation(demo, monkeypatch) as (served, break_):
        text = told_by_http(served, break_)
        last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
        assert (last["type"], last["code"], last["param"]) == (kind.row.type, kind.row.code, None)
        assert "[DONE]" not in text
        error, delivered = told_by_grpc(served, break_)
        assert error.code().name == kind.row.grpc
        info = details(dict(error.trailing_metadata()))["ErrorInfo"]
        assert info.reason == kind.row.code.upper()
        assert int(info.metadata["tokens_delivered"]) == delivered >= 1
        wait_until(served.is_idle)


def told_by_http(served: Served, break_: Callable[[], None]) -> str:
    """A stream as far as it comes. It is cut, so that nobody takes its end for that of the answer."""
    text = ""
    with httpx2.stream("POST", served.url + CHAT, json=ENDLESS, timeout=30, trust_env=False) as response:
        parts = response.iter_text()
        try:
            for part in parts:
                if not text:
                    break_()
                text += part
        except httpx2.RemoteProtocolError:
            return text
    raise AssertionError("the stream came to an orderly end")


def told_by_grpc(served: Served, break_: Callable[[], None]) -> tuple[Any, int]:
    """The error of a stream, and how many tokens came before it."""
    delivered = 0
    with served.stub() as stub:
        call = stub.Chat(GRPC_ENDLESS, timeout=30)
        try:
            for response in call:
                if not delivered:
                    break_()
                delivered += len(response.delta.tokens)
        except grpc.RpcError as error:
            return error, delivered
    raise AssertionError("the stream came to an orderly end")


def test_a_client_that_left_is_counted_as_such(served: Served) -> None:
    def counted(protocol: str) -> float:
        page = httpx2.get(f"{served.url}/metrics", trust_env=False).text
        start = f'eightfold_requests_total{{outcome="cancelled",protocol="{protocol}"}} '
        return next((float(line.split()[1]) for line in page.splitlines() if line.startswith(start)), 0.0)

    before = counted("http"), counted("grpc")
    with httpx2.stream("POST", served.url + CHAT, json=ENDLESS, timeout=30, trust_env=False) as response:
        next(response.iter_bytes())
    with served.stub() as stub:
        call = stub.Chat(GRPC_ENDLESS, timeout=30)
        next(call)
        call.cancel()
    wait_until(lambda: (counted("http"), counted("grpc")) == (before[0] + 1, before[1] + 1))
    wait_until(served.is_idle)


def test_a_full_gateway_refuses_before_it_reads_a_prompt(
    demo: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under an overload refusals are most of the work: a long prompt must not be encoded for them."""

    def encode(*_: Any) -> Any:
        raise AssertionError("it was encoded")

    with full(demo, monkeypatch) as served:
        monkeypatch.setattr(core, "encode_chat", encode)
        response = served.post({"model": "demo", "messages": HARBOR})
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        monkeypatch.undo()

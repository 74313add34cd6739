"""The table of refusals, over HTTP."""

import json
import socket
from typing import Any

import httpx2
import pytest

from cluster.gateway.errors import Kind, Overloaded, Refusal, ReplicaLost, as_refusal
from model.errors import PromptTooLong, RequestError
from tests.cluster.gateway.serving import HARBOR, Served

BIG = 10**9
POST = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
CHAT: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"temperature": 3}, 400, "invalid_value", "temperature"),
    ({"temperature": "1"}, 400, "invalid_type", "temperature"),
    ({"temperature": True}, 400, "invalid_type", "temperature"),
    ({"top_p": -0.1}, 400, "invalid_value", "top_p"),
    ({"min_p": 2}, 400, "invalid_value", "min_p"),
    ({"top_k": -1}, 400, "invalid_value", "top_k"),
    ({"presence_penalty": 3}, 400, "invalid_value", "presence_penalty"),
    ({"frequency_penalty": -3}, 400, "invalid_value", "frequency_penalty"),
    ({"repetition_penalty": 0}, 400, "invalid_value", "repetition_penalty"),
    ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": -1}, 400, "invalid_value", "max_tokens"),
    ({"max_tokens": 1.5}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": "7"}, 400, "invalid_type", "max_tokens"),
    ({"max_tokens": BIG}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_tokens": 10**1000}, 400, "context_length_exceeded", "max_tokens"),
    ({"max_completion_tokens": BIG}, 400, "context_length_exceeded", "max_completion_tokens"),
    ({"max_completion_tokens": 0}, 400, "invalid_value", "max_completion_tokens"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, 400, "invalid_value", "max_tokens"),
    ({"n": 0}, 400, "invalid_value", "n"),
    ({"n": BIG}, 400, "invalid_value", "n"),
    ({"n": 10**1000}, 400, "invalid_value", "n"),
    ({"n": 1.0}, 400, "invalid_type", "n"),
    ({"seed": 2**64}, 400, "invalid_value", "seed"),
    ({"seed": "x"}, 400, "invalid_type", "seed"),
    ({"stop": ["x"] * 100_000}, 400, "invalid_value", "stop"),
    ({"stop": "x" * 300}, 400, "invalid_value", "stop"),
    ({"stop": ""}, 400, "invalid_value", "stop"),
    ({"stop": [1]}, 400, "invalid_value", "stop"),
    ({"stop": {"a": 1}}, 400, "invalid_type", "stop"),
    ({"stop_token_ids": [9000]}, 400, "invalid_value", "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, 400, "invalid_value", "stop_token_ids"),
    ({"logit_bias": {"9000": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"1": 101}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(2000)}}, 400, "invalid_value", "logit_bias"),
    ({"logit_bias": [1]}, 400, "invalid_type", "logit_bias"),
    ({"logprobs": 5}, 400, "invalid_type", "logprobs"),
    ({"logprobs": True, "top_logprobs": BIG}, 400, "invalid_value", "top_logprobs"),
    ({"top_logprobs": 2}, 400, "invalid_value", "top_logprobs"),
    ({"stream": "yes"}, 400, "invalid_type", "stream"),
    ({"stream_options": {"include_usage": True}}, 400, "invalid_value", "stream_options"),
    (
        {"stream": True, "stream_options": {"include_usage": 1}},
        400, "invalid_type", "stream_options.include_usage",
    ),
    ({"messages": []}, 400, "invalid_value", "messages"),
    ({"messages": None}, 400, "missing_required_parameter", "messages"),
    ({"messages": "hi"}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user"}]}, 400, "invalid_value", "messages[0].content"),
    ({"messages": [{"role": "robot", "content": ""}]}, 400, "invalid_value", "messages[0].role"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "invalid_value", "messages"),
    ({"messages": HARBOR * 5000}, 400, "invalid_value", "messages"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, 400, "context_length_exceeded", "messages"),
    ({"model": "gpt-4"}, 404, "model_not_found", "model"),
    ({"model": 1}, 400, "invalid_type", "model"),
    ({"model": None}, 400, "missing_required_parameter", "model"),
    ({"thinking": {"type": "maybe"}}, 400, "invalid_value", "thinking.type"),
    ({"thinking": True}, 400, "invalid_type", "thinking"),
    (
        {"thinking": {"type": "enabled"}, "chat_template_kwargs": {"thinking": False}},
        400, "invalid_value", "thinking",
    ),
    (
        {"chat_template_kwargs": {"tokenize": True}},
        400, "unsupported_parameter", "chat_template_kwargs.tokenize",
    ),
    ({"chat_template": "{{ 1 }}"}, 400, "unsupported_parameter", "chat_template"),
    ({"functions": []}, 400, "unsupported_parameter", "functions"),
    ({"reasoning_effort": "high"}, 400, "unsupported_parameter", "reasoning_effort"),
    ({"response_format": {"type": "json_object"}}, 400, "unsupported_parameter", "response_format"),
    ({"response_format": {"type": "xml"}}, 400, "invalid_value", "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"a": 1}, "strict": True}}},
        400, "unsupported_parameter", "response_format.json_schema.strict",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}},
        400, "invalid_value", "response_format",
    ),
    ({"tools": [{"type": "x"}]}, 400, "invalid_value", "tools[0].type"),
    ({"tools": [{"function": {"name": "a b"}}]}, 400, "invalid_value", "tools[0].function.name"),
    ({"tools": [{"function": {"name": f"f{i}"}} for i in range(129)]}, 400, "invalid_value", "tools"),
    ({"tools": [{"function": {"name": "f"}}] * 2}, 400, "invalid_value", "tools"),
    (
        {"tools": [{"function": {"name": "f", "parameters": {"x": "y" * 70_000}}}]},
        400, "invalid_value", "tools[0].function.parameters",
    ),
    ({"tool_choice": "required"}, 400, "unsupported_parameter", "tool_choice"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        400, "unsupported_parameter", "tool_choice",
    ),
    ({"tool_choice": 3}, 400, "invalid_value", "tool_choice"),
    ({"parallel_tool_calls": False}, 400, "unsupported_parameter", "parallel_tool_calls"),
]  # fmt: skip


def check_error(response: httpx2.Response, status: int, code: str, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, param)
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"]) < 500
    for inside in ("Traceback", "/", "cluster", "pydantic", "0x"):
        assert inside not in error["message"].replace("HTTP/1.1", "").replace("application/json", "")
    assert response.headers["x-request-id"].startswith("req_")


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    with httpx2.Client(base_url=served.url, trust_env=False, timeout=30) as opened:
        yield opened


def ids(case: Any) -> str:
    return str(case)[:40] if isinstance(case, dict) else ""


@pytest.mark.parametrize(("change", "status", "code", "param"), CHAT, ids=ids)
def test_chat(client: httpx2.Client, change: dict[str, Any], status: int, code: str, param: str) -> None:
    body = {"model": "demo", "messages": HARBOR, **change}
    check_error(client.post("/v1/chat/completions", json=body), status, code, param)


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"prompt": []}, 400, "invalid_value", "prompt"),
        ({"prompt": [9000]}, 400, "invalid_value", "prompt"),
        ({"prompt": [-1]}, 400, "invalid_value", "prompt"),
        ({"prompt": [1.0]}, 400, "invalid_type", "prompt"),
        ({"prompt": [True]}, 400, "invalid_type", "prompt"),
        ({"prompt": {"a": 1}}, 400, "invalid_type", "prompt"),
        ({"prompt": ["a", "b"]}, 400, "unsupported_parameter", "prompt"),
        ({"prompt": [1] * 8192}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "a b " * 500_000}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": [0], "max_tokens": 8192}, 400, "context_length_exceeded", "max_tokens"),
        ({"prompt": [0], "logprobs": 21}, 400, "invalid_value", "logprobs"),
        ({"prompt": [0], "echo": True}, 400, "unsupported_parameter", "echo"),
        ({"prompt": [0], "suffix": "x"}, 400, "unsupported_parameter", "suffix"),
        ({"prompt": [0], "best_of": 3}, 400, "unsupported_parameter", "best_of"),
        ({}, 400, "missing_required_parameter", "prompt"),
    ],
    ids=ids,
)
def test_completions(
    client: httpx2.Client, change: dict[str, Any], status: int, code: str, param: str
) -> None:
    check_error(client.post("/v1/completions", json={"model": "demo", **change}), status, code, param)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"\xef\xbb\xbf{}", 400, "invalid_json"),
        (b"\xff{}", 400, "invalid_json"),
        (b'{"a": NaN}', 400, "invalid_json"),
        (b'{"a": 1e999}', 400, "invalid_json"),
        (b'{"a": Infinity}', 400, "invalid_json"),
        (b'{"a": ' + b"9" * 5000 + b"}", 400, "invalid_json"),
        (b'{"a": 1, "a": 2}', 400, "invalid_json"),
        (b'{"a": "\\ud800"}', 400, "invalid_value"),
        (b'{"a": "\x00"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"a":' * 100_000, 400, "invalid_json"),
        (b"[1]", 400, "invalid_type"),
        (b'"' + b"x" * 2**22 + b'"', 413, "request_too_large"),
    ],
)
def test_bodies_that_are_no_request(client: httpx2.Client, body: bytes, status: int, code: str) -> None:
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    check_error(response, status, code, "a" if b'"a": 1, "a"' in body or b"ud800" in body else None)


def test_a_body_without_a_length_is_cut_off_too(client: httpx2.Client) -> None:
    parts = (b"x" * 65536 for _ in range(100))
    headers = {"content-type": "application/json"}
    check_error(
        client.post("/v1/completions", content=parts, headers=headers), 413, "request_too_large", None
    )


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/v1/nothing", {}, 404, "not_found"),
        ("GET", "/", {}, 404, "not_found"),
        ("GET", "/v1/chat/completions", {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", {}, 405, "method_not_allowed"),
        ("POST", "/metrics", {}, 405, "method_not_allowed"),
        ("POST", "/v1/completions", {"content-type": "text/plain"}, 415, "unsupported_media_type"),
        (
            "POST", "/v1/completions", {"content-type": "application/json", "content-encoding": "gzip"},
            415, "unsupported_media_type",
        ),
        ("GET", "/healthz", {"x-long": "x" * 40_000}, 431, "request_too_large"),
    ],
)  # fmt: skip
def test_routes_and_headers(
    client: httpx2.Client, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    response = client.request(method, path, headers=headers)
    check_error(response, status, code, None)
    assert ("allow" in response.headers) == (status == 405)


def test_an_unknown_model_has_its_name_in_the_answer(client: httpx2.Client) -> None:
    check_error(client.get("/v1/models/gpt-4"), 404, "model_not_found", "model")
    assert client.get("/models/demo").json()["id"] == "demo"


def test_the_client_s_own_request_id_comes_back(client: httpx2.Client) -> None:
    response = client.get("/healthz", headers={"X-Client-Request-Id": "mine-1"})
    assert response.headers["x-client-request-id"] == "mine-1"


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 70_000, b"431"),
        (b"GET /healthz HTTP/1.1\r\nHost:", b"408"),
        (POST + b"Content-Length: 9\r\nContent-Type: application/json\r\n\r\n{", b"408"),
        (POST + b"Content-Length: 9\r\nContent-Length: 8\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_bytes_that_are_no_http_or_come_too_slowly(small: Served, sent: bytes, status: bytes) -> None:
    with socket.create_connection(("127.0.0.1", small.server.http_port), timeout=10) as connection:
        connection.sendall(sent)
        reply = b"".join(iter(lambda: connection.recv(65536), b""))
    assert reply.startswith(b"HTTP/1.1 " + status)
    assert b"\r\nx-request-id: req_" in reply
    assert set(json.loads(reply.split(b"\r\n\r\n", 1)[1])["error"]) == {"message", "type", "param", "code"}


def test_errors_that_are_not_ours_say_nothing_of_the_inside() -> None:
    refusal = as_refusal(RuntimeError("/secret/path"))
    assert refusal.kind is Kind.INTERNAL
    assert "secret" not in str(refusal)
    assert as_refusal(PromptTooLong(9, 8)).kind is Kind.CONTEXT
    assert as_refusal(RequestError("n", "is 9")).param == "n"


@pytest.mark.parametrize(
    "error", [Refusal(Kind.TIMEOUT, "m", "p", 2.0), Overloaded("m", 3.0), ReplicaLost("m")], ids=type
)
def test_refusals_travel_between_processes(error: Refusal) -> None:
    import copy

    again = copy.copy(error)  # by way of __reduce__, as pickling would
    assert (again.body(), again.retry_after) == (error.body(), error.retry_after)
    assert type(again) is type(error)

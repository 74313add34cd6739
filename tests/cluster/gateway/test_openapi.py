"""The description of the HTTP interface, held against what the gateway really does."""

import json
from typing import Any

import httpx2
import pytest
from jsonschema import Draft202012Validator

from cluster.gateway.auth import ApiKeys
from cluster.gateway.calls import chat_call, completion_call
from cluster.gateway.errors import Kind, Refusal
from cluster.gateway.openapi import openapi
from model.errors import RequestError
from tests.cluster.gateway.serving import HARBOR, Served

BOUNDED = [
    "frequency_penalty",
    "min_p",
    "n",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "temperature",
    "top_k",
    "top_p",
]


@pytest.fixture(scope="module")
def described(served: Served) -> Any:
    return httpx2.get(f"{served.url}/openapi.json", trust_env=False).json()


def validator(described: Any, name: str) -> Draft202012Validator:
    return Draft202012Validator(
        {"$ref": f"#/components/schemas/{name}", "components": described["components"]}
    )


def test_its_schemas_are_schemas(described: Any) -> None:
    assert described["openapi"].startswith("3.1.")
    for schema in described["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)


def test_its_paths_exist_and_take_their_methods(served: Served, described: Any) -> None:
    for path, operations in described["paths"].items():
        address = served.url + path.replace("{model}", "demo")
        (method,) = operations
        response = httpx2.request(method, address, trust_env=False)
        assert response.status_code == (200 if method == "get" else 415), path
        other = httpx2.request("DELETE", address, trust_env=False)
        assert (other.status_code, other.headers["allow"].split(", ")[0]) == (405, method.upper())


def test_every_kind_of_refusal_is_in_it(served: Served) -> None:
    text = json.dumps(openapi(served.server.gateway, ApiKeys(["0" * 64]), "test"))
    missing = {kind.name for kind in Kind if f'"{kind.row.code}"' not in text}
    # The first two refuse what is not described, the third is not HTTP's.
    assert missing == {"NO_PATH", "NO_METHOD", "INVALID_PROTOBUF"}


def accepted(fields: dict[str, Any], is_chat: bool) -> bool:
    try:
        if is_chat:
            chat_call({"model": "demo", "messages": HARBOR, **fields})
        else:
            completion_call({"model": "demo", "prompt": "x", **fields})
    except (Refusal, RequestError):
        return False
    return True


@pytest.mark.parametrize("field", BOUNDED)
@pytest.mark.parametrize("name", ["ChatRequest", "CompletionRequest"])
def test_its_bounds_are_those_that_are_checked(described: Any, name: str, field: str) -> None:
    schema = described["components"]["schemas"][name]["properties"][field]
    is_chat = name == "ChatRequest"
    assert accepted({field: schema["minimum"]}, is_chat)
    step = 0.01 if "number" in schema["type"] else 1
    assert not accepted({field: schema["minimum"] - step}, is_chat)
    if "maximum" in schema:
        assert accepted({field: schema["maximum"]}, is_chat)
        assert not accepted({field: schema["maximum"] + step}, is_chat)


@pytest.mark.parametrize(
    ("field", "limit", "make"),
    [
        ("stop", lambda schema: schema["anyOf"][1]["maxItems"], lambda n: ["x"] * n),
        ("stop", lambda schema: schema["anyOf"][0]["maxLength"], lambda n: "x" * n),
        ("stop_token_ids", lambda schema: schema["anyOf"][0]["maxItems"], lambda n: [1] * n),
        (
            "logit_bias",
            lambda schema: schema["anyOf"][0]["maxProperties"],
            lambda n: {str(i): 1 for i in range(n)},
        ),
        ("messages", lambda schema: schema["maxItems"], lambda n: HARBOR * n),
        (
            "tools",
            lambda schema: schema["anyOf"][0]["maxItems"],
            lambda n: [{"function": {"name": f"f{i}"}} for i in range(n)],
        ),
        ("top_logprobs", lambda schema: schema["maximum"], lambda n: n),
    ],
)
def test_its_limits_are_those_that_are_checked(described: Any, field: str, limit: Any, make: Any) -> None:
    most = limit(described["components"]["schemas"]["ChatRequest"]["properties"][field])
    more = {"logprobs": True} if field == "top_logprobs" else {}
    assert accepted({field: make(most), **more}, is_chat=True)
    assert not accepted({field: make(most + 1), **more}, is_chat=True)


@pytest.mark.parametrize(
    ("path", "name", "body"),
    [
        (
            "/v1/chat/completions",
            "ChatCompletion",
            {"messages": HARBOR, "logprobs": True, "top_logprobs": 2, "n": 2},
        ),
        ("/v1/chat/completions", "ChatCompletion", {"messages": HARBOR, "thinking": {"type": "enabled"}}),
        ("/v1/completions", "TextCompletion", {"prompt": "def f(", "logprobs": 2}),
    ],
)
def test_answers_are_as_described(
    served: Served, described: Any, path: str, name: str, body: dict[str, Any]
) -> None:
    body = {"model": "demo", "max_tokens": 8, "temperature": 0, **body}
    validator(described, "ChatRequest" if "messages" in body else "CompletionRequest").validate(body)
    validator(described, name).validate(served.post(body, path).json())
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    *events, last = served.post(streamed, path).text.strip().split("\n\n")
    assert last == "data: [DONE]"
    for event in events:
        validator(described, f"{name}Chunk").validate(json.loads(event.removeprefix("data: ")))


@pytest.mark.parametrize(
    "body", [{}, {"model": "demo", "messages": HARBOR, "n": 99}, {"model": "gpt", "messages": HARBOR}]
)
def test_errors_are_as_described(served: Served, described: Any, body: Any) -> None:
    response = served.post(body)
    responses = described["paths"]["/v1/chat/completions"]["post"]["responses"]
    schema = responses[str(response.status_code)]["content"]["application/json"]["schema"]
    Draft202012Validator({**schema, "components": described["components"]}).validate(response.json())


def test_a_key_is_asked_for_where_one_is_needed(served: Served) -> None:
    paths = openapi(served.server.gateway, ApiKeys(["0" * 64]), "test")["paths"]
    is_locked = {path: "security" in next(iter(operations.values())) for path, operations in paths.items()}
    assert {path for path, locked in is_locked.items() if not locked} == {"/healthz", "/readyz"}

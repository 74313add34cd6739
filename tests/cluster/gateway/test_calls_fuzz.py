"""Whatever JSON comes in: a call, or a refusal that names its field. Never anything else."""

import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.gateway.calls import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    UNSUPPORTED_FIELDS,
    chat_call,
    completion_call,
)
from cluster.gateway.errors import Kind, Refusal, as_refusal
from cluster.gateway.strict_json import parse_object
from model.chat.encoding import ChatEncoding
from model.errors import RequestError

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
WORDS = st.sampled_from(
    [
        "role", "content", "user", "assistant", "tool", "tool_calls", "function", "name", "parameters",
        "type", "text", "id", "arguments", "enabled", "thinking", "json_schema", "schema", "prefix",
        "include_usage",
    ]
)  # fmt: skip
VALUES = st.recursive(
    SCALARS | WORDS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(WORDS | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": VALUES | st.text()},
        optional={
            "tool_calls": VALUES,
            "prefix": VALUES,
            "tool_call_id": VALUES,
            "reasoning_content": VALUES,
        },
    ),
    max_size=4,
)


def check(error: Exception) -> None:
    refusal = as_refusal(error)
    assert isinstance(error, Refusal | RequestError), error
    assert refusal.kind is not Kind.INTERNAL
    assert refusal.row.http in (400, 413)
    json.dumps(refusal.body()).encode()


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(CHAT_FIELDS | UNSUPPORTED_FIELDS.keys())), VALUES, max_size=5),
    MESSAGES,
)
def test_chat(fields: dict[str, Any], messages: list[Any]) -> None:
    try:
        call = chat_call({"model": "m", "messages": messages, **fields})
        for encoding in ChatEncoding:
            encoding.render(call.messages, call.tools, call.thinking)
    except (Refusal, RequestError) as error:
        check(error)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(sorted(COMPLETION_FIELDS | UNSUPPORTED_FIELDS.keys())), VALUES, max_size=6
    )
)
def test_completions(fields: dict[str, Any]) -> None:
    try:
        completion_call({"model": "m", "prompt": "x", **fields})
    except (Refusal, RequestError) as error:
        check(error)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64) | st.text(alphabet='{}[]",:\\u0dD8aeE1-.', max_size=64).map(str.encode))
def test_bytes(body: bytes) -> None:
    try:
        value = parse_object(body)
    except Refusal as error:
        check(error)
    else:
        assert json.loads(body) == value
        json.dumps(value, ensure_ascii=False).encode()

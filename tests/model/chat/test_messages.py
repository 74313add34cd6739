import json
from typing import Any

import pytest

from model.chat.messages import (
    Message,
    Tool,
    ToolCall,
    arrange,
    json_text,
    messages_from_json,
    tools_from_json,
)
from model.errors import RequestError

USER = {"role": "user", "content": "q"}


def call(call_id: str = "c", **function: Any) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": "{}"} | function}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | function}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "a"} | fields


def test_messages() -> None:
    raw = [
        {"role": "system", "content": "S", "name": "ignored"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "R",
            "tool_calls": [call("1", arguments='{"x": 1}'), call("2", arguments={"ü": [1]})],
            "refusal": None,
        },
        {"role": "tool", "content": "T", "tool_call_id": "1"},
        {"role": "assistant", "content": "begin", "prefix": True, "tool_calls": None},
    ]
    calls = (ToolCall("1", "f", '{"x": 1}'), ToolCall("2", "f", '{"ü": [1]}'))
    assert messages_from_json(raw) == (
        Message("system", "S"),
        Message("user", "a\nb"),
        Message("assistant", "", reasoning_content="R", tool_calls=calls),
        Message("tool", "T", tool_call_id="1"),
        Message("assistant", "begin", prefix=True),
    )


@pytest.mark.parametrize(
    ("message", "field", "problem"),
    [
        ("hello", "", "must be an object, not a string"),
        ({"content": "x"}, ".role", "must be one of system, developer"),
        ({"role": "robot", "content": "x"}, ".role", "must be one of"),
        ({"role": ["user"], "content": "x"}, ".role", "must be one of"),
        ({"role": "user"}, ".content", "must be a string, not null"),
        ({"role": "user", "content": 3}, ".content", "not a number"),
        ({"role": "user", "content": True}, ".content", "not a boolean"),
        ({"role": "user", "content": {}}, ".content", "not an object"),
        ({"role": "user", "content": "a\ud800"}, ".content", "lone surrogate at character 1"),
        ({"role": "user", "content": ["x"]}, ".content[0]", "must be an object"),
        ({"role": "user", "content": [{"type": "image_url"}]}, ".content[0].type", "must be text"),
        ({"role": "user", "content": [{"type": "text"}]}, ".content[0].text", "not null"),
        (USER | {"tool_calls": [call()]}, ".tool_calls", "only a message of the assistant"),
        (USER | {"reasoning_content": "r"}, ".reasoning_content", "only a message of the assistant"),
        (USER | {"prefix": True}, ".prefix", "only a message of the assistant"),
        (assistant(prefix=1), ".prefix", "must be true or false"),
        (assistant(reasoning_content=[]), ".reasoning_content", "must be a string, not a list"),
        (assistant(tool_calls=call()), ".tool_calls", "must be a list, not an object"),
        (assistant(tool_calls=["f"]), ".tool_calls[0]", "must be an object"),
        (assistant(tool_calls=[call() | {"type": "x"}]), ".tool_calls[0].type", "must be function"),
        (assistant(tool_calls=[{"id": "1"}]), ".tool_calls[0].function", "must be an object, not null"),
        (assistant(tool_calls=[call(1)]), ".tool_calls[0].id", "must be a string"),  # type: ignore[arg-type]
        (assistant(tool_calls=[call(), call()]), ".tool_calls[1].id", "of an earlier call"),
        (assistant(tool_calls=[call(name=None)]), ".tool_calls[0].function.name", "must be a string"),
        (assistant(tool_calls=[call(arguments=1)]), ".tool_calls[0].function.arguments", "must be a string"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, ".tool_call_id", "must be a string"),
    ],
)
def test_bad_messages_name_their_field(message: object, field: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        messages_from_json([USER, message])
    assert caught.value.field == f"messages[1]{field}"
    assert problem in caught.value.problem


def test_messages_must_be_a_list() -> None:
    with pytest.raises(RequestError, match="messages: must be a list, not null"):
        messages_from_json(None)


def test_tools_keep_their_function() -> None:
    function = {"parameters": {"type": "object"}, "strict": True, "name": "get_weather-2"}
    (made,) = tools_from_json([{"type": "function", "function": function}])
    assert made == Tool("get_weather-2", "", {"type": "object"}, function)
    assert list(made.function) == ["parameters", "strict", "name"]
    assert tools_from_json(None) == tools_from_json([]) == ()
    (bare,) = tools_from_json([tool(description=None, parameters=None)])
    assert (bare.description, bare.parameters) == ("", {})


@pytest.mark.parametrize(
    ("raw", "field", "problem"),
    [
        ("f", "", "must be an object"),
        ({"type": "retrieval"}, ".type", "must be function"),
        ({"type": "function"}, ".function", "must be an object, not null"),
        (tool(name=""), ".function.name", "1 to 64"),
        (tool(name='a"b'), ".function.name", "1 to 64"),
        (tool(name="a" * 65), ".function.name", "1 to 64"),
        (tool(name="f\n"), ".function.name", "1 to 64"),
        (tool(description=1), ".function.description", "must be a string"),
        (tool(parameters=[]), ".function.parameters", "must be an object"),
        (tool(parameters={"a": "\udc00"}), ".function", "lone surrogate"),
    ],
)
def test_bad_tools_name_their_field(raw: object, field: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        tools_from_json([tool(), raw])
    assert caught.value.field == f"tools[1]{field}"
    assert problem in caught.value.problem


def test_json_text() -> None:
    assert json_text("x", {"b": "ü", "a": [1, None]}) == '{"b": "ü", "a": [1, null]}'
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="x: is nested too deeply"):
        json_text("x", deep)


# Rules between messages


def calling(*ids: str) -> Message:
    return Message("assistant", tool_calls=tuple(ToolCall(call_id, "f", "{}") for call_id in ids))


def result(content: str, call_id: str | None = None) -> Message:
    return Message("tool", content, tool_call_id=call_id)


ASK = Message("user", "q")
ANSWER = Message("assistant", "a")


def test_results_are_put_into_the_order_of_the_calls() -> None:
    sent = [ASK, calling("1", "2", "3"), result("c", "3"), result("a", "1"), result("b", "2")]
    assert arrange(sent) == (*sent[:2], result("a", "1"), result("b", "2"), result("c", "3"))


def test_results_without_ids_keep_their_order() -> None:
    sent = (ASK, calling("1", "2"), result("x"), result("y"), ANSWER, ASK, calling("1"), result("z"))
    assert arrange(sent) == sent


def test_calls_may_stay_without_any_result() -> None:
    sent = (ASK, calling("1"), ASK)
    assert arrange(sent) == sent


@pytest.mark.parametrize(
    ("messages", "field", "problem"),
    [
        ([], "messages", "no message of the user"),
        ([Message("system", "s")], "messages", "no message of the user"),
        (
            [Message("system", "s"), Message("assistant", "a", prefix=True)],
            "messages",
            "no message of the user",
        ),
        ([ASK, ANSWER], "messages", "end with the assistant's turn"),
        ([ASK, ANSWER, Message("system", "s")], "messages", "end with the assistant's turn"),
        ([ASK, calling("1")], "messages", "end with the assistant's turn"),
        ([ASK, Message("assistant", "a", prefix=True), ASK], "messages[1].prefix", "only the last message"),
        ([ASK, Message("user", "a", prefix=True)], "messages[1].prefix", "of the assistant"),
        (
            [ASK, Message("assistant", tool_calls=calling("1").tool_calls, prefix=True)],
            "messages[1].tool_calls",
            "cannot hold tool calls",
        ),
        ([result("x"), ASK], "messages[0]", "must follow an assistant message"),
        ([ASK, result("x")], "messages[1]", "must follow an assistant message"),
        ([ASK, ANSWER, result("x")], "messages[2]", "must follow an assistant message"),
        (
            [ASK, calling("1", "2"), result("x", "1")],
            "messages[1].tool_calls",
            "2 calls are followed by 1 results",
        ),
        (
            [ASK, calling("1"), result("x", "1"), result("y")],
            "messages[1].tool_calls",
            "1 calls are followed by 2",
        ),
        (
            [ASK, calling("1"), result("x", "2")],
            "messages[2].tool_call_id",
            "one of the calls of messages[1]",
        ),
        (
            [ASK, calling("1", "2"), result("x", "1"), result("y", "1")],
            "messages[3].tool_call_id",
            "each once",
        ),
        (
            [ASK, calling("1", "2"), result("x", "1"), result("y")],
            "messages[3].tool_call_id",
            "one of the calls",
        ),
    ],
)
def test_conversations_without_a_form(messages: list[Message], field: str, problem: str) -> None:
    with pytest.raises(RequestError) as caught:
        arrange(messages)
    assert caught.value.field == field
    assert problem in caught.value.problem


def test_a_conversation_need_not_be_answered() -> None:
    assert arrange([ASK, ANSWER], to_answer=False) == (ASK, ANSWER)
    assert arrange([], to_answer=False) == ()


def test_what_json_can_spell_is_checked() -> None:
    with pytest.raises(RequestError, match="lone surrogate"):
        messages_from_json(json.loads('[{"role": "user", "content": "\\ud83d"}]'))

"""A conversation as it comes in: messages, tools, and the rules that hold between them.

Field names in errors are those of the request, e.g. `messages[3].content`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from model.errors import RequestError

Role = Literal["system", "developer", "user", "assistant", "tool"]

_ROLES = get_args(Role)
_TOOL_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call that the assistant made. `arguments` is JSON as the model wrote it, not always valid."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call.

    `function` is the request's own object: encodings that show the model the whole definition show this one,
    with its keys in their order.
    """

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. A `prefix` is the beginning of an assistant's turn that the model is to go on with."""

    role: Role
    content: str = ""
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    prefix: bool = False


def messages_from_json(raw: object) -> tuple[Message, ...]:
    """The `messages` of a request. Keys that no encoding shows, such as `name`, are passed over.

    Raises:
        RequestError: something in them is not of the right kind.
    """
    return tuple(_message(f"messages[{i}]", item) for i, item in enumerate(_list("messages", raw)))


def tools_from_json(raw: object) -> tuple[Tool, ...]:
    """The `tools` of a request; None is no tools.

    Raises:
        RequestError: something in them is not of the right kind.
    """
    return tuple(
        _tool(f"tools[{i}]", item) for i, item in enumerate(_list("tools", [] if raw is None else raw))
    )


def check_text(field: str, text: str) -> None:
    """Refuses text that has no UTF-8 form; JSON can spell it, no tokenizer can read it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, f"has a lone surrogate at character {error.start}") from error


def json_text(field: str, value: object) -> str:
    """`value` as the encodings write JSON: one line, no character escaped that need not be."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except RecursionError as error:
        raise RequestError(field, "is nested too deeply") from error
    check_text(field, text)
    return text


def arrange(messages: Sequence[Message], to_answer: bool = True) -> tuple[Message, ...]:
    """Checks the rules between messages, and puts the results of tool calls in the order of the calls.

    The encodings tell results apart by order alone, while clients send them in any order with the id of the
    call. Results without ids stay as they are.

    Args:
        messages: the conversation.
        to_answer: whether the model is to speak next, which not every conversation leaves room for.

    Raises:
        RequestError: the conversation cannot be rendered so that the model would understand it.
    """
    arranged: list[Message] = []
    for i, message in enumerate(messages):
        if message.prefix:
            _check_prefix(i, messages)
        if message.role == "tool" and (i == 0 or messages[i - 1].role != "tool"):
            arranged += _results(i, messages)
        elif message.role != "tool":
            arranged.append(message)
    if to_answer:
        _check_answerable(messages)
    return tuple(arranged)


def _check_prefix(i: int, messages: Sequence[Message]) -> None:
    if messages[i].role != "assistant" or i != len(messages) - 1:
        raise RequestError(
            f"messages[{i}].prefix", "only the last message, of the assistant, may be a prefix"
        )
    if messages[i].tool_calls:
        raise RequestError(f"messages[{i}].tool_calls", "a prefix cannot hold tool calls")


def _check_answerable(messages: Sequence[Message]) -> None:
    if not any(message.role in ("user", "developer") for message in messages):
        raise RequestError("messages", "hold no message of the user to answer")
    last = next(message for message in reversed(messages) if message.role != "system")
    if last.role == "assistant" and not last.prefix:
        raise RequestError(
            "messages",
            "end with the assistant's turn; add a message, or set its prefix to true to continue it",
        )


def _results(first: int, messages: Sequence[Message]) -> list[Message]:
    """The run of tool results starting at `first`, in the order of the calls they answer."""
    end = next((i for i in range(first, len(messages)) if messages[i].role != "tool"), len(messages))
    results = messages[first:end]
    caller = messages[first - 1] if first else None
    if caller is None or caller.role != "assistant" or not caller.tool_calls:
        raise RequestError(
            f"messages[{first}]", "a tool's result must follow an assistant message with tool_calls"
        )
    calls = caller.tool_calls
    if len(results) != len(calls):
        raise RequestError(
            f"messages[{first - 1}].tool_calls",
            f"{len(calls)} calls are followed by {len(results)} results; give one for each, without a gap",
        )
    if all(result.tool_call_id is None for result in results):
        return list(results)
    order = {call.id: n for n, call in enumerate(calls)}
    by_call: dict[int, Message] = {}
    for i, result in enumerate(results, start=first):
        n = order.get(result.tool_call_id or "")
        if n is None or n in by_call:
            problem = f"must name one of the calls of messages[{first - 1}], each once"
            raise RequestError(f"messages[{i}].tool_call_id", problem)
        by_call[n] = result
    return [by_call[n] for n in range(len(calls))]


def _message(field: str, raw: object) -> Message:
    entry = _object(field, raw)
    role = entry.get("role")
    if role not in _ROLES:
        raise RequestError(f"{field}.role", f"must be one of {', '.join(_ROLES)}")
    calls = _list(f"{field}.tool_calls", entry.get("tool_calls") or [])
    for key in ("tool_calls", "reasoning_content", "prefix"):
        if entry.get(key) and role != "assistant":
            raise RequestError(f"{field}.{key}", "only a message of the assistant may have it")
    prefix = entry.get("prefix") or False
    if not isinstance(prefix, bool):
        raise RequestError(f"{field}.prefix", "must be true or false")
    return Message(
        role=cast(Role, role),
        content=_content(f"{field}.content", entry.get("content"), may_be_absent=role == "assistant"),
        reasoning_content=_optional_string(f"{field}.reasoning_content", entry.get("reasoning_content")),
        tool_calls=_tool_calls(f"{field}.tool_calls", calls),
        tool_call_id=_optional_string(f"{field}.tool_call_id", entry.get("tool_call_id")),
        prefix=prefix,
    )


def _content(field: str, raw: object, may_be_absent: bool) -> str:
    """A string, or a list of text parts, which are joined by newlines."""
    if raw is None and may_be_absent:
        return ""
    if not isinstance(raw, list):
        return _string(field, raw)
    texts: list[str] = []
    for i, item in enumerate(raw):
        part = _object(f"{field}[{i}]", item)
        if part.get("type") != "text":
            raise RequestError(f"{field}[{i}].type", "must be text; this model reads nothing else")
        texts.append(_string(f"{field}[{i}].text", part.get("text")))
    return "\n".join(texts)


def _tool_calls(field: str, raw: list[Any]) -> tuple[ToolCall, ...]:
    calls: dict[str, ToolCall] = {}
    for i, item in enumerate(raw):
        entry = _function_entry(f"{field}[{i}]", item)
        function = _object(f"{field}[{i}].function", entry.get("function"))
        call_id = _string(f"{field}[{i}].id", entry.get("id"))
        if call_id in calls:
            raise RequestError(f"{field}[{i}].id", "is the id of an earlier call, too")
        arguments = function.get("arguments")
        where = f"{field}[{i}].function.arguments"
        if isinstance(arguments, dict):
            arguments = json_text(where, arguments)
        calls[call_id] = ToolCall(
            id=call_id,
            name=_string(f"{field}[{i}].function.name", function.get("name")),
            arguments=_string(where, arguments),
        )
    return tuple(calls.values())


def _tool(field: str, raw: object) -> Tool:
    function = _object(f"{field}.function", _function_entry(field, raw).get("function"))
    name = _string(f"{field}.function.name", function.get("name"))
    if not _TOOL_NAME.fullmatch(name):
        raise RequestError(
            f"{field}.function.name", "must be 1 to 64 letters, digits, underscores or hyphens"
        )
    parameters = function.get("parameters")
    json_text(f"{field}.function", function)
    return Tool(
        name=name,
        description=_optional_string(f"{field}.function.description", function.get("description")) or "",
        parameters=_object(f"{field}.function.parameters", {} if parameters is None else parameters),
        function=function,
    )


def _function_entry(field: str, raw: object) -> dict[str, Any]:
    """The outer object of a tool or of a call, which so far come in one type."""
    entry = _object(field, raw)
    if entry.get("type", "function") != "function":
        raise RequestError(f"{field}.type", "must be function")
    return entry


def _list(field: str, raw: object) -> list[Any]:
    if not isinstance(raw, list):
        raise RequestError(field, f"must be a list, not {_kind(raw)}")
    return raw


def _object(field: str, raw: object) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RequestError(field, f"must be an object, not {_kind(raw)}")
    return raw


def _string(field: str, raw: object) -> str:
    if not isinstance(raw, str):
        raise RequestError(field, f"must be a string, not {_kind(raw)}")
    check_text(field, raw)
    return raw


def _optional_string(field: str, raw: object) -> str | None:
    return None if raw is None else _string(field, raw)


def _kind(raw: object) -> str:
    """What a value is called in JSON."""
    kinds = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list"}
    return "null" if raw is None else kinds.get(type(raw), "an object")

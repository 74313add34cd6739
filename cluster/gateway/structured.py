"""Tools and schemas of a request, bounded in number, size and depth."""

from collections.abc import Mapping
from typing import Any

from cluster.gateway.errors import Kind, Refusal
from cluster.gateway.fields import Fields
from model.chat.messages import Tool, json_text, tools_from_json

MAX_TOOLS = 128
MAX_SCHEMA_BYTES = 64 * 1024
MAX_SCHEMA_DEPTH = 32


def read_tools(fields: Fields) -> tuple[Tool, ...]:
    """The tools that the model is shown: none where `tool_choice` says so."""
    raw = fields.items("tools")
    if raw is not None and len(raw) > MAX_TOOLS:
        raise fields.refuse("tools", f"has {len(raw)} entries; send at most {MAX_TOOLS}", Kind.INVALID_VALUE)
    tools = tools_from_json(raw)
    for i, tool in enumerate(tools):
        _check_schema(f"tools[{i}].function.parameters", tool.parameters)
    if len({tool.name for tool in tools}) != len(tools):
        raise fields.refuse("tools", "name one function twice", Kind.INVALID_VALUE)
    if fields.flag("parallel_tool_calls") is False:
        raise fields.refuse("parallel_tool_calls", "the model decides how many calls it makes; leave it out")
    choice = fields.get("tool_choice")
    match choice:
        case None | "auto":
            return tools
        case "none":
            return ()
        case "required" | {"type": "function"}:
            raise fields.refuse("tool_choice", "answers cannot be constrained; send auto or none")
    raise fields.refuse("tool_choice", "must be auto or none", Kind.INVALID_VALUE)


def read_schema(fields: Fields) -> Mapping[str, Any] | None:
    """The JSON schema that the model is shown; that its answer follows it cannot be promised."""
    response_format = fields.object("response_format")
    if response_format is None or response_format.need("type") == "text":
        return None
    if response_format.get("type") == "json_object":
        raise fields.refuse("response_format", "answers cannot be constrained to JSON; send a json_schema")
    wrapper = response_format.object("json_schema")
    if response_format.get("type") != "json_schema" or wrapper is None:
        raise fields.refuse("response_format", "must be of type text or json_schema", Kind.INVALID_VALUE)
    if wrapper.flag("strict"):
        raise wrapper.refuse(
            "strict", "answers cannot be constrained; leave it out to show the model the schema"
        )
    schema = wrapper.mapping("schema")
    if not schema:
        raise Refusal(Kind.MISSING, "is missing", wrapper.name("schema"))
    _check_schema(wrapper.name("schema"), schema)
    return schema


def _check_schema(name: str, schema: Mapping[str, Any]) -> None:
    if len(json_text(name, schema).encode()) > MAX_SCHEMA_BYTES:
        raise Refusal(Kind.INVALID_VALUE, f"is larger than {MAX_SCHEMA_BYTES} bytes", name)
    if _depth(schema) > MAX_SCHEMA_DEPTH:
        raise Refusal(Kind.INVALID_VALUE, f"is nested deeper than {MAX_SCHEMA_DEPTH} levels", name)


def _depth(value: object) -> int:
    if isinstance(value, Mapping):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0

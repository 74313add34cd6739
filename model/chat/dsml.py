"""The chat encoding of the December V3.2, whose tool calls are written in DSML, a markup of its own.

    BOS system [tools] [schema]
    <｜User｜>text<｜Assistant｜></think>answer EOS
    <｜User｜>text<｜Assistant｜><think>

Of the assistant's reasoning only that after the last message of a user is shown; there a turn may run through
several calls and their results. Unlike in V3.2-Exp the model thinks again after each set of results.

Where the published encoder fails or goes by position alone, this one has rules: results are matched to calls
by id (`arrange`), developer messages of earlier turns stay where they are, a turn without reasoning has an
empty one, and what cannot be shown is a RequestError. Its option `drop_thinking` has no counterpart: with it
or without, earlier reasoning is never shown.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from model.chat.markup import (
    ASSISTANT,
    BOS,
    DSML,
    DSML_CALLS,
    DSML_CALLS_END,
    DSML_INVOKE,
    DSML_INVOKE_END,
    DSML_PARAMETER,
    DSML_PARAMETER_END,
    END_THINK,
    EOS,
    THINK,
    USER,
    Piece,
    Prompt,
    mark,
    said,
)
from model.chat.messages import Message, Tool, ToolCall, arrange, check_text, json_text
from model.chat.preambles import DSML_DEVELOPER, DSML_SCHEMA, DSML_TOOLS
from model.errors import RequestError


def render(
    messages: Sequence[Message],
    tools: Sequence[Tool] = (),
    thinking: bool = False,
    response_format: Mapping[str, Any] | None = None,
) -> Prompt:
    """Renders a conversation, ready for the model to speak.

    Tools and schema belong to the first message where that is of the system or of a developer; otherwise they
    stand in front of it.

    Args:
        messages: the conversation; see `arrange` for the rules between them.
        tools: functions that the model may call.
        thinking: whether the answer starts with reasoning.
        response_format: JSON schema that the answer must follow.

    Raises:
        RequestError: the encoding has no form for this conversation.
    """
    messages = arrange(messages)
    last_user = max(i for i, message in enumerate(messages) if message.role in ("user", "developer"))
    extras = _extras(tools, response_format)
    pieces = [mark(BOS)]
    speaker = ""
    if messages[0].role not in ("system", "developer"):
        pieces += extras
        extras = []
    for i, message in enumerate(messages):
        thinks = mark(THINK if thinking and i >= last_user else END_THINK)
        match message.role:
            case "system":
                _check_system(f"messages[{i}].role", speaker)
                pieces += [said(message.content), *extras]
            case "user":
                pieces += [mark(USER), said(message.content), mark(ASSISTANT), thinks]
            case "developer":
                pieces += [mark(USER), *_developer(i, message, extras), mark(ASSISTANT), thinks]
            case "assistant":
                pieces += _assistant(f"messages[{i}]", message, with_reasoning=thinking and i > last_user)
            case "tool":
                is_first = messages[i - 1].role != "tool"
                is_last = i + 1 == len(messages) or messages[i + 1].role != "tool"
                pieces += _result(message, is_first)
                pieces += [mark("\n</function_results>\n\n"), thinks] if is_last else []
        extras = []
        speaker = message.role
    return Prompt(tuple(pieces), in_reasoning=thinking and not _is_past_reasoning(messages[-1]))


def _is_past_reasoning(last: Message) -> bool:
    return last.prefix and bool(last.content)


def _check_system(field: str, speaker: str) -> None:
    # System text has no marker of its own: behind one of these it would read as the assistant's own words.
    if speaker in ("user", "developer", "tool"):
        raise RequestError(field, f"must not be system directly after a message of the role {speaker}")


def _developer(i: int, message: Message, extras: list[Piece]) -> list[Piece]:
    if not message.content:
        raise RequestError(f"messages[{i}].content", "of a developer must not be empty")
    return [*extras, mark("\n\n" + DSML_DEVELOPER), said(message.content)]


def _assistant(field: str, message: Message, with_reasoning: bool) -> list[Piece]:
    pieces: list[Piece] = []
    if with_reasoning:
        pieces.append(said(message.reasoning_content or ""))
        if not message.prefix or message.content:
            pieces.append(mark(END_THINK))
    pieces.append(said(message.content))
    if message.tool_calls:
        pieces.append(mark(f"\n\n{DSML_CALLS}\n"))
        for i, call in enumerate(message.tool_calls):
            pieces += _call(f"{field}.tool_calls[{i}]", call)
        pieces.append(mark(DSML_CALLS_END))
    return pieces if message.prefix else [*pieces, mark(EOS)]


def _call(field: str, call: ToolCall) -> list[Piece]:
    parameters = "\n".join(_parameters(f"{field}.function.arguments", call.arguments))
    return [
        mark(DSML_INVOKE),
        said(call.name),
        mark('">\n'),
        said(parameters),
        mark(f"\n{DSML_INVOKE_END}\n"),
    ]


def _parameters(field: str, arguments: str) -> Iterator[str]:
    try:
        values = json.loads(arguments or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(field, f"must be JSON: {error}") from error
    if not isinstance(values, dict):
        raise RequestError(field, "must be a JSON object")
    for name, value in values.items():
        is_string, text = ("true", value) if isinstance(value, str) else ("false", json_text(field, value))
        line = f'{DSML_PARAMETER}{name}" string="{is_string}">{text}{DSML_PARAMETER_END}'
        check_text(field, line)
        yield line


def _result(message: Message, is_first: bool) -> list[Piece]:
    opening = "\n\n<function_results>\n<result>" if is_first else "\n<result>"
    return [mark(opening), said(message.content), mark("</result>")]


def _extras(tools: Sequence[Tool], response_format: Mapping[str, Any] | None) -> list[Piece]:
    """The tools section and the schema section, each behind a blank line."""
    pieces: list[Piece] = []
    if tools:
        preamble, _, rest = DSML_TOOLS.partition("{tool_schemas}")
        preamble = preamble.format(dsml_token=DSML, thinking_start_token=THINK, thinking_end_token=END_THINK)
        schemas = [json_text(f"tools[{i}].function", tool.function) for i, tool in enumerate(tools)]
        pieces += [mark("\n\n" + preamble), said("\n".join(schemas)), mark(rest)]
    if response_format:
        pieces += [mark("\n\n" + DSML_SCHEMA), said(json_text("response_format", response_format))]
    return pieces

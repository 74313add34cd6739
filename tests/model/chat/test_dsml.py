import hashlib
import json
from typing import Any

import pytest

from model.chat import dsml
from model.chat.messages import Message, ToolCall, messages_from_json, tools_from_json
from model.chat.preambles import DSML_TOOLS
from model.errors import RequestError

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

TOOLS = tools_from_json(
    [
        {"type": "function", "function": {"strict": True, "name": "f", "description": "dö"}},
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}},
    ]
)
SCHEMAS = (
    '<functions>\n{"strict": true, "name": "f", "description": "dö"}\n'
    '{"name": "g", "parameters": {"type": "object"}}\n</functions>\n'
)
SCHEMA_HEADING = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"

CONVERSATION = [
    Message("system", "S"),
    Message("user", "U1"),
    Message("assistant", "A1", reasoning_content="R1"),
    Message("user", "U2"),
    Message(
        "assistant",
        reasoning_content="R2",
        tool_calls=(
            ToolCall("1", "f", json.dumps({"s": 'a "b"\n<c>', "n": 1.5, "l": ["ü", None], "t": True})),
            ToolCall("2", "g", ""),
        ),
    ),
    Message("tool", "T1", tool_call_id="1"),
    Message("tool", "T2", tool_call_id="2"),
]
BLOCK = (
    "<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="f">\n'
    '<｜DSML｜parameter name="s" string="true">a "b"\n<c></｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="n" string="false">1.5</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="l" string="false">["ü", null]</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="t" string="false">true</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n"
    '<｜DSML｜invoke name="g">\n\n</｜DSML｜invoke>\n'
    "</｜DSML｜function_calls>"
)
RESULTS = "\n\n<function_results>\n<result>T1</result>\n<result>T2</result>\n</function_results>\n\n"


def test_preamble_is_unchanged() -> None:
    assert len(DSML_TOOLS) == 1203
    digest = hashlib.sha256(DSML_TOOLS.encode()).hexdigest()
    assert digest == "6b993cb4b6222bcfbba2d324a7e8f45b4fb3ca70a39619e6276880ab531b709c"


def test_golden_thinking() -> None:
    prompt = dsml.render(CONVERSATION, thinking=True)
    assert prompt.text == (
        f"{BOS}S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜><think>R2</think>"
        f"\n\n{BLOCK}{EOS}{RESULTS}<think>"
    )
    assert prompt.in_reasoning


def test_golden_chat() -> None:
    prompt = dsml.render(CONVERSATION)
    assert prompt.text == (
        f"{BOS}S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜></think>"
        f"\n\n{BLOCK}{EOS}{RESULTS}</think>"
    )
    assert not prompt.in_reasoning


def test_reasoning_of_earlier_turns_is_dropped() -> None:
    later = [*CONVERSATION, Message("assistant", "A2", reasoning_content="R3"), Message("user", "U3")]
    text = dsml.render(later, thinking=True).text
    assert text == (
        f"{BOS}S<｜User｜>U1<｜Assistant｜></think>A1{EOS}<｜User｜>U2<｜Assistant｜></think>"
        f"\n\n{BLOCK}{EOS}{RESULTS}</think>A2{EOS}<｜User｜>U3<｜Assistant｜><think>"
    )


def test_results_follow_the_order_of_the_calls() -> None:
    swapped = [*CONVERSATION[:5], CONVERSATION[6], CONVERSATION[5]]
    assert dsml.render(swapped) == dsml.render(CONVERSATION)


def test_a_turn_without_reasoning_has_an_empty_one() -> None:
    messages = [
        Message("user", "q"),
        CONVERSATION[4],
        *CONVERSATION[5:],
        Message("assistant", "done", prefix=True),
    ]
    text = dsml.render(messages, thinking=True).text
    assert text.endswith(f"{RESULTS}<think></think>done")


# Tools and schema


def preamble() -> str:
    return (
        DSML_TOOLS.partition("<functions>")[0]
        .replace("{dsml_token}", "｜DSML｜")
        .replace("{thinking_start_token}", "<think>")
        .replace("{thinking_end_token}", "</think>")
    )


@pytest.mark.parametrize("thinking", [False, True])
def test_tools_and_schema_belong_to_the_system_message(thinking: bool) -> None:
    messages = [Message("system", "S"), Message("user", "q")]
    text = dsml.render(messages, TOOLS, thinking, {"ü": {}}).text
    assert text == (
        f'{BOS}S\n\n{preamble()}{SCHEMAS}\n\n{SCHEMA_HEADING}{{"ü": {{}}}}'
        f"<｜User｜>q<｜Assistant｜>{'<think>' if thinking else '</think>'}"
    )
    assert "{" not in preamble()


def test_without_a_system_message_they_stand_alone() -> None:
    question = Message("user", "q")
    assert dsml.render([question], TOOLS).text == dsml.render([Message("system"), question], TOOLS).text
    assert dsml.render([question], response_format={"a": 1}).text.startswith(f"{BOS}\n\n{SCHEMA_HEADING}")


def test_a_developer_carries_them() -> None:
    text = dsml.render([Message("developer", "D")], TOOLS, True, {}).text
    assert text == (
        f"{BOS}<｜User｜>\n\n{preamble()}{SCHEMAS}\n\n# The user's message is: D<｜Assistant｜><think>"
    )


def test_an_earlier_developer_message_stays() -> None:
    messages = [
        Message("developer", "D"),
        Message("assistant", "A", reasoning_content="R"),
        Message("user", "U"),
    ]
    assert dsml.render(messages, thinking=True).text == (
        f"{BOS}<｜User｜>\n\n# The user's message is: D<｜Assistant｜></think>A{EOS}"
        "<｜User｜>U<｜Assistant｜><think>"
    )


def test_system_messages_stand_where_they_are() -> None:
    messages = [
        Message("system", "S1"),
        Message("system", "S2"),
        Message("user", "q"),
        Message("assistant", "a"),
    ]
    text = dsml.render([*messages, Message("system", "S3"), Message("user", "r")]).text
    assert text == (f"{BOS}S1S2<｜User｜>q<｜Assistant｜></think>a{EOS}S3<｜User｜>r<｜Assistant｜></think>")


@pytest.mark.parametrize(
    ("reasoning", "content", "thinking", "ending", "in_reasoning"),
    [
        ("R", "", True, "<think>R", True),
        (None, "", True, "<think>", True),
        ("R", "C", True, "<think>R</think>C", False),
        (None, "C", True, "<think></think>C", False),
        ("R", "C", False, "</think>C", False),
    ],
)
def test_prefix(reasoning: str | None, content: str, thinking: bool, ending: str, in_reasoning: bool) -> None:
    last = Message("assistant", content, reasoning_content=reasoning, prefix=True)
    prompt = dsml.render([Message("user", "q"), last], thinking=thinking)
    assert prompt.text == f"{BOS}<｜User｜>q<｜Assistant｜>{ending}"
    assert prompt.in_reasoning == in_reasoning


# Refusals


@pytest.mark.parametrize("arguments", ["{", "[]", "1", '{"a": ' + "[" * 100_000, '"x"', '{"a": "\\ud800"}'])
def test_arguments_must_be_a_json_object(arguments: str) -> None:
    messages = [
        Message("user", "q"),
        Message("assistant", tool_calls=(ToolCall("0", "f", "{}"), ToolCall("1", "f", arguments))),
        Message("user", "r"),
    ]
    with pytest.raises(RequestError) as caught:
        dsml.render(messages)
    assert caught.value.field == "messages[1].tool_calls[1].function.arguments"


@pytest.mark.parametrize("before", ["user", "developer", "tool"])
def test_no_system_message_inside_a_turn(before: str) -> None:
    raw: dict[str, list[dict[str, Any]]] = {
        "user": [{"role": "user", "content": "q"}],
        "developer": [{"role": "developer", "content": "q"}],
        "tool": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
            {"role": "tool", "content": "t"},
        ],
    }
    messages = [*messages_from_json(raw[before]), Message("system", "x"), Message("system", "y")]
    with pytest.raises(RequestError, match=f"directly after a message of the role {before}") as caught:
        dsml.render(messages)
    assert caught.value.field == f"messages[{len(raw[before])}].role"


def test_a_developer_must_say_something() -> None:
    with pytest.raises(RequestError, match=r"messages\[0\]\.content: of a developer must not be empty"):
        dsml.render([Message("developer", "")])

import json
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat import exp
from model.chat.messages import Message, Tool, ToolCall, messages_from_json
from model.errors import RequestError

DEMO_DIR = Path(__file__).parents[3] / "model" / "demo"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def _template() -> jinja2.Template:
    config = json.loads((DEMO_DIR / "tokenizer_config.json").read_text(encoding="utf-8"))
    # Block trimming as in transformers, for which such templates are written.
    return jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(config["chat_template"])


TEMPLATE = _template()


def by_template(messages: list[dict[str, Any]], thinking: bool, add_generation_prompt: bool = True) -> str:
    return TEMPLATE.render(
        messages=messages, bos_token=BOS, thinking=thinking, add_generation_prompt=add_generation_prompt
    )


texts = st.sampled_from(
    ["", "hi", "a\n\n", " b", "R</think>A", "</think>", "<think>x", "{{ x }}", "<｜User｜>", "ü"]
)
calls = st.builds(lambda name, arguments: (name, arguments), st.sampled_from(["f", "g_1"]), texts)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 4))):
        for _ in range(draw(st.integers(0, 2))):
            messages.append({"role": "system", "content": draw(texts)})
        messages.append({"role": "user", "content": draw(texts)})
        for made in draw(st.lists(st.lists(calls, min_size=1, max_size=3), max_size=2)):
            tool_calls = [
                {"id": f"c{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(made)
            ]
            messages.append(
                {"role": "assistant", "content": draw(texts | st.none()), "tool_calls": tool_calls}
            )
            messages += [
                {"role": "tool", "content": draw(texts), "tool_call_id": f"c{i}"} for i in range(len(made))
            ]
        messages += [{"role": "assistant", "content": draw(texts)} for _ in range(draw(st.integers(0, 2)))]
    return messages


@settings(deadline=None, max_examples=200)
@given(raw=conversations(), thinking=st.booleans(), ending=st.sampled_from(["user", "prefix", "as it is"]))
def test_same_as_the_template(raw: list[dict[str, Any]], thinking: bool, ending: str) -> None:
    if ending == "user":
        raw = [*raw, {"role": "user", "content": "last"}]
    elif ending == "prefix":
        raw = [*raw, {"role": "assistant", "content": "begin", "prefix": True}]
    spoken_last = next(message for message in reversed(raw) if message["role"] != "system")
    answerable = spoken_last["role"] != "assistant" or ending == "prefix"
    prompt = exp.render(messages_from_json(raw), (), thinking, add_generation_prompt=answerable)
    assert prompt.text == by_template(raw, thinking, answerable)
    assert prompt.in_reasoning == (
        prompt.text.endswith("<think>") or (ending == "prefix" and prompt.text.endswith("<think>begin"))
    )


def test_golden() -> None:
    messages = [
        Message("system", "S1"),
        Message("user", "hello"),
        Message("assistant", "Hello!", reasoning_content="never shown"),
        Message("system", "S2"),
        Message("user", "1+1=?"),
    ]
    prompt = exp.render(messages, thinking=True)
    assert prompt.text == (
        f"{BOS}S1\n\nS2<｜User｜>hello<｜Assistant｜></think>Hello!{EOS}<｜User｜>1+1=?<｜Assistant｜><think>"
    )
    assert prompt.in_reasoning


def test_tool_turn() -> None:
    made = (ToolCall("1", "f", '{"a": 1}'), ToolCall("2", "g", "{}"))
    messages = [
        Message("user", "q"),
        Message("assistant", "let me see", tool_calls=made),
        Message("tool", "T2", tool_call_id="2"),
        Message("tool", "T1", tool_call_id="1"),
    ]
    prompt = exp.render(messages, thinking=True)
    assert prompt.text == (
        f"{BOS}<｜User｜>q<｜Assistant｜></think>let me see"
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
        f"{EOS}<｜tool▁output▁begin｜>T1<｜tool▁output▁end｜><｜tool▁output▁begin｜>T2<｜tool▁output▁end｜>"
    )
    assert not prompt.in_reasoning


def test_tools_block() -> None:
    tools = [
        Tool("f", "does ü", {"type": "object", "b": 1, "a": "<"}, {}),
        Tool("g", "", {}, {}),
    ]
    prompt = exp.render([Message("system", "S"), Message("user", "q")], tools)
    assert prompt.text == (
        f"{BOS}S\n\n## Tools\nYou have access to the following tools:\n\n"
        '### f\nDescription: does ü\n\nParameters: {"type": "object", "b": 1, "a": "<"}\n\n'
        "### g\nDescription: \n\nParameters: {}\n\n"
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n"
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>tool_call_arguments"
        "<｜tool▁call▁end｜>{additional_tool_calls}<｜tool▁calls▁end｜>\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces"
        "<｜User｜>q<｜Assistant｜></think>"
    )


@pytest.mark.parametrize(
    ("reasoning", "content", "thinking", "ending", "in_reasoning"),
    [
        (None, "C", True, "<think>C", True),
        ("R", "", True, "<think>R", True),
        ("R", "C", True, "<think>R</think>C", False),
        ("", "C", True, "<think></think>C", False),
        ("R", "C", False, "</think>C", False),
        (None, "R</think>C", False, "</think>C", False),
    ],
)
def test_prefix(reasoning: str | None, content: str, thinking: bool, ending: str, in_reasoning: bool) -> None:
    last = Message("assistant", content, reasoning_content=reasoning, prefix=True)
    prompt = exp.render([Message("user", "q"), last], thinking=thinking)
    assert prompt.text == f"{BOS}<｜User｜>q<｜Assistant｜>{ending}"
    assert prompt.in_reasoning == in_reasoning


def test_refusals() -> None:
    with pytest.raises(RequestError, match=r"messages\[1\]\.role: must not be developer"):
        exp.render([Message("user", "q"), Message("developer", "d")])
    with pytest.raises(RequestError, match="messages: end with the assistant's turn"):
        exp.render([Message("user", "q"), Message("assistant", "a")])
    half = Message("assistant", "R</think>C", prefix=True)
    with pytest.raises(RequestError, match=r"messages\[1\]\.content: must not contain </think>"):
        exp.render([Message("user", "q"), half], thinking=True)

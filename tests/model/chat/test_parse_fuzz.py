"""Properties of the parser: on anything at all, on what was rendered, and on very long answers."""

import gc
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.chat.encoding import ChatEncoding
from model.chat.events import (
    ContentDelta,
    Event,
    ReasoningDelta,
    ToolCallDelta,
    ToolCallEnd,
    ToolCallStart,
    merge,
)
from model.chat.messages import Message, ToolCall

EXP, DSML = ChatEncoding.EXP, ChatEncoding.DSML

BEGIN, CALL, SEP, END, DONE = (
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>",
)
OPEN, CLOSE = "<｜DSML｜function_calls>", "</｜DSML｜function_calls>"
INVOKE, INVOKED = '<｜DSML｜invoke name="', "</｜DSML｜invoke>"
PARAMETER, GIVEN = '<｜DSML｜parameter name="', "</｜DSML｜parameter>"


def parse(encoding: ChatEncoding, in_reasoning: bool, *pieces: str) -> list[Event]:
    parser = encoding.parser(in_reasoning)
    events = [event for piece in pieces for event in parser.push(piece)]
    return merge(events + parser.finish())


def string(name: str, value: str) -> str:
    return f'{PARAMETER}{name}" string="true">{value}{GIVEN}\n'


def value(name: str, text: str) -> str:
    return f'{PARAMETER}{name}" string="false">{text}{GIVEN}\n'


FRAGMENTS = [
    *(BEGIN, CALL, SEP, END, DONE, OPEN, CLOSE, INVOKE, INVOKED, PARAMETER, GIVEN, "</think>", "<think>"),
    *(
        'f">',
        'f">\n',
        '" string="',
        'a" string="true">',
        'b" string="false">',
        '[1, {"x": null}]',
        "f",
        "\n",
        "\n\n",
    ),
    *(
        "<",
        "</",
        "<｜",
        "<｜tool▁call",
        "</｜DSML｜",
        "<｜DSML｜in",
        " ",
        " " * 70,
        "x" * 300,
        '"',
        "\\",
        "ü🙂",
        "{}",
    ),
    f"{BEGIN}{CALL}f{SEP}",
    f"{END}{DONE}",
    f'{OPEN}\n{INVOKE}f">\n',
    f'{PARAMETER}b" string="false">7{GIVEN}',
    f"{INVOKED}\n{CLOSE}",
]


@pytest.mark.parametrize("encoding", list(ChatEncoding))
@settings(deadline=None, max_examples=250)
@given(
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join),
    in_reasoning=st.booleans(),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_anything_at_all(encoding: ChatEncoding, text: str, in_reasoning: bool, cuts: list[int]) -> None:
    events = parse(encoding, in_reasoning, text)
    ends = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[i:j] for i, j in pairwise(ends)]
    assert parse(encoding, in_reasoning, *pieces) == events
    assert parse(encoding, in_reasoning, *text) == events
    check_order(encoding, events)


def check_order(encoding: ChatEncoding, events: list[Event]) -> None:
    """Calls are numbered, do not overlap, and of those that ended the arguments are what they promise."""
    is_open, num_calls, arguments = False, 0, ""
    for event in events:
        match event:
            case ToolCallStart(index, call_id, name):
                assert (index, call_id) == (num_calls, f"call_{num_calls}")
                assert name.strip()
                is_open, num_calls, arguments = True, num_calls + 1, ""
            case ToolCallDelta(index, text):
                assert is_open
                assert index == num_calls - 1
                assert text
                arguments += text
            case ToolCallEnd(index):
                assert is_open
                assert index == num_calls - 1
                assert encoding is EXP or isinstance(json.loads(arguments), dict)
                is_open = False
            case ContentDelta(text) | ReasoningDelta(text):
                assert text
                is_open = False


# What was rendered is read back

names = st.text(st.sampled_from("abc_-019"), min_size=1, max_size=8)
plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "｜" not in text)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain, inner, max_size=3),
    max_leaves=6,
)
calls = st.tuples(names, st.dictionaries(names, values, max_size=4))


@pytest.mark.parametrize("encoding", list(ChatEncoding))
@settings(deadline=None, max_examples=100)
@given(made=st.lists(calls, min_size=1, max_size=3), said=plain, thought=plain, data=st.data())
def test_round_trip(
    encoding: ChatEncoding,
    made: list[tuple[str, dict[str, Any]]],
    said: str,
    thought: str,
    data: st.DataObject,
) -> None:
    said, thought = said.replace("<", ""), thought.replace("<", "")
    turn = Message(
        "assistant",
        said,
        reasoning_content=thought,
        tool_calls=tuple(ToolCall(str(i), name, json.dumps(given)) for i, (name, given) in enumerate(made)),
    )
    results = [Message("tool", tool_call_id=str(i)) for i in range(len(made))]
    text = encoding.render([Message("user", "q"), turn, *results], thinking=True).text
    # V3.2-Exp shows no reasoning of a turn that is over.
    opening = "<think>" if encoding is DSML else "</think>"
    answer = text.partition(f"<｜Assistant｜>{opening}")[2].partition("<｜end▁of▁sentence｜>")[0]
    at = data.draw(st.integers(0, len(answer)))
    events = parse(encoding, encoding is DSML, answer[:at], answer[at:])

    calls_read = [event.name for event in events if isinstance(event, ToolCallStart)]
    arguments = [event.arguments for event in events if isinstance(event, ToolCallDelta)]
    assert calls_read == [name for name, _ in made]
    assert [json.loads(each) for each in arguments] == [given for _, given in made]
    assert [event.text for event in events if isinstance(event, ContentDelta)] == ([said] if said else [])
    assert [event.text for event in events if isinstance(event, ReasoningDelta)] == (
        [thought] if thought and encoding is DSML else []
    )


# Time


@pytest.fixture
def _without_collection() -> Iterator[None]:
    """The collector looks at everything pytest holds, now and then, which is not the parser's time."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_without_collection")
@pytest.mark.parametrize(
    ("encoding", "head", "unit"),
    [
        (EXP, "", BEGIN),
        (EXP, "", f"{BEGIN}{CALL}"),
        (EXP, BEGIN, f"{CALL}f{SEP}{{}}{END}"),
        (EXP, "", f"{BEGIN}{CALL}f{SEP}{{}}{DONE}"),
        (DSML, "", "\n" * 40),
        (DSML, "", OPEN),
        (DSML, "", f"{OPEN}\n\n"),
        (DSML, "", f"{OPEN}{INVOKE}xxxxxxxx"),
        (DSML, f"{OPEN}{INVOKE}", "x" * 40),
        (DSML, OPEN, " " * 40),
        (DSML, OPEN, f'{INVOKE}f">{string("a", "x")}{INVOKED}'),
        (DSML, f'{OPEN}{INVOKE}f">{PARAMETER}a" string="false">', "[" * 40),
        (DSML, f'{OPEN}{INVOKE}f">{PARAMETER}a" string="false">', "9" * 40),
        (DSML, f'{OPEN}{INVOKE}f">{PARAMETER}a" string="true">', "</" * 20),
    ],
)
def test_long_answers_take_linear_time(encoding: ChatEncoding, head: str, unit: str) -> None:
    """60 times the text may take 60 times as long, with room for noise, but not 3,600 times as long."""

    def seconds(count: int) -> float:
        text = head + unit * count + GIVEN
        start = time.process_time()
        parse(encoding, False, text)
        parse(encoding, False, *(text[i : i + 20] for i in range(0, len(text), 20)))
        return time.process_time() - start

    assert seconds(6_000) < 250 * min(seconds(100) for _ in range(3))

import pytest

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


def content(text: str) -> list[Event]:
    return [ContentDelta(text)]


def reasoning(text: str) -> list[Event]:
    return [ReasoningDelta(text)]


def call(index: int, name: str, arguments: str) -> list[Event]:
    return [*broken(index, name, arguments), ToolCallEnd(index)]


def broken(index: int, name: str, arguments: str = "") -> list[Event]:
    deltas: list[Event] = [ToolCallDelta(index, arguments)] if arguments else []
    return [ToolCallStart(index, f"call_{index}", name), *deltas]


def string(name: str, value: str) -> str:
    return f'{PARAMETER}{name}" string="true">{value}{GIVEN}\n'


def value(name: str, text: str) -> str:
    return f'{PARAMETER}{name}" string="false">{text}{GIVEN}\n'


ODD = '\n"\\\t</｜DSML｜param漢🙂\x00 '
QUOTED = 'he"y'

# (encoding, begins in reasoning, text, events)
Sample = tuple[ChatEncoding, bool, str, list[Event]]

WELL_FORMED: dict[str, Sample] = {
    "empty": (EXP, True, "", []),
    "content": (EXP, False, "Héllo </think> 🙂", content("Héllo </think> 🙂")),
    "reasoning": (EXP, True, "R1</think>A</think>", [*reasoning("R1"), *content("A</think>")]),
    "no content": (DSML, True, "R</think>", reasoning("R")),
    "no reasoning": (DSML, True, "</think>A", content("A")),
    "look-alikes": (
        DSML,
        True,
        "<</th</thin</think><\n\n</｜D\n",
        [*reasoning("<</th</thin"), *content("<\n\n</｜D\n")],
    ),
    "exp call": (
        EXP,
        True,
        f'R</think>C{BEGIN}{CALL}f{SEP}{{"a": "ü"}}{END}{DONE}',
        [*reasoning("R"), *content("C"), *call(0, "f", '{"a": "ü"}')],
    ),
    "exp calls": (
        EXP,
        False,
        f"{BEGIN}{CALL}f{SEP}[<]{END}{CALL}g{SEP}{END}{DONE}",
        [*call(0, "f", "[<]"), *call(1, "g", "{}")],
    ),
    "exp spaces": (
        EXP,
        False,
        f"{BEGIN}\n{CALL} f {SEP}\n{END}\n{DONE}\n",
        [*call(0, "f", "\n{}"), *content("\n")],
    ),
    "exp call in reasoning": (EXP, True, f"a{BEGIN}{CALL}f", reasoning(f"a{BEGIN}{CALL}f")),
    "exp without the last end": (
        EXP,
        False,
        f"{BEGIN}{CALL}f{SEP}1{DONE} ",
        [*call(0, "f", "1"), *content(" ")],
    ),
    "exp two blocks": (
        EXP,
        False,
        f"{BEGIN}{CALL}f{SEP}1{END}{DONE} {BEGIN}{CALL}g{SEP}2{END}",
        [*call(0, "f", "1"), *content(" "), *call(1, "g", "2")],
    ),
    "dsml call": (
        DSML,
        True,
        f'R</think>C\n\n{OPEN}\n{INVOKE}f">\n{string("a", "x")}{INVOKED}\n{CLOSE}',
        [*reasoning("R"), *content("C"), *call(0, "f", '{"a": "x"}')],
    ),
    "dsml calls": (
        DSML,
        False,
        f'\n\n{OPEN}\n{INVOKE}f">\n{value("n", " [1] ")}{INVOKED}\n{INVOKE}g">\n\n{INVOKED}\n{CLOSE}\n',
        [*call(0, "f", '{"n":  [1] }'), *call(1, "g", "{}"), *content("\n")],
    ),
    "dsml string": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{string("ü", ODD)}{INVOKED}{CLOSE}',
        call(0, "f", '{"ü": "\\n\\"\\\\\\t</｜DSML｜param漢🙂\\u0000 "}'),
    ),
    "dsml no JSON": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{value("a", "NaN")}{value("b", QUOTED)}{INVOKED}{CLOSE}',
        call(0, "f", '{"a": "NaN", "b": "he\\"y"}'),
    ),
    "dsml after newlines": (
        DSML,
        False,
        f'a\n\n\n{OPEN}{INVOKE}f">{INVOKED}',
        [*content("a\n"), *call(0, "f", "{}")],
    ),
}

MALFORMED: dict[str, Sample] = {
    "exp cut opener": (EXP, False, "a<｜tool▁calls▁beg", content("a<｜tool▁calls▁beg")),
    "exp no call": (EXP, False, f"a{BEGIN}b", content(f"a{BEGIN}b")),
    "exp empty block": (EXP, False, f"{BEGIN} {DONE}", content(f"{BEGIN} {DONE}")),
    "exp no name": (EXP, False, f"{BEGIN}{CALL} {SEP}1{END}", content(f"{BEGIN}{CALL} {SEP}1{END}")),
    "exp bad name": (EXP, False, f"{BEGIN}{CALL}f\n{SEP}1", content(f"{BEGIN}{CALL}f\n{SEP}1")),
    "exp bare call": (EXP, False, f"{CALL}f{SEP}1{END}", content(f"{CALL}f{SEP}1{END}")),
    "exp opener twice": (
        EXP,
        False,
        f"{BEGIN} {BEGIN}{CALL}f{SEP}1{END}{DONE}",
        [*content(f"{BEGIN} "), *call(0, "f", "1")],
    ),
    "exp cut head": (EXP, False, f"{BEGIN}{CALL}f<｜tool", content(f"{BEGIN}{CALL}f<｜tool")),
    "exp cut arguments": (EXP, False, f"{BEGIN}{CALL}f{SEP}{{<｜tool", broken(0, "f", "{<｜tool")),
    "exp text between calls": (
        EXP,
        False,
        f"{BEGIN}{CALL}f{SEP}1{END} so {BEGIN}{CALL}g{SEP}2{END}",
        [*call(0, "f", "1"), *content(" so "), *call(1, "g", "2")],
    ),
    "exp gap at the end": (EXP, False, f"{BEGIN}{CALL}f{SEP}1{END}\n ", call(0, "f", "1")),
    "dsml cut opener": (DSML, False, "a\n\n<｜DSML｜func", content("a\n\n<｜DSML｜func")),
    "dsml no call": (DSML, False, f"a\n\n{OPEN}\n{CLOSE}", content(f"a\n\n{OPEN}\n{CLOSE}")),
    "dsml cut name": (DSML, False, f"{OPEN}\n{INVOKE}get", content(f"{OPEN}\n{INVOKE}get")),
    "dsml no name": (DSML, False, f'{OPEN}{INVOKE}">{INVOKED}', content(f'{OPEN}{INVOKE}">{INVOKED}')),
    "dsml bare invoke": (DSML, False, f'{INVOKE}f">{INVOKED}', content(f'{INVOKE}f">{INVOKED}')),
    "dsml text in a call": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{string("a", "x")} but {INVOKED}{CLOSE}',
        [*broken(0, "f", '{"a": "x"'), *content(f"\n but {INVOKED}{CLOSE}")],
    ),
    "dsml parameter twice": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{string("a", "x")}{value("a", "1")}',
        [*broken(0, "f", '{"a": "x"'), *content("\n" + value("a", "1"))],
    ),
    "dsml no kind": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{PARAMETER}a" string="maybe">',
        [*broken(0, "f"), *content(f'{PARAMETER}a" string="maybe">')],
    ),
    "dsml cut parameter": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">\n{PARAMETER}a" str',
        [*broken(0, "f"), *content(f'\n{PARAMETER}a" str')],
    ),
    "dsml cut string": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{PARAMETER}a" string="true">x"</｜DSML',
        broken(0, "f", '{"a": "x\\"</｜DSML'),
    ),
    "dsml cut value": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{PARAMETER}a" string="false">[1, </｜',
        broken(0, "f", '{"a": [1, </｜'),
    ),
    "dsml cut between calls": (DSML, False, f'{OPEN}{INVOKE}f">{INVOKED}\n', call(0, "f", "{}")),
    "dsml cut in a call": (DSML, False, f'{OPEN}{INVOKE}f">\n', broken(0, "f")),
    "dsml text between calls": (
        DSML,
        False,
        f'{OPEN}{INVOKE}f">{INVOKED}\nso\n\n{OPEN}{INVOKE}g">{INVOKED}{CLOSE}',
        [*call(0, "f", "{}"), *content("\nso"), *call(1, "g", "{}")],
    ),
}

SAMPLES = WELL_FORMED | MALFORMED
samples = pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES.keys())


@samples
def test_events(sample: Sample) -> None:
    encoding, in_reasoning, text, expected = sample
    assert parse(encoding, in_reasoning, text) == expected


@samples
def test_cuts_make_no_difference(sample: Sample) -> None:
    encoding, in_reasoning, text, expected = sample
    assert parse(encoding, in_reasoning, *text) == expected
    for at in range(len(text) + 1):
        assert parse(encoding, in_reasoning, text[:at], text[at:]) == expected
    # All pairs of cuts; of long texts those that are no further apart than a marker is long.
    reach = len(text) if len(text) <= 150 else 30
    for i in range(1, len(text)):
        for j in range(i + 1, min(i + reach, len(text))):
            assert parse(encoding, in_reasoning, text[:i], text[i:j], text[j:]) == expected


# Holding back


@pytest.mark.parametrize(
    ("encoding", "in_reasoning", "markers"),
    [
        (EXP, True, ["</think>"]),
        (EXP, False, [BEGIN]),
        (DSML, False, [OPEN, f"\n\n{OPEN}"]),
    ],
)
def test_no_more_is_held_back_than_a_marker_may_need(
    encoding: ChatEncoding, in_reasoning: bool, markers: list[str]
) -> None:
    text = "a<b</thin <<｜tool▁calls▁x\n\n\n<｜\n<｜DSML｜function_call \n\n<｜DSML｜funk</"
    parser, shown = encoding.parser(in_reasoning), ""
    for at, character in enumerate(text, start=1):
        for event in parser.push(character):
            assert isinstance(event, ReasoningDelta if in_reasoning else ContentDelta)
            shown += event.text
        held = text[len(shown) : at]
        assert text.startswith(shown)
        longest = max(
            (end for end in range(at) if any(marker.startswith(text[end:at]) for marker in markers)),
            key=lambda end: at - end,
            default=at,
        )
        assert held == text[longest:at]


def test_strings_stream_and_other_values_wait() -> None:
    parser = DSML.parser(False)
    parser.push(f'{OPEN}{INVOKE}f">')
    assert parser.push(f'{PARAMETER}a" string="true">') == [ToolCallDelta(0, '{"a": '), ToolCallDelta(0, '"')]
    assert parser.push("one") == [ToolCallDelta(0, "one")]
    assert parser.push(" two<") == [ToolCallDelta(0, " two")]
    parser.push(f'/｜DSML｜parameter>{PARAMETER}b" string="false">')
    assert parser.push("[1,") == parser.push("2]") == []
    assert merge(parser.push(GIVEN)) == [ToolCallDelta(0, "[1,2]")]


@pytest.mark.parametrize(
    ("encoding", "head"),
    [
        (EXP, f"{BEGIN}{CALL}" + "x" * 256),
        (EXP, BEGIN + "\n" * 64),
        (DSML, f"{OPEN}{INVOKE}" + "x" * 256),
        (DSML, OPEN + "\n" * 64),
    ],
)
def test_heads_are_held_back_up_to_a_limit(encoding: ChatEncoding, head: str) -> None:
    parser = encoding.parser(False)
    assert parser.push(head) == []
    assert merge(parser.push(head[-1] + ".")) == content(head + head[-1] + ".")


def test_large_numbers_stay_numbers() -> None:
    digits = "9" * 5_000  # more than Python turns into an int
    events = parse(DSML, False, f'{OPEN}{INVOKE}f">{value("n", digits)}{INVOKED}{CLOSE}')
    assert events == call(0, "f", f'{{"n": {digits}}}')


def test_ids_come_from_the_prefix() -> None:
    events = EXP.parser(False, "call_x7-").push(f"{BEGIN}{CALL}f{SEP}{END}{CALL}f{SEP}")
    assert [event.id for event in events if isinstance(event, ToolCallStart)] == ["call_x7-0", "call_x7-1"]


def test_nothing_may_be_pushed_after_the_end() -> None:
    parser = EXP.parser(False)
    parser.finish()
    with pytest.raises(AssertionError, match="after finish"):
        parser.push("x")

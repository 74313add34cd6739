"""The model's answer, read while it is written: reasoning, content and tool calls as events.

A parser is pushed the text in whatever pieces it comes and gives back what has become certain. How the text
was cut makes no difference to the events, `merge`d. Nothing the model writes raises: what does not follow the
syntax comes out as content, from the first character that could not be understood, and reading goes on behind
it. Three things follow from that and are meant:

- A call is announced when its name is complete. If its text breaks off or becomes unreadable later on, it
  never gets its ToolCallEnd: such a call must not be carried out.
- Reasoning ends at the first `</think>` and nowhere else; tool syntax before it is reasoning.
- Held back is what may still turn out to be a marker or the head of a call, which has a bounded length. A
  DSML parameter that is not a string is held back as a whole, for only then is it known to be JSON.

Cost is linear in the text: markers are searched in one pass, and heads, which are read again at each push,
are bounded.
"""

import json
import re
from abc import ABC, abstractmethod

from model.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallDelta, ToolCallEnd, ToolCallStart
from model.chat.markup import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    DSML_CALLS,
    DSML_CALLS_END,
    DSML_INVOKE,
    DSML_INVOKE_END,
    DSML_PARAMETER,
    DSML_PARAMETER_END,
    END_THINK,
    TOOL_SEP,
)

_MAX_NAME = 256  # characters in the name of a function or parameter
_MAX_GAP = 64  # white space between two tags


class _NeedMore(Exception):
    """The text so far does not decide how to go on."""


class _Malformed(Exception):
    """The text at this place follows no rule."""


class _Markers:
    """Literal strings to search for."""

    def __init__(self, *literals: str) -> None:
        self._literals = literals
        self._longest = max(map(len, literals))
        self.search = re.compile("|".join(map(re.escape, literals))).search

    def held(self, text: str, start: int) -> int:
        """Where the tail of `text[start:]` begins that may be the beginning of a marker."""
        for at in range(max(start, len(text) - self._longest + 1), len(text)):
            if any(literal.startswith(text[at:]) for literal in self._literals):
                return at
        return len(text)


_THINK_END = _Markers(END_THINK)


class _Parser(ABC):
    """What both encodings have in common: reasoning, content, and blocks of calls inside content.

    The current state is a method, `_step`. Each call of it either gets on (consumes text, or changes the
    state) or raises _NeedMore; states decide by the text alone, never by where a push ended.
    """

    _openers: _Markers

    def __init__(self, in_reasoning: bool, call_prefix: str) -> None:
        self._text = ""
        self._at = 0  # everything before is dealt with
        self._ended = False
        self._events: list[Event] = []
        self._call_prefix = call_prefix
        self._num_calls = 0
        self._opener = ""
        self._step = self._reasoning if in_reasoning else self._content

    def push(self, text: str) -> list[Event]:
        assert not self._ended, "pushed after finish"
        self._text = self._text[self._at :] + text
        self._at = 0
        return self._run()

    def finish(self) -> list[Event]:
        self._ended = True
        return self._run()

    def _run(self) -> list[Event]:
        try:
            while True:
                self._step()
        except _NeedMore:
            pass
        events, self._events = self._events, []
        return events

    # States

    def _reasoning(self) -> None:
        text, marker = self._take(_THINK_END)
        if text:
            self._events.append(ReasoningDelta(text))
        if marker:
            self._step = self._content

    def _content(self) -> None:
        text, self._opener = self._take(self._openers)
        self._say(text)
        if self._opener:
            self._step = self._first_call

    def _first_call(self) -> None:
        """Behind the opener of a block, which counts as one only if a call follows."""
        try:
            self._head(self._gap(self._at))
        except _Malformed:
            self._say(self._opener)
            self._step = self._content

    def _next_call(self) -> None:
        """Behind a call: another one, or the end of the block."""
        self._drop_last_gap()
        try:
            self._head_or_close(self._gap(self._at))
        except _Malformed:
            self._step = self._content

    @abstractmethod
    def _head(self, at: int) -> None:
        """Reads the head of a call at `at` and starts the call."""

    @abstractmethod
    def _head_or_close(self, at: int) -> None:
        """Reads the head of a call or the end of the block at `at`."""

    # Events

    def _say(self, text: str) -> None:
        if text:
            self._events.append(ContentDelta(text))

    def _start_call(self, name: str) -> None:
        self._events.append(ToolCallStart(self._num_calls, f"{self._call_prefix}{self._num_calls}", name))
        self._num_calls += 1

    def _argue(self, arguments: str) -> None:
        if arguments:
            self._events.append(ToolCallDelta(self._num_calls - 1, arguments))

    def _end_call(self) -> None:
        self._events.append(ToolCallEnd(self._num_calls - 1))
        self._step = self._next_call

    # Reading

    def _take(self, markers: _Markers) -> tuple[str, str]:
        """Consumes the text up to a marker, and that; the marker is "" where none is in sight yet."""
        found = markers.search(self._text, self._at)
        if found:
            end, after, marker = found.start(), found.end(), found[0]
        else:
            end = len(self._text) if self._ended else markers.held(self._text, self._at)
            after, marker = end, ""
        text = self._text[self._at : end]
        if not text and not marker:
            raise _NeedMore
        self._at = after
        return text, marker

    def _literal(self, at: int, *choices: str) -> tuple[str, int]:
        """Which of the choices stands at `at`, and where it ends."""
        for choice in choices:
            if self._text.startswith(choice, at):
                return choice, at + len(choice)
        rest = self._text[at : at + max(map(len, choices))]
        if not self._ended and any(choice.startswith(rest) for choice in choices):
            raise _NeedMore
        raise _Malformed

    def _match(self, pattern: re.Pattern[str], at: int, limit: int) -> tuple[str, int]:
        """A run of at most `limit` characters that the pattern describes, and where it ends.

        Whether it goes on in text yet to come need not be asked: a literal is read behind it, and asks.
        """
        found = pattern.match(self._text, at, at + limit)
        return (found[0], found.end()) if found else ("", at)

    def _gap(self, at: int) -> int:
        """Where the white space at `at` ends. Behind too much of it, nothing that follows is understood."""
        return self._match(_SPACE, at, _MAX_GAP)[1]

    def _drop_last_gap(self) -> None:
        """White space that ends the answer inside a block separates nothing, and is no content either."""
        if self._ended and self._text[self._at :].isspace():
            self._at = len(self._text)
            raise _NeedMore


_SPACE = re.compile(r"\s+")
_EXP_NAME = re.compile(r"[^<>\n]+")
_DSML_NAME = re.compile(r'[^"\n]+')


class ExpParser(_Parser):
    """Reads V3.2-Exp: calls are a name and JSON text between tokens of their own.

    Those tokens have to be in the text, so its detokenizer must not skip them (`ChatEncoding.detokenizer`).

    Args:
        in_reasoning: whether the prompt ended inside reasoning, as `Prompt.in_reasoning` says.
        call_prefix: ids of calls are this and their index.
    """

    _openers = _Markers(CALLS_BEGIN)
    _closers = _Markers(CALL_END, CALLS_END)
    _has_arguments = False

    def _head(self, at: int) -> None:
        _, at = self._literal(at, CALL_BEGIN)
        self._name(at)

    def _head_or_close(self, at: int) -> None:
        which, at = self._literal(at, CALL_BEGIN, CALLS_END)
        if which == CALLS_END:
            self._at, self._step = at, self._content
        else:
            self._name(at)

    def _name(self, at: int) -> None:
        name, at = self._match(_EXP_NAME, at, _MAX_NAME)
        _, at = self._literal(at, TOOL_SEP)
        if not name.strip():
            raise _Malformed
        self._start_call(name.strip())
        self._at, self._step = at, self._arguments
        self._has_arguments = False

    def _arguments(self) -> None:
        text, marker = self._take(self._closers)
        self._has_arguments = self._has_arguments or bool(text.strip())
        self._argue(text)
        if not marker:
            return
        if not self._has_arguments:
            self._argue("{}")
        self._end_call()
        if marker == CALLS_END:  # the model left out the end of its last call
            self._step = self._content


class DsmlParser(_Parser):
    """Reads the December V3.2: calls are tags with one tag inside for each argument.

    The arguments are put together as one JSON object: strings are escaped as they arrive, other values are
    taken over as they are written. A value that claims to be JSON and is not becomes a string.

    Args:
        in_reasoning: whether the prompt ended inside reasoning, as `Prompt.in_reasoning` says.
        call_prefix: ids of calls are this and their index.
    """

    # The blank line in front of a block belongs to it and is no content.
    _openers = _Markers(f"\n\n{DSML_CALLS}", DSML_CALLS)
    _value_end = _Markers(DSML_PARAMETER_END)

    def __init__(self, in_reasoning: bool, call_prefix: str) -> None:
        super().__init__(in_reasoning, call_prefix)
        self._names: set[str] = set()  # parameters of the call being read
        self._json: list[str] = []  # pieces of a value being held back

    def finish(self) -> list[Event]:
        events = super().finish()
        if self._json:
            events.append(ToolCallDelta(self._num_calls - 1, "".join(self._json)))
        return events

    def _head(self, at: int) -> None:
        _, at = self._literal(at, DSML_INVOKE)
        self._name(at)

    def _head_or_close(self, at: int) -> None:
        which, at = self._literal(at, DSML_INVOKE, DSML_CALLS_END)
        if which == DSML_CALLS_END:
            self._at, self._step = at, self._content
        else:
            self._name(at)

    def _name(self, at: int) -> None:
        name, at = self._match(_DSML_NAME, at, _MAX_NAME)
        _, at = self._literal(at, '">')
        if not name.strip():
            raise _Malformed
        self._start_call(name)
        self._names.clear()
        self._at, self._step = at, self._next_parameter

    def _next_parameter(self) -> None:
        self._drop_last_gap()
        try:
            which, at = self._literal(self._gap(self._at), DSML_PARAMETER, DSML_INVOKE_END)
            if which == DSML_PARAMETER:
                self._parameter(at)
                return
        except _Malformed:
            self._step = self._content
            return
        self._at = at
        self._argue("}" if self._names else "{}")
        self._end_call()

    def _parameter(self, at: int) -> None:
        name, at = self._match(_DSML_NAME, at, _MAX_NAME)
        _, at = self._literal(at, '" string="')
        kind, at = self._literal(at, 'true">', 'false">')
        if name in self._names:
            raise _Malformed
        self._argue(f"{', ' if self._names else '{'}{json.dumps(name, ensure_ascii=False)}: ")
        self._names.add(name)
        self._at = at
        if kind == 'true">':
            self._argue('"')
            self._step = self._string
        else:
            self._step = self._value

    def _string(self) -> None:
        text, marker = self._take(self._value_end)
        self._argue(_escaped(text))
        if marker:
            self._argue('"')
            self._step = self._next_parameter

    def _value(self) -> None:
        text, marker = self._take(self._value_end)
        self._json.append(text)
        if marker:
            value = "".join(self._json)
            self._json.clear()
            self._argue(value if _is_json(value) else f'"{_escaped(value)}"')
            self._step = self._next_parameter


def _escaped(text: str) -> str:
    """`text` as it stands between the quotes of a JSON string; pieces of it, escaped, join to the whole."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def _is_json(text: str) -> bool:
    try:
        # Numbers stay text: turning them into values could overflow, and nobody asks for the value.
        json.loads(text, parse_int=str, parse_float=str, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is Python's, not JSON")

"""Parts of the gateway that need no server."""

import json
from typing import Any

import pytest

from cluster.gateway.answer import ChoiceReader, Delta, Finish, Usage
from cluster.gateway.calls import chat_call
from cluster.gateway.errors import Overloaded, Refusal
from cluster.gateway.journal import Journal
from cluster.gateway.openai_format import ChatFormat
from cluster.gateway.strict_json import MAX_DEPTH, parse_object
from model.chat.encoding import ChatEncoding
from model.chat.markup import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, TOOL_SEP
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from tests.checkpoints import DEMO
from workers.answer import ChatAnswer
from workers.sequence import Request, Token

DSML = (
    "Let me look.\n\n<｜DSML｜function_calls>\n"
    '<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
    '<｜DSML｜invoke name="time">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
)
EXP = (
    f"Let me look.{CALLS_BEGIN}{CALL_BEGIN}weather{TOOL_SEP}"
    f'{{"city": "Paris", "days": 3}}{CALL_END}{CALL_BEGIN}time{TOOL_SEP}{{}}{CALL_END}{CALLS_END}'
)


class _Answer:
    uid, created = "u", 0


def answer_events(encoding: ChatEncoding, text: str, tokenizer: Tokenizer) -> list[Delta | Finish]:
    """What a reader makes of a text that comes token by token."""
    request = Request("u-0", (0,), SamplingParams(max_tokens=1000))
    chat = ChatAnswer(encoding, tokenizer, request, in_reasoning=False)
    reader = ChoiceReader(0, chat, None)
    ids = [*tokenizer.encode(text), tokenizer.eos_id]
    events: list[Delta | Finish] = []
    for position, token_id in enumerate(ids):
        events += reader.push(
            Token("u-0", token_id, position, "stop" if token_id == tokenizer.eos_id else None)
        )
    assert reader.num_tokens == len(ids)
    return events


@pytest.mark.parametrize(("encoding", "text"), [(ChatEncoding.DSML, DSML), (ChatEncoding.EXP, EXP)])
def test_tool_calls_in_a_stream_and_as_a_whole(encoding: ChatEncoding, text: str) -> None:
    tokenizer = Tokenizer.load(DEMO)
    events = answer_events(encoding, text, tokenizer)
    form: Any = ChatFormat(_Answer(), "m", "fp", tokenizer, logprobs=False, n=1)
    chunks = [chunk for event in events if (chunk := form.chunk(event))]
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for call in chunk["choices"][0]["delta"].get("tool_calls", ()):
            entry = calls.setdefault(call["index"], {"arguments": ""})
            entry["arguments"] += call["function"]["arguments"]
            if "id" in call:
                assert "name" not in entry
                entry |= {"id": call["id"], "name": call["function"]["name"]}
    assert [call["name"] for call in calls.values()] == ["weather", "time"]
    assert json.loads(calls[0]["arguments"]) == {"city": "Paris", "days": 3}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"

    whole = form.body([*events, Usage(1, 0, 1, 0)])["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me look."
    assert [call["type"] for call in whole["message"]["tool_calls"]] == ["function", "function"]
    again = chat_call(
        {
            "model": "m",
            "messages": [
                {"role": "user", "content": "x"},
                whole["message"],
                *(
                    {"role": "tool", "content": "y", "tool_call_id": c["id"]}
                    for c in whole["message"]["tool_calls"]
                ),
            ],
        }
    )
    assert [call.name for call in again.messages[1].tool_calls] == ["weather", "time"]


def test_a_schema_is_taken_where_it_promises_nothing() -> None:
    schema = {"type": "object", "properties": {}}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    wrapped = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    call = chat_call({**body, "response_format": wrapped})
    assert call.schema == schema
    assert "Response Format" in ChatEncoding.DSML.render(call.messages, response_format=call.schema).text
    assert chat_call({**body, "response_format": {"type": "text"}}).schema is None


def test_labels_are_no_unknown_fields_and_seeds_are_chosen() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "user": "u", "odd": 1, "stop": None}
    first, second = chat_call(body), chat_call(body)
    assert first.unknown_fields == {"odd"}
    assert first.params.seed != second.params.seed


def test_journal_holds_open_requests_only_and_so_many() -> None:
    journal = Journal(max_tokens=30)
    request = Request("a", (1, 2), SamplingParams(max_tokens=10, seed=5))
    with journal.entry(request, "digest") as entry:
        entry.record(7)
        assert list(next(iter(journal)).emitted) == [7]
        assert journal.num_tokens == 12
        with journal.entry(Request("b", (1, 2), request.params), "digest"), pytest.raises(Overloaded):
            journal.entry(Request("c", (1,) * 10, request.params), "digest").__enter__()
    assert len(journal) == journal.num_tokens == 0


def test_json_keeps_what_is_good() -> None:
    assert parse_object(b'{"a": "[[[[", "b": [1, 2.5, null, "\\ud83d\\ude00"]}') == {
        "a": "[[[[",
        "b": [1, 2.5, None, "\U0001f600"],
    }
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    assert parse_object(b'{"a":' + deep + b"}")
    with pytest.raises(Refusal, match="deeper"):
        parse_object(b'{"a":[' + deep + b"]}")
    with pytest.raises(Refusal, match=r"a\.b") as caught:
        parse_object(b'{"a": {"b": ["x", "\\udc00"]}}')
    assert caught.value.param == "a.b[1]"

"""Tokens to text: stop strings, half characters, and ends of answers."""

import pytest

from model.chat.encoding import ChatEncoding
from model.chat.events import ContentDelta, ReasoningDelta, merge
from model.sampling_params import SamplingParams
from model.stopping import FinishReason
from model.tokenizer import Detokenizer, Tokenizer
from tests.checkpoints import DEMO
from workers.answer import ChatAnswer, TextAnswer
from workers.sequence import Request, Token


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(DEMO)


def request(*stops: str) -> Request:
    return Request("r", (0,), SamplingParams(max_tokens=100, stop=stops))


def tokens(ids: list[int], reason: FinishReason | None = "length") -> list[Token]:
    ends = [None] * (len(ids) - 1) + [reason]
    return [
        Token("r", token_id, place, end) for place, (token_id, end) in enumerate(zip(ids, ends, strict=True))
    ]


def text_of(tokenizer: Tokenizer, given: list[Token], *stops: str) -> tuple[str, bool]:
    answer = TextAnswer(Detokenizer(tokenizer), request(*stops))
    text = ""
    for token in given:
        text += answer.push(token)
        if answer.stopped:
            break
    return text, answer.stopped


def test_all_text_has_come_out_at_the_end(tokenizer: Tokenizer) -> None:
    text = "Zoë reads 漢字 and 🎉 STO"
    assert text_of(tokenizer, tokens(tokenizer.encode(text)), "STOP") == (text, False)


def test_a_stop_string_cuts_the_text_and_says_so(tokenizer: Tokenizer) -> None:
    given = tokens(tokenizer.encode("one two three two"))
    assert text_of(tokenizer, given, "two") == ("one ", True)


def test_the_token_that_stops_is_no_part_of_the_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("yes no")
    assert text_of(tokenizer, tokens(ids, "stop"))[0] == tokenizer.decode(ids[:-1])
    assert text_of(tokenizer, tokens(ids, "length"))[0] == "yes no"


def test_half_a_character_at_the_end_is_shown_as_such(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🎉")
    assert len(ids) > 1, "the demo has this character in one token: choose another"
    assert text_of(tokenizer, tokens(ids[:-1]))[0].strip("\ufffd") == ""
    assert text_of(tokenizer, tokens(ids[:-1]))[0] != ""


def test_a_chat_answer_separates_reasoning_and_content(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(ChatEncoding.EXP, tokenizer, request(), in_reasoning=True)
    events = [event for token in tokens(tokenizer.encode("hm</think>yes")) for event in answer.push(token)]
    assert merge(events) == [ReasoningDelta("hm"), ContentDelta("yes")]


def test_a_chat_answer_ends_at_a_stop_string(tokenizer: Tokenizer) -> None:
    answer = ChatAnswer(ChatEncoding.EXP, tokenizer, request("END"), in_reasoning=False)
    events = []
    for token in tokens(tokenizer.encode("yes END no")):
        events += answer.push(token)
        if answer.stopped:
            break
    assert answer.stopped
    assert merge(events) == [ContentDelta("yes ")]

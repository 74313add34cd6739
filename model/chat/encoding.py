"""One seam over the chat encodings: which one a checkpoint speaks, and everything a server does with it."""

from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from model.chat import dsml, exp
from model.chat.events import StreamParser
from model.chat.markup import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    END_THINK,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    THINK,
    TOOL_SEP,
    USER,
    Prompt,
)
from model.chat.messages import Message, Tool
from model.chat.parse import DsmlParser, ExpParser
from model.errors import CheckpointError, RequestError
from model.tokenizer import Detokenizer, Tokenizer, read_tokenizer_config


class ChatEncoding(Enum):
    """How a model was taught to see a conversation."""

    EXP = "exp"  # V3.1 and V3.2-Exp
    DSML = "dsml"  # V3.2 of December 2025

    @classmethod
    def detect(cls, directory: Path) -> "ChatEncoding":
        """The encoding of a checkpoint: V3.2 ships no chat template, its predecessors do.

        Raises:
            CheckpointError: tokenizer_config.json is missing or unreadable.
        """
        has_template = bool(read_tokenizer_config(directory).get("chat_template"))
        return cls.EXP if has_template or (directory / "chat_template.jinja").exists() else cls.DSML

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        thinking: bool = False,
        response_format: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """The prompt that makes the model speak next; `response_format` is a JSON schema.

        Raises:
            RequestError: the encoding has no form for this conversation.
        """
        if self is ChatEncoding.DSML:
            return dsml.render(messages, tools, thinking, response_format)
        if response_format:
            raise RequestError("response_format", "this model's chat encoding has no place for a schema")
        return exp.render(messages, tools, thinking)

    def parser(self, in_reasoning: bool, call_prefix: str = "call_") -> StreamParser:
        """A parser for one answer.

        Args:
            in_reasoning: whether the answer begins inside reasoning: `Prompt.in_reasoning`, which is not the
                same as thinking mode, for a prompt may end behind the reasoning.
            call_prefix: ids of tool calls are this and their index.
        """
        return (DsmlParser if self is ChatEncoding.DSML else ExpParser)(in_reasoning, call_prefix)

    def detokenizer(self, tokenizer: Tokenizer) -> Detokenizer:
        """A detokenizer that feeds the parser.

        It shows the marks that a parser looks for even where the checkpoint flags them special. BOS, EOS,
        padding and whatever else is flagged stay hidden.
        """
        ids = (tokenizer.special_id(mark) for mark in _ANSWER_MARKS)
        return Detokenizer(tokenizer, keep={token_id for token_id in ids if token_id is not None})

    def check(self, tokenizer: Tokenizer) -> None:
        """Makes sure that the marks of the encoding are tokens, so that no prompt can go out without them.

        Raises:
            CheckpointError: one of them is not.
        """
        tool_marks = () if self is ChatEncoding.DSML else (*_ANSWER_TOOL_MARKS, OUTPUT_BEGIN, OUTPUT_END)
        for mark in (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, *tool_marks):
            if tokenizer.special_id(mark) is None:
                raise CheckpointError("tokenizer.json", "added_tokens", f"{mark} among them", "no such token")


_ANSWER_TOOL_MARKS = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, TOOL_SEP)
_ANSWER_MARKS = (THINK, END_THINK, *_ANSWER_TOOL_MARKS)


def encode_chat(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Ids of a prompt, in which only our own markup can become special tokens.

    As long as nobody's text spells a special token, the ids are those of the joined string: special tokens
    cut the text before BPE sees it, so cutting there changes nothing, and all else, trusted or not, is joined
    with its neighbours before it is encoded.
    """
    ids: list[int] = []
    run: list[str] = []
    for piece in prompt.pieces:
        for part in tokenizer.split_added(piece.text) if piece.trusted else [piece.text]:
            if isinstance(part, str):
                run.append(part)
            else:
                ids += tokenizer.encode_plain("".join(run))
                ids.append(part)
                run.clear()
    return ids + tokenizer.encode_plain("".join(run))

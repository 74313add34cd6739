"""The text side of a checkpoint: tokenizer and chat encoding, checked against the model and each other."""

from pathlib import Path

from model.chat.encoding import ChatEncoding
from model.chat.markup import BOS
from model.chat.messages import Message
from model.chat_template import Probe, check_chat_template, check_tokenizer_vocab
from model.config import ModelConfig
from model.tokenizer import Tokenizer, read_tokenizer_config

_PROBES: dict[str, tuple[tuple[Message, ...], bool]] = {
    "one question": ((Message("user", "1+1=?"),), False),
    "one question, thinking": ((Message("user", "1+1=?"),), True),
    "a system message and a history": (
        (
            Message("system", "Be brief."),
            Message("user", "hello"),
            Message("assistant", "Hello! I am a model."),
            Message("user", " 1+1=?\n"),
        ),
        False,
    ),
}
"""Conversations, and whether thinking is on, that any template of this encoding renders alike."""


def load_text(directory: Path, config: ModelConfig) -> tuple[Tokenizer, ChatEncoding]:
    """Load and check what turns a conversation into tokens.

    Raises:
        CheckpointError: the tokenizer makes ids the model has no row for, lacks a mark of the encoding, or
            the checkpoint's chat template says something else than the encoding we would use.
    """
    tokenizer = Tokenizer.load(directory)
    check_tokenizer_vocab(tokenizer.vocab_size, config.vocab_size)
    encoding = ChatEncoding.detect(directory)
    encoding.check(tokenizer)
    template = read_tokenizer_config(directory).get("chat_template")
    if template:
        check_chat_template(template, [_probe(name, encoding) for name in _PROBES])
    return tokenizer, encoding


def _probe(name: str, encoding: ChatEncoding) -> Probe:
    messages, thinking = _PROBES[name]
    variables = {
        "messages": [{"role": message.role, "content": message.content} for message in messages],
        "thinking": thinking,
        "add_generation_prompt": True,
        "bos_token": BOS,
    }
    return Probe(name, variables, encoding.render(messages, thinking=thinking).text)

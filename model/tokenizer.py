"""Text to token ids and back, over the `tokenizer.json` of a checkpoint.

Byte-level BPE: an ordinary token stands for a run of bytes, which need not be whole characters. Decoding is
therefore done on bytes here, and `Detokenizer` is the same thing for tokens that arrive one at a time.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models

from model.errors import CheckpointError

TOKENIZER_FILE = "tokenizer.json"
_CONFIG = "tokenizer_config.json"


class Tokenizer:
    """The tokenizer of one checkpoint.

    An *added* token (BOS, `<｜User｜>`, `<think>`, ...) is recognised as a whole in text before BPE sees it.
    Some of them carry the flag *special*: `decode` leaves those out. Which ones do differs between
    checkpoints; DeepSeek's own files flag BOS, EOS and pad but not the role and tool markers.

    Args:
        full: the tokenizer as its file describes it.
        bos, eos: text of the tokens that open and end a sequence.
        pad: text of the padding token, where the checkpoint names one.
    """

    def __init__(self, full: tokenizers.Tokenizer, bos: str, eos: str, pad: str | None = None) -> None:
        self._full = full
        # The same model and pre-tokenizer (shared, not copied) without any added token: what is spelled like
        # a role marker comes out as ordinary tokens. The library's own switch, `encode_special_tokens`, is
        # not enough, for it passes over the added tokens that are not flagged special.
        self._plain = tokenizers.Tokenizer(full.model)
        if full.normalizer is not None:
            self._plain.normalizer = full.normalizer
        self._plain.pre_tokenizer = full.pre_tokenizer

        added = full.get_added_tokens_decoder()
        self._added: dict[str, int] = {token.content: token_id for token_id, token in added.items()}
        self._bytes = _bytes_of_tokens(full.get_vocab(with_added_tokens=True), self._added)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.bos_id = self._added[bos]
        self.eos_id = self._added[eos]
        self.pad_id = self._added[pad] if pad is not None else None

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint directory.

        Raises:
            CheckpointError: a file is missing or unreadable, or is no byte-level BPE tokenizer.
        """
        try:
            full = tokenizers.Tokenizer.from_str(_read_text(directory, TOKENIZER_FILE))
        except CheckpointError:
            raise
        except Exception as error:  # the library has no type of its own for a file it cannot read
            raise CheckpointError(
                TOKENIZER_FILE, "", "a tokenizer of the `tokenizers` library", str(error)
            ) from error
        _check_kind(full)
        config = read_tokenizer_config(directory)
        return cls(
            full,
            bos=_named_token(config, "bos_token", full),
            eos=_named_token(config, "eos_token", full),
            pad=_named_token(config, "pad_token", full) if config.get("pad_token") is not None else None,
        )

    @property
    def vocab_size(self) -> int:
        """Highest id + 1, added tokens included. The model's own vocabulary may be padded beyond it."""
        return len(self._bytes)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, in which added tokens are recognised. BOS is never put in front."""
        return _encode(self._full, text)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of `text` taken literally: no id of an added token comes out, whatever the text spells.

        For text from outside, which must not be able to forge a role marker. Without such spellings in it the
        ids are those of `encode`.
        """
        return _encode(self._plain, text)

    def split_added(self, text: str) -> list[str | int]:
        """Cuts `text` at its added tokens: ids for those, strings (never empty) for what lies between."""
        parts: list[str | int] = []
        end = 0
        for found in self._added_pattern.finditer(text):
            if found.start() > end:
                parts.append(text[end : found.start()])
            parts.append(self._added[found[0]])
            end = found.end()
        if end < len(text):
            parts.append(text[end:])
        return parts

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes of one token, half characters included.

        Empty for an id without a token: a model whose vocabulary is padded can emit those.
        """
        return self._bytes[token_id] if 0 <= token_id < len(self._bytes) else b""

    def decode(self, ids: Iterable[int], skip_special: bool = True, keep: Collection[int] = ()) -> str:
        """Text of `ids`; bytes that form no UTF-8 become U+FFFD.

        Args:
            ids: any ids, in any order.
            skip_special: leave out tokens flagged special.
            keep: ids to show all the same.
        """
        skipped = self.skipped(skip_special, keep)
        joined = b"".join(self.token_bytes(token_id) for token_id in ids if token_id not in skipped)
        return joined.decode("utf-8", errors="replace")

    def special_id(self, text: str) -> int | None:
        """Id of the added token written `text`, flagged special or not; None where there is none."""
        return self._added.get(text)

    def skipped(self, skip_special: bool, keep: Collection[int]) -> frozenset[int]:
        """The ids that decoding with these arguments leaves out."""
        return self.special_ids.difference(keep) if skip_special else frozenset()

    @cached_property
    def _added_pattern(self) -> re.Pattern[str]:
        # Longest first, so that of two tokens starting at one place the longer wins, as in the library.
        longest_first = sorted(self._added, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)))


class Detokenizer:
    """Text of one growing sequence of tokens, at a constant cost per token.

    What `push` and `flush` return, joined, equals `Tokenizer.decode` of all ids with the same arguments. A
    character that spans tokens is held back until it is whole, so nothing returned is ever retracted.

    Args:
        tokenizer: whose ids will be pushed.
        skip_special: leave out tokens flagged special.
        keep: ids to show all the same, e.g. tool markers that a parser of the text looks for.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True, keep: Collection[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.skipped(skip_special, keep)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Takes the next token; returns the text that has become certain, often none."""
        if token_id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        """Ends the sequence: bytes of an unfinished character come out as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def read_tokenizer_config(directory: Path) -> dict[str, Any]:
    """The checkpoint's tokenizer_config.json.

    Raises:
        CheckpointError: the file is missing or is no JSON object.
    """
    try:
        config = json.loads(_read_text(directory, _CONFIG))
    except ValueError as error:
        raise CheckpointError(_CONFIG, "", "a JSON object", str(error)) from error
    if not isinstance(config, dict):
        raise CheckpointError(_CONFIG, "", "a JSON object", type(config).__name__)
    return config


def _read_text(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(name, "", "a file of this name", "none") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) and error.strerror else "bytes that are not UTF-8"
        )
        raise CheckpointError(name, "", "a readable text file", reason) from error


def _encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    # A batch of one: unlike `encode`, it lets other threads run meanwhile, and long texts take seconds.
    ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return ids


def _check_kind(full: tokenizers.Tokenizer) -> None:
    if not isinstance(full.model, models.BPE):
        raise CheckpointError(TOKENIZER_FILE, "model.type", "BPE", type(full.model).__name__)
    if not isinstance(full.decoder, decoders.ByteLevel):
        raise CheckpointError(TOKENIZER_FILE, "decoder.type", "ByteLevel", type(full.decoder).__name__)
    for token in full.get_added_tokens_decoder().values():
        # Such a token swallows neighbouring spaces or depends on them; `split_added` matches exact text only.
        if token.lstrip or token.rstrip or token.single_word:
            what = f"added token {token.content!r}"
            raise CheckpointError(
                TOKENIZER_FILE, what, "lstrip, rstrip and single_word false", "one of them true"
            )


def _named_token(config: dict[str, Any], key: str, full: tokenizers.Tokenizer) -> str:
    entry = config.get(key)
    text = entry.get("content") if isinstance(entry, dict) else entry
    added = {token.content for token in full.get_added_tokens_decoder().values()}
    if not isinstance(text, str) or text not in added:
        raise CheckpointError(_CONFIG, key, f"an added token of {TOKENIZER_FILE}", repr(text))
    return text


def _bytes_of_tokens(vocab: dict[str, int], added: dict[str, int]) -> list[bytes]:
    """Bytes by id. Ids that the vocabulary leaves out get no bytes."""
    table = [b""] * (max(vocab.values()) + 1)
    byte_of = _byte_alphabet()
    for text, token_id in vocab.items():
        # Added tokens are stored as they read, all others in the byte alphabet.
        if text in added or not byte_of.keys() >= set(text):
            table[token_id] = text.encode()
        else:
            table[token_id] = bytes(byte_of[character] for character in text)
    return table


def _byte_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for.

    Bytes that print in Latin-1 stand for themselves; the others got the code points from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (byte for byte in range(256) if byte not in set(printable))
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}

"""The marks of DeepSeek's chat encodings, and what a rendered conversation is made of."""

from dataclasses import dataclass

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
END_THINK = "</think>"

# V3.2-Exp: every mark around tools is a token of its own.
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
TOOL_SEP = "<｜tool▁sep｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"

# December V3.2: the marks around tools are ordinary text.
DSML = "｜DSML｜"
DSML_CALLS = f"<{DSML}function_calls>"
DSML_CALLS_END = f"</{DSML}function_calls>"
DSML_INVOKE = f'<{DSML}invoke name="'
DSML_INVOKE_END = f"</{DSML}invoke>"
DSML_PARAMETER = f'<{DSML}parameter name="'
DSML_PARAMETER_END = f"</{DSML}parameter>"


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt's text.

    `trusted` text is written by us: special tokens in it are meant. All other text was sent by somebody, and
    what looks like a special token there is only a spelling.
    """

    text: str
    trusted: bool


@dataclass(frozen=True, slots=True)
class Prompt:
    """A rendered conversation.

    `in_reasoning` says whether the text ends inside the assistant's reasoning, so that the model's first
    words belong there: it is what the parser of the answer must be told.
    """

    pieces: tuple[Piece, ...]
    in_reasoning: bool

    @property
    def text(self) -> str:
        """The prompt as one string, to be read and compared; ids come from `encoding.encode_chat`."""
        return "".join(piece.text for piece in self.pieces)


def mark(text: str) -> Piece:
    """Text of ours."""
    return Piece(text, trusted=True)


def said(text: str) -> Piece:
    """Text of somebody else's."""
    return Piece(text, trusted=False)

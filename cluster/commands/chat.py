"""`eightfold chat`: talk to a model in the terminal."""

import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cluster.commands.common import checkpoint_directory, engine_config, load_model, sampling_params
from model.chat.encoding import ChatEncoding, encode_chat
from model.chat.events import ContentDelta, ReasoningDelta, ToolCallDelta, ToolCallEnd, ToolCallStart
from model.chat.messages import Message
from model.config import ModelConfig
from model.errors import EightfoldError
from model.text import load_text
from model.tokenizer import Tokenizer
from workers.answer import ChatAnswer
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel
from workers.sequence import Request

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HELP = """\
/new     forget the conversation      /think   turn reasoning on or off
/stats   figures of the last answer   /exit    leave (so does Ctrl-D)
Ctrl-C stops an answer."""


class Interrupt:
    """Whether Ctrl-C was pressed since it was last looked at."""

    def __init__(self) -> None:
        self.pressed = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While an answer runs, Ctrl-C sets a flag between steps and never cuts through one."""

        def note(signum: int, frame: FrameType | None) -> None:
            self.pressed = True

        self.pressed = False
        previous = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


class Conversation:
    """The messages so far, and one answer at a time."""

    def __init__(
        self, model: LocalModel, tokenizer: Tokenizer, encoding: ChatEncoding, options: Namespace
    ) -> None:
        self._tokenizer, self._encoding, self._options = tokenizer, encoding, options
        self._context = model.config.max_position_embeddings
        self._engine_config: EngineConfig = engine_config(options)
        self._model = model
        self.engine: Engine = model.engine(self._engine_config, self._context)
        self.thinking: bool = options.thinking
        self.stats = "nothing was answered yet"
        self.messages: list[Message] = []
        self.forget()

    def forget(self) -> None:
        """Start anew, with the system message if there is one."""
        self.messages = [Message("system", self._options.system)] if self._options.system else []

    def answer(self, text: str, interrupt: Interrupt) -> None:
        """Put the user's text to the model and print what it answers, as it comes."""
        asked = [*self.messages, Message("user", text)]
        prompt = self._encoding.render(asked, thinking=self.thinking)
        prompt_ids = encode_chat(self._tokenizer, prompt)
        room = max(1, min(self._options.max_tokens, self._context - len(prompt_ids)))
        request = Request("chat", tuple(prompt_ids), sampling_params(self._options, room))
        answer = ChatAnswer(self._encoding, self._tokenizer, request, in_reasoning=prompt.in_reasoning)
        self.engine.add(request)
        with interrupt.watching():
            content = self._stream(answer, len(prompt_ids), interrupt)
        self.engine.cancel(request.uid)
        self.messages = [*asked, Message("assistant", content)]

    def _stream(self, answer: ChatAnswer, num_prompt: int, interrupt: Interrupt) -> str:
        """Print events until the answer ends; returns the content, which is what the next turn keeps."""
        started = first = time.perf_counter()
        content, num_tokens, num_cached, reason = "", 0, 0, "stopped by Ctrl-C"
        screen = Screen()
        while not self.engine.is_idle and not interrupt.pressed:
            for token in self.engine.step():
                if not num_tokens:
                    first = time.perf_counter()
                num_tokens += 1
                num_cached = token.num_prompt_cached
                reason = token.finish_reason or reason
                for event in answer.push(token):
                    content += event.text if isinstance(event, ContentDelta) else ""
                    screen.show(event)
        screen.end()
        decode = time.perf_counter() - first
        speed = f", {(num_tokens - 1) / decode:.0f} tokens/s" if num_tokens > 1 and decode > 0 else ""
        rates = ", ".join(f"{rate:.0%}" for rate in self.engine.acceptance.rates())
        self.stats = (
            f"prompt {num_prompt} tokens, {num_cached} of them cached, in {first - started:.2f} s; "
            f"answer {num_tokens} tokens{speed}; "
            f"{reason}; {self._context - num_prompt - num_tokens} tokens of context left"
            + (f"; drafts accepted by position {rates}" if rates else "")
        )
        return content


class Screen:
    """Prints events: reasoning dimmed, tool calls as the model wrote them."""

    def __init__(self) -> None:
        self._colours = sys.stdout.isatty()
        self._dimmed = False

    def show(self, event: object) -> None:
        match event:
            case ReasoningDelta(text):
                self._write(text, dim=True)
            case ContentDelta(text):
                self._write(text)
            case ToolCallStart(name=name):
                self._write(f"\n[calls {name} with ", dim=True)
            case ToolCallDelta(arguments=arguments):
                self._write(arguments, dim=True)
            case ToolCallEnd():
                self._write("]", dim=True)

    def end(self) -> None:
        self._write("\n")

    def _write(self, text: str, *, dim: bool = False) -> None:
        if dim != self._dimmed:
            if self._colours:
                print(_DIM if dim else _PLAIN, end="")
            if self._dimmed:
                print("\n", end="")
            self._dimmed = dim
        print(text, end="", flush=True)


def run(options: Namespace) -> int:
    """The read-answer loop."""
    with suppress(ImportError):
        import readline  # noqa: F401 - importing it gives input() a history and line editing

    directory = checkpoint_directory(options.model)
    tokenizer, encoding = load_text(directory, ModelConfig.load(directory))
    model = load_model(options)
    conversation = Conversation(model, tokenizer, encoding, options)
    context, digest = model.config.max_position_embeddings, model.checkpoint.digest[:12]
    print(f"{options.model.name}: context {context} tokens, weights {digest}", _HELP, sep="\n")
    interrupt = Interrupt()
    while True:
        try:
            line = input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)")
            continue
        if line.startswith("/"):
            if line in ("/exit", "/quit"):
                return 0
            print(command(conversation, line))
        elif line:
            try:
                conversation.answer(line, interrupt)
            except EightfoldError as error:
                print(f"{error}; /new forgets the conversation")


def command(conversation: Conversation, line: str) -> str:
    """Carry out a slash command; returns what to say."""
    match line:
        case "/new":
            conversation.forget()
            return "a new conversation"
        case "/think":
            conversation.thinking = not conversation.thinking
            return f"reasoning is {'on' if conversation.thinking else 'off'}"
        case "/stats":
            return conversation.stats
        case "/help":
            return _HELP
    return f"there is no {line.split()[0]}\n{_HELP}"

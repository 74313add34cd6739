"""The text of one answer: tokens in, events out."""

from model.chat.encoding import ChatEncoding
from model.chat.events import Event
from model.stopping import StopChecker
from model.tokenizer import Detokenizer, Tokenizer
from workers.sequence import Request, Token


class TextAnswer:
    """Plain text of a completion: detokenised, cut at stop strings.

    `stopped` turns true when a stop string was met: the rest of the sequence should be cancelled.
    """

    def __init__(self, detokenizer: Detokenizer, request: Request) -> None:
        self._detokenizer = detokenizer
        self._stops = StopChecker(request.params.stop)

    @property
    def stopped(self) -> bool:
        return self._stops.stopped

    def push(self, token: Token) -> str:
        """The text that this token makes certain; everything that was held back if it is the last one."""
        # A token that ends the answer by its id is no part of the text.
        text = "" if token.finish_reason == "stop" else self._detokenizer.push(token.token_id)
        if not token.finish_reason:
            return self._stops.feed(text)
        return self._stops.feed(text + self._detokenizer.flush()) + self._stops.finish()


class ChatAnswer:
    """A chat answer: reasoning, content and tool calls, whatever way the tokens cut the text."""

    def __init__(
        self, encoding: ChatEncoding, tokenizer: Tokenizer, request: Request, *, in_reasoning: bool
    ) -> None:
        self._text = TextAnswer(encoding.detokenizer(tokenizer), request)
        self._parser = encoding.parser(in_reasoning, call_prefix=f"call_{request.uid}_")

    @property
    def stopped(self) -> bool:
        return self._text.stopped

    def push(self, token: Token) -> list[Event]:
        """The events that this token makes certain."""
        events = self._parser.push(self._text.push(token))
        if token.finish_reason or self.stopped:
            events += self._parser.finish()
        return events

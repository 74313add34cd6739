"""Answers in the shapes of the OpenAI API: chunks of a stream, or one object."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from cluster.gateway.answer import Answer, AnswerEvent, Delta, DrawnToken, Finish, Usage
from model.chat.events import ContentDelta, Event, ReasoningDelta, ToolCallDelta, ToolCallStart
from model.tokenizer import Tokenizer

Json = dict[str, Any]


class Format(ABC):
    """How one kind of answer looks.

    Args:
        answer: whose ids the objects carry.
        model: name of the model, as the client calls it.
        fingerprint: names the weights.
        tokenizer: of the model.
        logprobs: whether they were asked for.
        n: number of choices.
    """

    _prefix: str
    _chunk_kind: str
    _body_kind: str

    def __init__(
        self, answer: Answer, model: str, fingerprint: str, tokenizer: Tokenizer, *, logprobs: bool, n: int
    ) -> None:
        self._head = {"created": answer.created, "model": model, "system_fingerprint": fingerprint}
        self._id = f"{self._prefix}-{answer.uid}"
        self._tokenizer, self._logprobs, self._n = tokenizer, logprobs, n

    @abstractmethod
    def _delta(self, delta: Delta) -> Json | None:
        """The choice of a chunk; None where there is nothing to say."""

    @abstractmethod
    def _last(self, finish: Finish) -> Json:
        """The choice of a choice's last chunk."""

    @abstractmethod
    def _choice(self, deltas: Sequence[Delta], finish: Finish) -> Json:
        """A choice as a whole."""

    def chunk(self, event: AnswerEvent) -> Json | None:
        """A chunk of the stream, without usage; None where the event shows nothing."""
        match event:
            case Delta():
                choice = self._delta(event)
            case Finish():
                choice = self._last(event)
            case _:
                return self._wrap(self._chunk_kind, [])
        return None if choice is None else self._wrap(self._chunk_kind, [choice])

    def body(self, events: Sequence[AnswerEvent]) -> Json:
        """The whole answer as one object."""
        choices = []
        for finish in sorted((e for e in events if isinstance(e, Finish)), key=lambda e: e.choice):
            deltas = [e for e in events if isinstance(e, Delta) and e.choice == finish.choice]
            choices.append(self._choice(deltas, finish))
        usage = next(event for event in events if isinstance(event, Usage))
        return self._wrap(self._body_kind, choices) | {"usage": usage_json(usage)}

    def _wrap(self, kind: str, choices: list[Json]) -> Json:
        return {"id": self._id, "object": kind, **self._head, "choices": choices}


class ChatFormat(Format):
    """`chat.completion` and its chunks."""

    _prefix, _chunk_kind, _body_kind = "chatcmpl", "chat.completion.chunk", "chat.completion"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._greeted: set[int] = set()

    def _delta(self, delta: Delta) -> Json | None:
        said = _chat_delta(delta.events)
        logprobs = self._chat_logprobs(delta.tokens) if self._logprobs and delta.tokens else None
        if not said and logprobs is None:
            return None
        return self._streamed(delta.choice, said, logprobs, None)

    def _last(self, finish: Finish) -> Json:
        return self._streamed(finish.choice, {}, None, finish.reason)

    def _streamed(self, choice: int, said: Json, logprobs: Json | None, reason: str | None) -> Json:
        if choice not in self._greeted:
            self._greeted.add(choice)
            said = {"role": "assistant", "content": None, **said}
        return {"index": choice, "delta": said, "logprobs": logprobs, "finish_reason": reason}

    def _choice(self, deltas: Sequence[Delta], finish: Finish) -> Json:
        events = [event for delta in deltas for event in delta.events]
        message: Json = {"role": "assistant", "content": None, "refusal": None, **_chat_message(events)}
        if finish.reason != "tool_calls" and message["content"] is None:
            message["content"] = ""
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = self._chat_logprobs(tokens) if self._logprobs else None
        return {
            "index": finish.choice,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": finish.reason,
        }

    def _chat_logprobs(self, tokens: Sequence[DrawnToken]) -> Json:
        content = [self._entry(token) for token in tokens if not token.in_reasoning]
        reasoning = [self._entry(token) for token in tokens if token.in_reasoning]
        return {"content": content, "refusal": None} | ({"reasoning_content": reasoning} if reasoning else {})

    def _entry(self, token: DrawnToken) -> Json:
        assert token.logprobs, "asked for and not drawn"
        top = [self._one(token_id, logprob) for token_id, logprob in token.logprobs.top]
        return self._one(token.token_id, token.logprobs.logprob) | {"top_logprobs": top}

    def _one(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer.token_bytes(token_id)
        return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}


class CompletionFormat(Format):
    """`text_completion`, whole or in chunks."""

    _prefix, _chunk_kind, _body_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._offsets: dict[int, int] = {}

    def _delta(self, delta: Delta) -> Json | None:
        logprobs = (
            self._text_logprobs(delta.choice, delta.tokens) if self._logprobs and delta.tokens else None
        )
        text = _content(delta.events)
        if not text and logprobs is None:
            return None
        return {"index": delta.choice, "text": text, "logprobs": logprobs, "finish_reason": None}

    def _last(self, finish: Finish) -> Json:
        return {"index": finish.choice, "text": "", "logprobs": None, "finish_reason": finish.reason}

    def _choice(self, deltas: Sequence[Delta], finish: Finish) -> Json:
        text = "".join(_content(delta.events) for delta in deltas)
        tokens = [token for delta in deltas for token in delta.tokens]
        logprobs = self._text_logprobs(finish.choice, tokens) if self._logprobs else None
        return {"index": finish.choice, "text": text, "logprobs": logprobs, "finish_reason": finish.reason}

    def _text_logprobs(self, choice: int, tokens: Sequence[DrawnToken]) -> Json:
        offset = self._offsets.get(choice, 0)
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token in tokens:
            assert token.logprobs, "asked for and not drawn"
            text = self._text(token.token_id)
            out["tokens"].append(text)
            out["token_logprobs"].append(token.logprobs.logprob)
            out["top_logprobs"].append({self._text(i): logprob for i, logprob in token.logprobs.top})
            out["text_offset"].append(offset)
            offset += len(text)
        self._offsets[choice] = offset
        return out

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode(errors="replace")


def usage_json(usage: Usage) -> Json:
    """Usage with OpenAI's details and DeepSeek's own names."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.answer_tokens,
        "total_tokens": usage.prompt_tokens + usage.answer_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }


def _content(events: Sequence[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, ContentDelta))


def _chat_delta(events: Sequence[Event]) -> Json:
    said: Json = {}
    calls: list[Json] = []
    for event in events:
        match event:
            case ReasoningDelta(text):
                said["reasoning_content"] = said.get("reasoning_content", "") + text
            case ContentDelta(text):
                said["content"] = said.get("content", "") + text
            case ToolCallStart(index, call_id, name):
                function = {"name": name, "arguments": ""}
                calls.append({"index": index, "id": call_id, "type": "function", "function": function})
            case ToolCallDelta(index, arguments):
                if calls and calls[-1]["index"] == index:
                    calls[-1]["function"]["arguments"] += arguments
                else:
                    calls.append({"index": index, "function": {"arguments": arguments}})
    return said | ({"tool_calls": calls} if calls else {})


def _chat_message(events: Sequence[Event]) -> Json:
    message = _chat_delta(events)
    for call in message.get("tool_calls", ()):
        del call["index"]
    return message

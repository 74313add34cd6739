"""What clients may ask for: JSON objects of the OpenAI API as frozen values, checked in full.

gRPC makes the same objects from its messages, so both protocols refuse the same things in the same words.
Nothing is passed over silently: a field that is known and cannot be served is refused by name. Fields that
only label a request, and fields nobody knows, have no effect; the latter are counted.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.gateway.errors import Kind, Refusal
from cluster.gateway.fields import Fields, kind_of
from cluster.gateway.structured import read_schema, read_tools
from model.chat.messages import Message, Tool, check_text, messages_from_json
from model.errors import RequestError
from model.sampling_params import MAX_STOPS, SamplingParams, logit_bias_pairs

MAX_MESSAGES = 4096

LABEL_FIELDS = {
    "metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user", "verbosity",
}  # fmt: skip
_COMMON = {
    "frequency_penalty", "ignore_eos", "logit_bias", "logprobs", "max_tokens", "min_p", "model", "n",
    "presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "stream", "stream_options",
    "temperature", "top_k", "top_p",
}  # fmt: skip
CHAT_FIELDS = _COMMON | {
    "chat_template_kwargs", "max_completion_tokens", "messages", "parallel_tool_calls", "response_format",
    "thinking", "tool_choice", "tools", "top_logprobs",
}  # fmt: skip
COMPLETION_FIELDS = _COMMON | {"prompt"}
UNSUPPORTED_FIELDS = {
    "audio": "this model speaks text only",
    "best_of": "send n instead and choose yourself",
    "chat_template": "templates of clients are never run",
    "echo": "the prompt is not sent back",
    "function_call": "send tool_choice instead",
    "functions": "send tools instead",
    "guided_choice": "answers cannot be constrained",
    "guided_grammar": "answers cannot be constrained",
    "guided_json": "answers cannot be constrained",
    "guided_regex": "answers cannot be constrained",
    "modalities": "this model speaks text only",
    "prediction": "drafts are the server's own",
    "prompt_logprobs": "log-probabilities of prompts are not computed",
    "reasoning_effort": 'this model has no levels of effort; send thinking: {"type": "enabled"}',
    "suffix": "this model continues text and does not fill gaps",
    "use_beam_search": "answers are sampled",
    "web_search_options": "this server fetches nothing",
}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What both kinds of call have in common.

    `params.max_tokens` stands for nothing until the prompt is known: `max_tokens` is what the client said.
    """

    model: str
    params: SamplingParams
    max_tokens: int | None = None
    max_tokens_field: str = "max_tokens"
    stream: bool = False
    include_usage: bool = False
    unknown_fields: frozenset[str] = field(default_factory=frozenset)


@dataclass(frozen=True, kw_only=True)
class ChatCall(Call):
    """A conversation to answer."""

    messages: tuple[Message, ...] = field(repr=False)
    tools: tuple[Tool, ...] = field(default=(), repr=False)
    thinking: bool = False
    schema: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class CompletionCall(Call):
    """A text, or token ids, to continue."""

    prompt: str | tuple[int, ...] = field(repr=False)


def chat_call(body: Mapping[str, Any]) -> ChatCall:
    """A chat request.

    Raises:
        Refusal, RequestError: it cannot be served; the field is named.
    """
    fields = Fields(body)
    _refuse_unsupported(fields, CHAT_FIELDS)
    messages = fields.need("messages")
    if isinstance(messages, list) and len(messages) > MAX_MESSAGES:
        raise Refusal(
            Kind.INVALID_VALUE, f"has {len(messages)} entries; send at most {MAX_MESSAGES}", "messages"
        )
    max_tokens, max_tokens_field = _max_tokens(fields, "max_tokens", "max_completion_tokens")
    return ChatCall(
        **_common(fields, max_tokens, _chat_logprobs(fields)),
        max_tokens_field=max_tokens_field,
        messages=messages_from_json(messages),
        tools=read_tools(fields),
        thinking=_thinking(fields),
        schema=read_schema(fields),
        unknown_fields=frozenset(fields.keys() - CHAT_FIELDS - LABEL_FIELDS),
    )


def completion_call(body: Mapping[str, Any]) -> CompletionCall:
    """A request to continue a prompt.

    Raises:
        Refusal, RequestError: it cannot be served; the field is named.
    """
    fields = Fields(body)
    _refuse_unsupported(fields, COMPLETION_FIELDS)
    max_tokens, _ = _max_tokens(fields, "max_tokens")
    return CompletionCall(
        **_common(fields, max_tokens, fields.integer("logprobs")),
        prompt=_prompt(fields.need("prompt")),
        unknown_fields=frozenset(fields.keys() - COMPLETION_FIELDS - LABEL_FIELDS),
    )


def _refuse_unsupported(fields: Fields, known: set[str]) -> None:
    for key in sorted(fields.keys() & UNSUPPORTED_FIELDS.keys() - known):
        raise fields.refuse(key, f"is not supported: {UNSUPPORTED_FIELDS[key]}")


def _common(fields: Fields, max_tokens: int | None, logprobs: int | None) -> dict[str, Any]:
    model = fields.need("model")
    if not isinstance(model, str):
        raise Refusal(Kind.INVALID_TYPE, f"must be a string, not {kind_of(model)}", "model")
    stream = fields.flag("stream") or False
    options = fields.object("stream_options")
    if options and not stream:
        raise fields.refuse("stream_options", "goes with stream: true only", Kind.INVALID_VALUE)
    return {
        "model": model,
        "params": _params(fields, max_tokens, logprobs),
        "max_tokens": max_tokens,
        "stream": stream,
        "include_usage": bool(options and options.flag("include_usage")),
    }


def _params(fields: Fields, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
    given: dict[str, Any] = {"max_tokens": 1 if max_tokens is None else max_tokens, "logprobs": logprobs}
    for key in (
        "temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty",
    ):  # fmt: skip
        given[key] = fields.number(key)
    for key in ("top_k", "n"):
        given[key] = fields.integer(key)
    given["ignore_eos"] = fields.flag("ignore_eos")
    seed = fields.integer("seed")
    given["seed"] = secrets.randbits(63) if seed is None else seed
    bias: Mapping[int | str, float] | None = fields.mapping("logit_bias")  # type: ignore[assignment]
    if bias is not None:
        given["logit_bias"] = logit_bias_pairs(bias)
    given["stop"] = _stop(fields)
    if (ids := fields.items("stop_token_ids")) is not None:
        given["stop_token_ids"] = tuple(ids)
    return SamplingParams(**{key: value for key, value in given.items() if value is not None})


def _max_tokens(fields: Fields, *keys: str) -> tuple[int | None, str]:
    """The longest answer asked for, and by which of its names; values are checked by `SamplingParams`."""
    given = {key: value for key in keys if (value := fields.integer(key)) is not None}
    if len(set(given.values())) > 1:
        raise fields.refuse(keys[0], f"contradicts {keys[1]}; send one of them", Kind.INVALID_VALUE)
    for key, value in given.items():
        if value < 1:
            raise fields.refuse(key, f"is {str(value)[:20]}; it takes an integer from 1", Kind.INVALID_VALUE)
        return value, key
    return None, keys[0]


def _stop(fields: Fields) -> tuple[str, ...] | None:
    stop = fields.get("stop")
    if stop is None:
        return None
    if isinstance(stop, str):
        return (stop,)
    if not isinstance(stop, list):
        raise fields.refuse(
            "stop", f"must be a string or a list of strings, not {kind_of(stop)}", Kind.INVALID_TYPE
        )
    if len(stop) > MAX_STOPS:
        raise RequestError("stop", f"has {len(stop)} strings; send at most {MAX_STOPS}")
    return tuple(stop)


def _chat_logprobs(fields: Fields) -> int | None:
    wanted, top = fields.flag("logprobs"), fields.integer("top_logprobs")
    if top is not None and not wanted:
        raise fields.refuse("top_logprobs", "goes with logprobs: true only", Kind.INVALID_VALUE)
    if top is not None and not 0 <= top <= 20:
        raise fields.refuse("top_logprobs", "takes an integer from 0 to 20", Kind.INVALID_VALUE)
    return (top or 0) if wanted else None


def _thinking(fields: Fields) -> bool:
    """Whether the model is to reason, by either of the two ways to say so."""
    said: set[bool] = set()
    if (thinking := fields.object("thinking")) is not None:
        kind = thinking.need("type")
        if kind not in ("enabled", "disabled"):
            raise thinking.refuse("type", "must be enabled or disabled", Kind.INVALID_VALUE)
        said.add(kind == "enabled")
    if (kwargs := fields.object("chat_template_kwargs")) is not None:
        for key in sorted(kwargs.keys() - {"thinking"}):
            raise kwargs.refuse(key[:64], "cannot be set; only thinking can")
        if (value := kwargs.flag("thinking")) is not None:
            said.add(value)
    if len(said) > 1:
        raise fields.refuse("thinking", "contradicts chat_template_kwargs.thinking", Kind.INVALID_VALUE)
    return said == {True}


def _prompt(raw: object) -> str | tuple[int, ...]:
    if isinstance(raw, list) and len(raw) == 1 and isinstance(raw[0], str | list):
        raw = raw[0]  # a list of one prompt
    if isinstance(raw, str):
        check_text("prompt", raw)
        return raw
    if not isinstance(raw, list):
        raise Refusal(
            Kind.INVALID_TYPE, f"must be a string or a list of token ids, not {kind_of(raw)}", "prompt"
        )
    if not raw:
        raise Refusal(Kind.INVALID_VALUE, "is empty; send at least one token", "prompt")
    if all(isinstance(item, str | list) for item in raw):
        raise Refusal(Kind.UNSUPPORTED, "holds several prompts; send a request for each", "prompt")
    if not all(type(item) is int for item in raw):
        raise Refusal(Kind.INVALID_TYPE, "must hold token ids only", "prompt")
    return tuple(raw)

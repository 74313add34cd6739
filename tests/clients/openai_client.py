"""The OpenAI client, of either major version, against the gateways of `conftest.py`.

Run by `test_clients.py` with the addresses as JSON; whatever is wrong is an exception.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import openai

MESSAGES: Any = [{"role": "user", "content": 'What does "harbor" mean?'}]
ANSWER = "Noun: a person who is harbor of a woman."
GREEDY: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0}
ENDLESS: Any = {"model": "demo", "messages": MESSAGES, "max_tokens": 6000, "extra_body": {"ignore_eos": True}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def check_models(at: dict[str, openai.OpenAI]) -> None:
    assert [model.id for model in at["open"].models.list()] == ["demo"]
    assert at["open"].models.retrieve("demo").owned_by == "eightfold"


def check_chat(at: dict[str, openai.OpenAI]) -> None:
    answer = at["open"].chat.completions.create(**GREEDY)
    (choice,) = answer.choices
    assert (choice.message.content, choice.message.role) == (ANSWER, "assistant")
    assert choice.finish_reason == "stop"
    assert answer._request_id.startswith("req_")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (13, 15, 28)
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_cache_hit_tokens


def check_stream(at: dict[str, openai.OpenAI]) -> None:
    chunks = list(
        at["open"].chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == ANSWER
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.total_tokens == 28


def check_choices_and_seed(at: dict[str, openai.OpenAI]) -> None:
    options = {**GREEDY, "temperature": 1.5, "n": 2, "seed": 11, "max_tokens": 12}
    first, second = (at["open"].chat.completions.create(**options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 2
    assert texts == [choice.message.content for choice in second.choices]
    other = at["open"].chat.completions.create(**{**options, "seed": 12})
    assert texts != [choice.message.content for choice in other.choices]


def check_stop(at: dict[str, openai.OpenAI]) -> None:
    answer = at["open"].chat.completions.create(**GREEDY, stop=["person"])
    assert answer.choices[0].message.content == "Noun: a "
    assert answer.choices[0].finish_reason == "stop"
    short = at["open"].chat.completions.create(**GREEDY, max_tokens=3)
    assert short.choices[0].finish_reason == "length"
    assert short.usage.completion_tokens == 3


def check_logprobs(at: dict[str, openai.OpenAI]) -> None:
    answer = at["open"].chat.completions.create(**GREEDY, logprobs=True, top_logprobs=2, max_tokens=4)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in entries)


def check_completions(at: dict[str, openai.OpenAI]) -> None:
    options: Any = {"model": "demo", "prompt": "def read(path):", "temperature": 0, "max_tokens": 8}
    whole = at["open"].completions.create(**options, logprobs=1)
    chunks = list(at["open"].completions.create(**options, stream=True))
    assert whole.choices[0].text == "".join(chunk.choices[0].text for chunk in chunks)
    assert "".join(whole.choices[0].logprobs.tokens) == whole.choices[0].text
    assert whole.usage.completion_tokens == 8


def check_reasoning(at: dict[str, openai.OpenAI]) -> None:
    answer = at["open"].chat.completions.create(
        **GREEDY, max_tokens=6, extra_body={"thinking": {"type": "enabled"}}
    )
    assert answer.choices[0].message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens > 0


def check_tools(at: dict[str, openai.OpenAI]) -> None:
    """A call comes back as the client's types, whole and in pieces, and is sent on with its result."""
    ask = {**GREEDY, "tools": [WEATHER]}
    whole = at["tools"].chat.completions.create(**ask)
    assert whole.choices[0].finish_reason == "tool_calls"
    (call,) = whole.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "weather")
    assert json.loads(call.function.arguments) == {"city": "Cork"}
    pieces = [
        piece
        for chunk in at["tools"].chat.completions.create(**ask, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    assert [piece.function.name for piece in pieces if piece.id] == ["weather"]
    assert "".join(piece.function.arguments or "" for piece in pieces) == call.function.arguments
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*MESSAGES, whole.choices[0].message, result]
    told = at["tools"].chat.completions.create(**{**ask, "messages": messages, "max_tokens": 4})
    assert told.choices[0].finish_reason in ("stop", "length")
    assert told.usage.prompt_tokens > whole.usage.prompt_tokens


def check_errors(at: dict[str, openai.OpenAI]) -> None:
    chat = at["open"].chat.completions.create
    bad = refused(openai.BadRequestError, lambda: chat(**{**GREEDY, "temperature": 3}))
    assert (bad.status_code, bad.type, bad.code, bad.param) == (
        400, "invalid_request_error", "invalid_value", "temperature",
    )  # fmt: skip
    assert bad.request_id.startswith("req_")
    long = refused(openai.BadRequestError, lambda: chat(**GREEDY, max_tokens=10**9))
    assert (long.code, long.param) == ("context_length_exceeded", "max_tokens")
    assert refused(openai.NotFoundError, lambda: chat(**{**GREEDY, "model": "gpt"})).code == "model_not_found"
    key = refused(openai.AuthenticationError, lambda: at["stranger"].models.list())
    assert (key.status_code, key.code) == (401, "invalid_api_key")
    full = refused(openai.InternalServerError, lambda: at["draining"].chat.completions.create(**GREEDY))
    assert (full.status_code, full.code) == (503, "overloaded")
    assert 1 <= int(full.response.headers["retry-after"]) <= 120


def check_time_and_broken_streams(at: dict[str, openai.OpenAI]) -> None:
    chat = at["hasty"].chat.completions.create
    late = refused(openai.InternalServerError, lambda: chat(**ENDLESS))
    assert (late.status_code, late.code) == (504, "timeout")
    broken = refused(openai.APIError, lambda: list(chat(**ENDLESS, stream=True)))
    assert broken.code == "timeout"


def check_clear_text(at: dict[str, openai.OpenAI]) -> None:
    """Where the gateway speaks TLS, who does not is told so at once, or cut off."""
    secure = str(at["open"].base_url)
    if secure.startswith("https://"):
        clear = at["open"].with_options(base_url=secure.replace("https://", "http://"), timeout=20.0)
        refused(openai.APIConnectionError, lambda: clear.models.list())


def refused(kind: type[openai.APIError], call: Callable[[], Any]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    where = json.loads(sys.argv[1])
    keys = dict.fromkeys(where["urls"], where["key"]) | {"stranger": "sk-nobody"}
    urls = where["urls"] | {"stranger": where["urls"]["open"]}
    at = {
        name: openai.OpenAI(base_url=f"{url}/v1", api_key=keys[name], max_retries=0, timeout=60.0)
        for name, url in urls.items()
    }
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(at)
            print(name.removeprefix("check_"), "ok")
    print("openai", openai.__version__)


if __name__ == "__main__":
    main()

"""LiteLLM as a library, by two of its providers: `openai/` and `deepseek/`.

Run by `test_clients.py` with the addresses as JSON; whatever is wrong is an exception.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import litellm

MESSAGES = [{"role": "user", "content": 'What does "harbor" mean?'}]
ANSWER = "Noun: a person who is harbor of a woman."
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
PROVIDERS = ("openai", "deepseek")

Ask = Callable[..., Any]


def check_chat(ask: Ask, provider: str) -> None:
    answer = ask("open", provider)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (13, 15)
    assert answer.usage.prompt_tokens_details.cached_tokens is not None


def check_stream(ask: Ask, provider: str) -> None:
    chunks = list(ask("open", provider, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == ANSWER
    usages = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert [(usage.prompt_tokens, usage.completion_tokens) for usage in usages] == [(13, 15)]


def check_choices_and_seed(ask: Ask, provider: str) -> None:
    if provider == "deepseek":  # its own service has neither
        return
    options = {"n": 2, "seed": 11, "temperature": 1.5, "max_tokens": 12}
    first, second = (ask("open", provider, **options) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 2
    assert texts == [choice.message.content for choice in second.choices]


def check_stop_and_logprobs(ask: Ask, provider: str) -> None:
    assert ask("open", provider, stop=["person"]).choices[0].message.content.rstrip() == "Noun: a"
    answer = ask("open", provider, logprobs=True, top_logprobs=2, max_tokens=4)
    entries = answer.choices[0].logprobs.content
    assert "".join(entry.token for entry in entries) == answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"


def check_tools(ask: Ask, provider: str) -> None:
    """A call comes back as the client's types and is sent on with its result."""
    answer = ask("tools", provider, tools=[WEATHER])
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments) == {"city": "Cork"}
    rebuilt = litellm.stream_chunk_builder(list(ask("tools", provider, tools=[WEATHER], stream=True)))
    (again,) = rebuilt.choices[0].message.tool_calls
    assert again.function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    messages = [*MESSAGES, answer.choices[0].message.model_dump(), result]
    told = ask("tools", provider, tools=[WEATHER], messages=messages, max_tokens=4)
    assert told.usage.prompt_tokens > answer.usage.prompt_tokens


def check_errors(ask: Ask, provider: str) -> None:
    bad = refused(litellm.BadRequestError, lambda: ask("open", provider, temperature=3))
    assert "temperature" in str(bad)
    too_long = refused(litellm.ContextWindowExceededError, lambda: ask("open", provider, max_tokens=10**9))
    assert "8192" in str(too_long)
    refused(litellm.AuthenticationError, lambda: ask("open", provider, api_key="sk-nobody"))
    refused(litellm.NotFoundError, lambda: ask("open", provider, model=f"{provider}/gpt"))
    refused(litellm.ServiceUnavailableError, lambda: ask("draining", provider))


def check_completions(ask: Ask, provider: str) -> None:
    if provider == "deepseek":
        return
    answer = ask(
        "open", provider, call=litellm.text_completion, model="text-completion-openai/demo",
        messages=None, prompt="def read(path):", max_tokens=8,
    )  # fmt: skip
    assert answer.choices[0].text
    assert answer.usage.completion_tokens == 8


def refused(kind: type[Exception], call: Callable[[], Any]) -> Exception:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    where = json.loads(sys.argv[1])

    def ask(name: str, provider: str, call: Ask = litellm.completion, **options: Any) -> Any:
        given = {
            "model": f"{provider}/demo", "messages": MESSAGES, "temperature": 0, "api_key": where["key"],
            "api_base": f"{where['urls'][name]}/v1", "num_retries": 0, "max_retries": 0, "timeout": 60,
        } | options  # fmt: skip
        return call(**{key: value for key, value in given.items() if value is not None})

    for provider in PROVIDERS:
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                check(ask, provider)
                print(provider, name.removeprefix("check_"), "ok")


if __name__ == "__main__":
    main()

"""LangChain's `ChatOpenAI`.

Run by `test_clients.py` with the addresses as JSON; whatever is wrong is an exception.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import openai
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI

QUESTION = 'What does "harbor" mean?'
ANSWER = "Noun: a person who is harbor of a woman."

At = Callable[..., ChatOpenAI]


@tool
def weather(city: str) -> str:
    """Tells the weather."""
    return f"rain in {city}"


def check_invoke(at: At) -> None:
    message = at("open").invoke(QUESTION)
    assert message.content == ANSWER
    assert message.usage_metadata["input_tokens"] == 13
    assert message.usage_metadata["output_tokens"] == 15
    assert message.response_metadata["finish_reason"] == "stop"
    assert message.response_metadata["model_name"] == "demo"


def check_stream(at: At) -> None:
    chunks = list(at("open", stream_usage=True).stream(QUESTION))
    assert "".join(chunk.content for chunk in chunks) == ANSWER
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole += chunk
    assert whole.usage_metadata["total_tokens"] == 28


def check_choices_and_seed(at: At) -> None:
    model = at("open", n=2, seed=11, temperature=1.5, max_tokens=12)
    first, second = (model.generate([[HumanMessage(QUESTION)]]) for _ in range(2))
    texts = [generation.text for generation in first.generations[0]]
    assert len(set(texts)) == 2
    assert texts == [generation.text for generation in second.generations[0]]


def check_stop_and_logprobs(at: At) -> None:
    assert at("open").invoke(QUESTION, stop=["person"]).content == "Noun: a "
    message = at("open", logprobs=True, top_logprobs=2, max_tokens=4).invoke(QUESTION)
    entries = message.response_metadata["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == message.content


def check_batch(at: At) -> None:
    assert [message.content for message in at("open").batch([QUESTION] * 4)] == [ANSWER] * 4


def check_tools(at: At) -> None:
    """A call comes back as the client's types and is sent on with its result."""
    model = at("tools").bind_tools([weather])
    message = model.invoke(QUESTION)
    (call,) = message.tool_calls
    assert (call["name"], call["args"]) == ("weather", {"city": "Cork"})
    whole = None
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert [(piece["name"], piece["args"]) for piece in whole.tool_calls] == [("weather", {"city": "Cork"})]
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    told = at("tools", max_tokens=4).bind_tools([weather]).invoke([HumanMessage(QUESTION), message, result])
    assert told.usage_metadata["input_tokens"] > message.usage_metadata["input_tokens"]


def check_errors(at: At) -> None:
    bad = refused(openai.BadRequestError, lambda: at("open", temperature=3).invoke(QUESTION))
    assert bad.param == "temperature"
    refused(openai.BadRequestError, lambda: at("open", max_tokens=10**9).invoke(QUESTION))
    refused(openai.NotFoundError, lambda: at("open", model="gpt").invoke(QUESTION))
    refused(openai.AuthenticationError, lambda: at("open", api_key="sk-nobody").invoke(QUESTION))
    full = refused(openai.InternalServerError, lambda: at("draining").invoke(QUESTION))
    assert full.status_code == 503
    endless = at("hasty", max_tokens=6000, extra_body={"ignore_eos": True}, temperature=1)
    refused(openai.APIError, lambda: list(endless.stream(QUESTION)))


def check_completions(at: At) -> None:
    whole = at("open", kind=OpenAI, max_tokens=8).invoke("def read(path):")
    assert whole
    assert "".join(at("open", kind=OpenAI, max_tokens=8).stream("def read(path):")) == whole


def refused(kind: type[Exception], call: Callable[[], Any]) -> Any:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    where = json.loads(sys.argv[1])

    def at(name: str, kind: type[Any] = ChatOpenAI, **options: Any) -> Any:
        given = {
            "model": "demo", "temperature": 0, "api_key": where["key"], "max_retries": 0, "timeout": 60,
            "base_url": f"{where['urls'][name]}/v1",
        }  # fmt: skip
        return kind(**{**given, **options})

    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check(at)
            print(name.removeprefix("check_"), "ok")


if __name__ == "__main__":
    main()

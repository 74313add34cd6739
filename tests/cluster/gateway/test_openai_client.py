"""The OpenAI client, unchanged."""

import json
from typing import Any

import openai
import pytest

from cluster.cli import main
from tests.checkpoints import DEMO
from tests.cluster.gateway.serving import HARBOR, HARBOR_ANSWER, Served

GREEDY: dict[str, Any] = {"model": "demo", "messages": HARBOR, "temperature": 0}


def test_a_whole_answer_with_usage(served: Served) -> None:
    with served.openai() as client:
        answer = client.chat.completions.create(**GREEDY)
    assert answer.id.startswith("chatcmpl-")
    assert answer._request_id
    assert answer._request_id.startswith("req_")
    assert answer.choices[0].message.content == HARBOR_ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (13, 15)
    assert answer.usage.prompt_tokens_details
    hit, miss = answer.usage.prompt_cache_hit_tokens, answer.usage.prompt_cache_miss_tokens  # type: ignore[attr-defined]
    assert hit + miss == 13
    assert hit == answer.usage.prompt_tokens_details.cached_tokens


def test_a_stream_is_the_same_answer(served: Served) -> None:
    with served.openai() as client:
        chunks = list(
            client.chat.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True})
        )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == HARBOR_ANSWER
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == [
        "stop"
    ]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert not chunks[-1].choices
    assert chunks[-1].usage
    assert chunks[-1].usage.total_tokens == 28


def test_choices_differ_and_a_seed_repeats_them(served: Served) -> None:
    options = {**GREEDY, "temperature": 1.5, "n": 3, "seed": 7, "max_tokens": 12}
    with served.openai() as client:
        first, second = (client.chat.completions.create(**options) for _ in range(2))
        alone = client.chat.completions.create(**{**options, "n": 1})
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert texts == [choice.message.content for choice in second.choices]
    assert alone.choices[0].message.content == texts[0]
    assert first.usage
    assert first.usage.prompt_tokens == 13
    assert 3 < first.usage.completion_tokens <= 36


def test_logprobs_of_chat_and_of_completions(served: Served) -> None:
    with served.openai() as client:
        chat = client.chat.completions.create(**GREEDY, logprobs=True, top_logprobs=3, max_tokens=4)
        text = client.completions.create(
            model="demo", prompt="def f(", temperature=0, logprobs=2, max_tokens=4
        )
    assert chat.choices[0].logprobs
    assert chat.choices[0].logprobs.content
    entries = chat.choices[0].logprobs.content
    assert len(entries) == 4
    assert "".join(entry.token for entry in entries) == chat.choices[0].message.content
    for entry in entries:
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (top.logprob for top in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
        assert bytes(entry.bytes or []).decode() == entry.token
    assert text.choices[0].logprobs
    assert "".join(text.choices[0].logprobs.tokens or []) == text.choices[0].text
    assert all(len(top) == 2 for top in text.choices[0].logprobs.top_logprobs or [])


def test_stop_strings_are_cut_and_end_the_answer(served: Served) -> None:
    with served.openai() as client:
        answer = client.chat.completions.create(**GREEDY, stop=["person", "nowhere"])
        chunks = list(client.chat.completions.create(**GREEDY, stop="person", stream=True))
    assert answer.choices[0].message.content == "Noun: a "
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Noun: a "
    assert answer.usage
    assert answer.usage.completion_tokens < 15


def test_reasoning_comes_apart_from_content(served: Served) -> None:
    with served.openai() as client:
        options = {**GREEDY, "max_tokens": 8, "extra_body": {"thinking": {"type": "enabled"}}}
        answer = client.chat.completions.create(**options)
        chunks = list(client.chat.completions.create(**options, stream=True))
    message = answer.choices[0].message
    reasoning = message.reasoning_content  # type: ignore[attr-defined]
    assert reasoning
    assert "".join(getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks) == reasoning
    assert answer.usage
    assert answer.usage.completion_tokens_details
    assert 0 < (answer.usage.completion_tokens_details.reasoning_tokens or 0) <= 8


@pytest.mark.parametrize("as_ids", [False, True])
def test_completions_equal_the_oracle(served: Served, as_ids: bool) -> None:
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    oracle = next(prompt for prompt in prompts if prompt["name"] == "code")
    prompt = served.run(served.server.gateway.encode(oracle["prompt"])) if as_ids else oracle["prompt"]
    with served.openai() as client:
        answer = client.completions.create(
            model="demo", prompt=prompt, temperature=0, max_tokens=32, extra_body={"ignore_eos": True}
        )
    assert answer.choices[0].text == oracle["output_text"]
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage
    assert answer.usage.prompt_tokens == oracle["prompt_tokens"]


def test_the_command_generate_says_the_same(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    main(["generate", "--prompt", "def main(", "--max-tokens", "24", "--json"])
    report = json.loads(capsys.readouterr().out)
    with served.openai() as client:
        answer = client.completions.create(model="demo", prompt="def main(", temperature=0, max_tokens=24)
    assert answer.choices[0].text == report["text"]
    assert answer.choices[0].finish_reason == report["finish_reason"]


def test_a_forbidden_token_does_not_come(served: Served) -> None:
    first = served.run(served.server.gateway.encode(HARBOR_ANSWER))[1]
    with served.openai() as client:
        answer = client.chat.completions.create(**GREEDY, logit_bias={str(first): -100}, max_tokens=4)
    assert not (answer.choices[0].message.content or "").startswith("N")


def test_errors_have_the_client_s_types(served: Served) -> None:
    with served.openai() as client:
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(**{**GREEDY, "temperature": 3})
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(**{**GREEDY, "model": "gpt"})
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").owned_by == "eightfold"
    assert (bad.value.param, bad.value.code) == ("temperature", "invalid_value")
    assert missing.value.code == "model_not_found"


def test_tools_are_accepted_and_shown_to_the_model(served: Served) -> None:
    tool: Any = {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
    }
    with served.openai() as client:
        plain = client.chat.completions.create(**GREEDY, max_tokens=1)
        none = client.chat.completions.create(**GREEDY, max_tokens=1, tools=[tool], tool_choice="none")
        auto = client.chat.completions.create(**GREEDY, max_tokens=1, tools=[tool], tool_choice="auto")
    assert plain.usage
    assert none.usage
    assert auto.usage
    assert plain.usage.prompt_tokens == none.usage.prompt_tokens < auto.usage.prompt_tokens


def test_deepseek_s_base_address_works_too(served: Served) -> None:
    with served.openai(base_url=served.url) as client:
        assert client.chat.completions.create(**GREEDY).choices[0].message.content == HARBOR_ANSWER

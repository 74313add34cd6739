"""How often the demo finds what it is asked for in a document, over HTTP, beside its model card.

    eightfold serve &
    python -m benchmarks.lookup http://127.0.0.1:8000 [--tokens 1000 2000 4000] [--at-once 4]

The conversations of `lookup.jsonl` are scored as on the card: greedy, the whole answer must be the given one,
earlier answers of a conversation stand as they are given. The card's own documents were others, of the same
kinds; from n answers an accuracy has an error of about 1/sqrt(n).
"""

import argparse
import json
import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx2

from cluster.demo import DEMO

CARD = {1000: 0.9179, 2000: 0.9306, 4000: 0.929}
MAX_TOKENS = 34  # the longest given answer has 32 characters
COLUMNS = ("document", "answers", "exact", "accuracy", "error", "card", "prompts", "cached", "seconds")


@dataclass(frozen=True)
class Question:
    """The messages up to a question, and its one right answer."""

    messages: list[dict[str, str]]
    answer: str


def questions(length: int) -> list[Question]:
    """Every question about the documents of about this many tokens."""
    lines = [json.loads(line) for line in (DEMO / "lookup.jsonl").read_text().splitlines()]
    return [
        Question(line["messages"][:i], message["content"])
        for line in lines
        if line["length"] == length
        for i, message in enumerate(line["messages"])
        if message["role"] == "assistant"
    ]


def ask(client: httpx2.Client, model: str, question: Question) -> dict[str, Any]:
    """The whole response to a question."""
    body = {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
    response = client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    answer: dict[str, Any] = response.json()
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("url", help="of the server, without /v1")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(CARD), help="lengths of documents")
    parser.add_argument("--at-once", type=int, default=4, help="requests at the same time")
    parser.add_argument("--key", default="none", help="API key, where the server wants one")
    options = parser.parse_args()
    headers = {"authorization": f"Bearer {options.key}"}
    print("".join(f"{name:<11}" for name in COLUMNS))
    with (
        httpx2.Client(base_url=options.url, headers=headers, timeout=600, trust_env=False) as client,
        ThreadPoolExecutor(options.at_once) as threads,
    ):
        model = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]
        for length in options.tokens:
            asked = questions(length)
            started = time.perf_counter()
            answers = list(threads.map(lambda question: ask(client, model, question), asked))
            seconds = time.perf_counter() - started
            exact = sum(
                answer["choices"][0]["message"]["content"] == question.answer
                for answer, question in zip(answers, asked, strict=True)
            )
            prompt = sum(answer["usage"]["prompt_tokens"] for answer in answers)
            cached = sum(answer["usage"]["prompt_cache_hit_tokens"] for answer in answers)
            row = [
                length, len(asked), exact, f"{exact / len(asked):.4f}", f"{1 / math.sqrt(len(asked)):.2f}",
                CARD.get(length, "-"), prompt, cached, f"{seconds:.1f}",
            ]  # fmt: skip
            print("".join(f"{cell!s:<11}" for cell in row), flush=True)


if __name__ == "__main__":
    main()

"""How many drafts of the demo's MTP module are accepted, by position, greedy.

    python -m benchmarks.acceptance [--lookups 12]

Beside the oracle's prompts (32 tokens each) stands what the card's oracle says of the first draft at every
position; the engine judges fewer, because a step that accepts a draft skips the next one. Lookup answers are
those of `lookup.jsonl`, up to the end of sequence.
"""

import argparse
import json
import statistics
from typing import Any

import torch

from cluster.demo import DEMO
from model.chat.encoding import ChatEncoding, encode_chat
from model.chat.messages import Message
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from workers.engine import EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request
from workers.speculate import MAX_DRAFTS, Acceptance


def lookup_prompts(tokenizer: Tokenizer, count: int) -> list[list[int]]:
    """Prompts that end where the first answer of a conversation begins, shortest documents first."""
    lines = [json.loads(line) for line in (DEMO / "lookup.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: line["prompt_tokens"])
    prompts = []
    for line in lines[:count]:
        turns = [Message(turn["role"], turn["content"]) for turn in line["messages"]]
        first_answer = next(i for i, turn in enumerate(turns) if turn.role == "assistant")
        prompts.append(encode_chat(tokenizer, ChatEncoding.EXP.render(turns[:first_answer])))
    return prompts


def accepted(
    model: LocalModel, prompts: list[list[int]], num_drafts: int, params: SamplingParams
) -> Acceptance:
    """Run the prompts one after the other."""
    longest = max(map(len, prompts)) + params.max_tokens
    engine = model.engine(EngineConfig(num_drafts=num_drafts), longest)
    for prompt in prompts:
        engine.add(Request("r", tuple(prompt), params))
        while not engine.is_idle:
            engine.step()
    return engine.acceptance


def prompt_sets(tokenizer: Tokenizer, num_lookups: int) -> dict[str, tuple[list[list[int]], SamplingParams]]:
    """Prompts and how to continue them."""
    oracle = [tokenizer.encode(prompt["prompt"]) for prompt in oracle_prompts()]
    whole = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    answers = SamplingParams(max_tokens=32, temperature=0)
    return {"oracle": (oracle, whole), "lookup answers": (lookup_prompts(tokenizer, num_lookups), answers)}


def oracle_prompts() -> list[dict[str, Any]]:
    prompts: list[dict[str, Any]] = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    return prompts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lookups", type=int, default=12, help="conversations of lookup.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(2)
    tokenizer, model = Tokenizer.load(DEMO), LocalModel(DEMO, ModelOptions())
    agreement = statistics.mean(prompt["mtp_agreement"] for prompt in oracle_prompts())
    print(f"model card's oracle, first draft at every position: {agreement:.3f}")
    for name, (prompts, params) in prompt_sets(tokenizer, options.lookups).items():
        for num_drafts in range(1, MAX_DRAFTS + 1):
            result = accepted(model, prompts, num_drafts, params)
            rates = "  ".join(f"{rate:.3f}" for rate in result.rates())
            print(
                f"{name:<16}{num_drafts} drafts, accepted by position: {rates}"
                f"   of {result.drafted[:num_drafts]}"
            )


if __name__ == "__main__":
    main()

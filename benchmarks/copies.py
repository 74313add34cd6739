"""How often a token is sent with the gate's limit on nodes, and without it, over 8 nodes.

Counted by the tracer on the demo's own text. `at random` is what gates that choose evenly would need, of so
many groups, experts a group, experts a token and groups at most: each token goes once to each node that holds
one of its experts.
"""

import json
from math import comb
from typing import Any

from cluster.demo import DEMO
from cluster.trace.collect import trace
from cluster.trace.recorder import WatchedModel
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from workers.engine import EngineConfig
from workers.local import ModelOptions
from workers.sequence import Request

PROMPTS = ("chat", "code", "lookup_300", "lookup_1000", "lookup_3000")


def at_random(groups: int, group_size: int, k: int) -> float:
    """Groups that k different experts out of all of them lie in, on average."""
    missed = comb((groups - 1) * group_size, k) / comb(groups * group_size, k)
    return groups * (1 - missed)


def theory(groups: int, topk_group: int, experts: int, k: int) -> dict[str, float]:
    size = experts // groups
    limited, unrestricted = at_random(topk_group, size, k), at_random(groups, size, k)
    return {
        "limited": round(limited, 3),
        "unrestricted": round(unrestricted, 3),
        "ratio": round(limited / unrestricted, 3),
    }


def counted(model: WatchedModel, tokenizer: Tokenizer, name: str, text: str) -> dict[str, Any]:
    """Copies and bytes a token and layer, of a prompt and its answer."""
    params = SamplingParams(max_tokens=32, temperature=0, ignore_eos=True)
    request = Request(name, tuple(tokenizer.encode(text)), params)
    copies = trace(model, tokenizer, request, EngineConfig()).routing.copies
    returned = model.local.config.hidden_size * 4  # one sum in fp32
    a_copy = copies.bytes_each + returned
    return {
        "tokens": len(request.prompt_ids) + params.max_tokens,
        "limited": copies.sent,
        "unrestricted": copies.unrestricted,
        "one an expert": copies.one_an_expert,
        "ratio": round(copies.sent / copies.unrestricted, 3),
        "bytes": round(copies.sent * a_copy),
        "unrestricted bytes": round(copies.unrestricted * a_copy),
    }


def copies() -> dict[str, dict[str, Any]]:
    """By prompt of the oracle, and at random for the demo and for V3.2."""
    model, tokenizer = WatchedModel.load(DEMO, ModelOptions()), Tokenizer.load(DEMO)
    prompts = json.loads((DEMO / "oracle.json").read_text())["prompts"]
    texts = {prompt["name"]: prompt["prompt"] for prompt in prompts}
    config: ModelConfig = model.local.config
    return {
        **{name: counted(model, tokenizer, name, texts[name]) for name in PROMPTS},
        "at random, the demo": theory(
            config.n_group, config.topk_group, config.n_routed_experts, config.num_experts_per_tok
        ),
        "at random, V3.2": theory(8, 4, 256, 8),
    }

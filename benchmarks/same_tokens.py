"""Are the tokens of a cluster those of one process? With `deterministic: true` they must be, token for token.

    python -m benchmarks.same_tokens [--requests 64] [--longest 8000] [--out FILE.json]
    python -m benchmarks.same_tokens --device cuda [--expected TOKENS.json]

Requests of mixed lengths, greedy and sampled with seeds, all at once, through clusters that differ in chunk,
drafts, attention actors, pages and in where the experts are. The reference runs them one after another in one
engine on the CPU; `--expected` keeps its answers in a file, for a machine whose time is dear. Exits with 1 if
anything differs. With `--device cuda` the cluster's actors share two GPUs and compute in float32, whose
rounding may differ: a difference is where two tokens are all but equally likely, or an error. By the kernels
for GPUs, attention is on one GPU and experts on the other; the reference is one engine by the same kernels.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from cluster.config import ClusterConfig
from cluster.demo import DEMO
from cluster.gateway.cluster_backend import ClusterBackend
from cluster.launch import start_backend
from model.config import ModelConfig
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from workers.engine import Engine, EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.placement import ExpertPlacement
from workers.sequence import Request
from workers.transport.protocol import Address

VARIANTS: list[dict[str, Any]] = [
    {"chunk": 2048, "drafts": 0, "actors": 1, "experts": "pool", "pages": "full"},
    {"chunk": 64, "drafts": 1, "actors": 2, "experts": "pool", "pages": "full"},
    {"chunk": 100, "drafts": 3, "actors": 1, "experts": "local", "pages": "full"},
    {"chunk": 777, "drafts": 2, "actors": 2, "experts": "local", "pages": "full"},
    {"chunk": 1, "drafts": 0, "actors": 1, "experts": "local", "pages": "full", "longest": 600},
    {"chunk": 300, "drafts": "auto", "actors": 2, "experts": "pool", "pages": "fp8"},
]
TRITON: dict[str, Any] = {"actors": 1, "pages": "fp8", "kernels": "triton"}
GPU_VARIANTS: list[dict[str, Any]] = [
    {"chunk": 2048, "drafts": 0, "actors": 1, "experts": "local", "pages": "full", "carrier": "nccl"},
    {"chunk": 300, "drafts": 1, "actors": 1, "experts": "local", "pages": "fp8", "carrier": "nccl"},
    {"chunk": 2048, "drafts": 2, "actors": 1, "experts": "pool", "pages": "full", "carrier": "ipc"},
    {"chunk": 777, "drafts": 3, "actors": 1, "experts": "pool", "pages": "fp8", "carrier": "host"},
    TRITON | {"chunk": 777, "drafts": 0, "experts": "local", "carrier": "nccl"},
    TRITON | {"chunk": 777, "drafts": 0, "experts": "pool", "carrier": "ipc", "rows": "ipc"},
    TRITON
    | {"chunk": 300, "drafts": 2, "experts": "pool", "carrier": "ipc", "rows": "copy", "micro_batches": 2},
    TRITON | {"chunk": 777, "drafts": 1, "experts": "pool", "carrier": "ipc", "rows": "nccl"},
]
TOKENS_AN_ACTOR = 400_000
GPU_EXPERT_ACTORS = 4


def requests(count: int, longest: int) -> list[Request]:
    """Lookup conversations and their beginnings, from a few tokens to `longest`."""
    tokenizer = Tokenizer.load(DEMO)
    chance = random.Random(8)
    texts = [json.loads(line)["messages"] for line in (DEMO / "lookup.jsonl").open()]
    ids = [tokenizer.encode("\n".join(turn["content"] for turn in turns)) for turns in texts]
    found = []
    for number in range(count):
        prompt: list[int] = []
        wanted = min(longest, int(8 * (longest / 8) ** ((number % 16) / 15)))
        while len(prompt) < wanted:
            prompt += chance.choice(ids)
        is_greedy = number % 2 == 0
        params = SamplingParams(
            max_tokens=24,
            temperature=0 if is_greedy else 0.9,
            top_p=1 if is_greedy else 0.95,
            seed=number,
            presence_penalty=0.3 if number % 8 == 1 else 0,
            ignore_eos=True,
        )
        found.append(Request(f"r{number}", tuple(prompt[:wanted]), params))
    return found


def alone(engine: Engine, request: Request) -> list[int]:
    """The answer of an engine that runs nothing else."""
    engine.add(request)
    tokens = []
    while not engine.is_idle:
        tokens += [token.token_id for token in engine.step()]
    return tokens


def description(variant: dict[str, Any], device: str) -> ClusterConfig:
    pooled = variant["experts"] == "pool"
    role = {"attention_actors": variant["actors"], "tokens": TOKENS_AN_ACTOR, "gpus": 0.5 if pooled else 1.0}
    experts: dict[str, Any] = {"placement": variant["experts"], "layer_seconds": 60.0}
    kernels = variant.get("kernels", "reference")
    if device == "cuda":  # NCCL joins no two actors that share a GPU, so one actor has it all
        nodes = 1 if kernels == "triton" else GPU_EXPERT_ACTORS
        experts |= {"nodes": nodes, "gpus": 1 / nodes}
    return ClusterConfig.model_validate(
        {
            "model": {
                "deterministic": device == "cpu",
                "pages": variant["pages"],
                "device": device,
                "kernels": kernels,
                "dtype": "bfloat16" if kernels == "triton" else "float32",
            },
            "engine": {
                "chunk": variant["chunk"],
                "drafts": variant["drafts"],
                "max_waiting": 1024,
                "micro_batches": variant.get("micro_batches", 1),
            },
            "experts": experts,
            "carriers": {"pages": variant.get("carrier", "host"), "rows": variant.get("rows", "host")},
            "prefill": role,
            "decode": role,
            "router": {"silence_seconds": 120.0, "lease_seconds": 120.0},
        }
    )


async def together(backend: ClusterBackend, all_requests: list[Request]) -> list[list[int]]:
    """The answers to all requests at once."""

    async def answer(request: Request) -> list[int]:
        return [token.token_id async for token in await backend.generate(request)]

    backend.start()
    await backend.wait_until_ready(120)
    try:
        return await asyncio.gather(*map(answer, all_requests))
    finally:
        statuses = backend.statuses.values()
        most_nodes = max(status.most_nodes for status in statuses)
        assert most_nodes <= 4, most_nodes
        await backend.stop()


def expected_answers(variant: dict[str, Any], requests: list[Request]) -> list[list[int]]:
    """Those of one engine. That of the kernels for GPUs rounds what travels, and cuts prompts as the cluster
    does: their bits depend on both, and FP8 rows make other tokens of other bits.
    """
    if variant.get("kernels") == "triton":
        # Imported where they run: Triton is not to be had everywhere.
        from benchmarks.split_tokens import OPTIONS, in_one_process

        engine_config = EngineConfig(variant["chunk"])
        if variant["experts"] == "local":
            engine = LocalModel(DEMO, OPTIONS).engine(engine_config, TOKENS_AN_ACTOR)
        else:
            config = ModelConfig.load(DEMO)
            nobody = [Address("experts-0")]
            placement = ExpertPlacement.even(0, config.n_routed_experts, config.n_group, nobody)
            engine = in_one_process(placement, engine_config, TOKENS_AN_ACTOR)
        return [alone(engine, request) for request in requests]
    model = LocalModel(DEMO, ModelOptions(pages=variant["pages"], kernels="deterministic"))
    rooms = [len(request.prompt_ids) + request.params.max_tokens for request in requests]
    return [
        alone(model.engine(EngineConfig(), room), request)
        for request, room in zip(requests, rooms, strict=True)
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--longest", type=int, default=8000)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--expected", type=Path, help="read the reference's answers here, or write them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    variants = VARIANTS if options.device == "cpu" else GPU_VARIANTS
    expected: dict[str, list[list[int]]] = {}
    if options.expected and options.expected.exists():
        expected = json.loads(options.expected.read_text())
    work = []
    for variant in variants:
        longest = min(options.longest, variant.get("longest", options.longest))
        asked, key = requests(options.requests, longest), f"{variant['pages']} {longest} {options.requests}"
        if "kernels" in variant:
            key += f" {variant['kernels']} {variant['experts']} {variant['chunk']}"
        work.append((variant, asked, key))
        if key not in expected:
            expected[key] = expected_answers(variant, asked)
    if options.expected:
        options.expected.write_text(json.dumps(expected))
    report = []
    for variant, asked, key in work:
        started = time.perf_counter()
        with ExitStack() as stack:
            backend = start_backend(description(variant, options.device), stack, lambda _: None)
            assert isinstance(backend, ClusterBackend)
            answers = asyncio.run(together(backend, asked))
        report.append(
            {
                **variant,
                "device": options.device,
                "requests": len(asked),
                "prompt_tokens": sum(len(request.prompt_ids) for request in asked),
                "longest": max(len(request.prompt_ids) for request in asked),
                "same": sum(a == b for a, b in zip(answers, expected[key], strict=True)),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
        print(json.dumps(report[-1]), flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return int(any(entry["same"] < entry["requests"] for entry in report))


if __name__ == "__main__":
    sys.exit(main())

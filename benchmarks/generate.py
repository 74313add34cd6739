"""The demo on this CPU against `transformers` with its cache: same prompts, same run, as ratios.

    python -m benchmarks.generate [--repeats 5] [--prompt-tokens 4096] [--decode-tokens 64] [--threads 2]

Times alternate between the two in one process, so that whatever else the machine does hits both; the ratio is
of medians. Peak memory is measured in a process of its own for each. Prints a table and writes JSON beside
the other results.
"""

import argparse
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from cluster.demo import DEMO
from model.checkpoint import Checkpoint
from model.sampling_params import SamplingParams
from model.tokenizer import Tokenizer
from workers.engine import EngineConfig
from workers.local import LocalModel, ModelOptions
from workers.sequence import Request

RESULTS = Path(__file__).parent / "results"
Run = Callable[[list[int], int], tuple[float, float, list[int]]]
"""(prompt, tokens to generate) -> (seconds to the first token, seconds for the rest, tokens)."""


def ours(num_drafts: int) -> Run:
    """Our engine, float32, full pages."""
    model = LocalModel(DEMO, ModelOptions())
    engine = model.engine(EngineConfig(num_drafts=num_drafts), model.config.max_position_embeddings)
    runs = itertools.count()

    def run(prompt: list[int], num_tokens: int) -> tuple[float, float, list[int]]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        # A tenant of its own finds nothing of the last run in the prefix cache.
        engine.add(Request("benchmark", tuple(prompt), params, tenant=str(next(runs))))
        started = first = time.perf_counter()
        tokens: list[int] = []
        while not engine.is_idle:
            new = engine.step()
            if new and not tokens:
                first = time.perf_counter()
            tokens.extend(token.token_id for token in new)
        return first - started, time.perf_counter() - first, tokens

    return run


def theirs(attention: str) -> Run:
    """`transformers` with its dynamic cache, float32, the same weights."""
    from transformers import DynamicCache

    model = their_model(DEMO, attention)

    @torch.inference_mode()
    def run(prompt: list[int], num_tokens: int) -> tuple[float, float, list[int]]:
        cache = DynamicCache(config=model.config)
        started = time.perf_counter()
        out = model(torch.tensor([prompt]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        while len(tokens) < num_tokens:
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
        return first - started, time.perf_counter() - first, tokens

    return run


def their_model(directory: Path, attention: str) -> Any:
    """transformers' model of a checkpoint, from a copy that is widened to float32 first."""
    from transformers import DeepseekV32ForCausalLM

    facts = json.loads((directory / "config.json").read_text())
    facts.pop("quantization_config", None)
    facts["num_nextn_predict_layers"] = 0  # it has no class for the MTP layer
    weights = Checkpoint.open(directory).load(
        lambda spec: spec.layer < facts["num_hidden_layers"], dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as copy:
        (Path(copy) / "config.json").write_text(json.dumps(facts))
        save_file(weights, Path(copy) / "model.safetensors", {"format": "pt"})
        return DeepseekV32ForCausalLM.from_pretrained(
            copy, dtype=torch.float32, attn_implementation=attention
        ).eval()


SIDES: dict[str, Callable[[], Run]] = {
    "eightfold": lambda: ours(0),
    "eightfold, 2 drafts": lambda: ours(2),
    "transformers, sdpa": lambda: theirs("sdpa"),
    "transformers, eager": lambda: theirs("eager"),
}


def prompts(num_tokens: int) -> dict[str, list[int]]:
    """A short and a long prompt of real text, the oracle's."""
    oracle = {
        prompt["name"]: prompt["prompt"]
        for prompt in json.loads((DEMO / "oracle.json").read_text())["prompts"]
    }
    encode = Tokenizer.load(DEMO).encode
    return {"short": encode(oracle["code"]), "long": encode(oracle["lookup_6000"])[:num_tokens]}


def peak_memory(side: str, num_prompt: int) -> int:
    """Bytes that a process of its own held at most while it ran the long prompt once."""
    options = ["--memory-of", side, "--prompt-tokens", str(num_prompt)]
    command = [sys.executable, "-m", "benchmarks.generate", *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=RESULTS.parent.parent)
    return int(done.stdout)


def high_water_mark() -> int:
    """Bytes this process held at most; `getrusage` would count what the parent held at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Alternate between the sides; medians."""
    runs = {side: make() for side, make in SIDES.items()}
    inputs = prompts(options.prompt_tokens)
    times: dict[str, dict[str, list[float]]] = {side: {"prefill": [], "decode": []} for side in runs}
    answers = {}
    for run in runs.values():  # the first call pays for allocation and code paths
        run(inputs["short"], 4)
    for _ in range(options.repeats):
        for side, run in runs.items():
            _, decode, answers[side] = run(inputs["short"], options.decode_tokens)
            prefill, _, _ = run(inputs["long"], 1)
            times[side]["decode"].append(decode)
            times[side]["prefill"].append(prefill)
    sides = {
        side: {
            "decode_tokens_per_second": (options.decode_tokens - 1)
            / statistics.median(times[side]["decode"]),
            "prefill_tokens_per_second": len(inputs["long"]) / statistics.median(times[side]["prefill"]),
            "peak_memory_bytes": peak_memory(side, options.prompt_tokens),
            "same_tokens": answers[side] == answers["eightfold"],
        }
        for side in runs
    }
    return {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "prompt_tokens": len(inputs["long"]),
        "decode_tokens": options.decode_tokens,
        "repeats": options.repeats,
        "sides": sides,
    }


def table(report: dict[str, Any]) -> str:
    """The report for a person; ratios are ours over theirs, of the faster of their two."""
    lines = [f"{'':<22}{'decode tok/s':>14}{'prefill tok/s':>15}{'peak MiB':>10}  same tokens"]
    for side, row in report["sides"].items():
        lines.append(
            f"{side:<22}{row['decode_tokens_per_second']:>14.1f}{row['prefill_tokens_per_second']:>15.0f}"
            f"{row['peak_memory_bytes'] / 2**20:>10.0f}  {row['same_tokens']}"
        )
    own = report["sides"]["eightfold"]
    peers = [row for side, row in report["sides"].items() if side.startswith("transformers")]
    for key in ("decode_tokens_per_second", "prefill_tokens_per_second"):
        lines.append(f"{key.split('_')[0]} ratio: {own[key] / max(row[key] for row in peers):.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--decode-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        SIDES[options.memory_of]()(prompts(options.prompt_tokens)["long"], 1)
        print(high_water_mark())
        return
    report = measure(options)
    print(table(report))
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"generate_cpu_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path.name)


if __name__ == "__main__":
    main()

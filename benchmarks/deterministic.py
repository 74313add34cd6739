"""What the deterministic backend costs: the demo's prefill and decode against the reference, in one run.

    python -m benchmarks.deterministic [--threads 1] [--rounds 3]

Both run in turns on the same tokens; a time is the least of its rounds, a decode step's the median of 32.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from kernels.backend import Backend
from model.checkpoint import Checkpoint, Weights
from model.decoder import Decoder
from model.inputs import PAGE_SIZE, ForwardInputs
from model.moe import LocalExperts
from model.pages import PageCache, PageFormat
from tests.checkpoints import DEMO
from tests.running import lookup_documents

BACKENDS: tuple[Backend, ...] = ("reference", "deterministic")
CHUNK = 2048
NUM_STEPS = 32


@dataclass(frozen=True)
class Times:
    """Seconds of a prefill, and of one decode step of one sequence after it."""

    prefill: float
    step: float


def build(checkpoint: Checkpoint, weights: Weights, backend: Backend) -> tuple[Decoder, float]:
    """A decoder, and the seconds it took to make from loaded weights."""
    start, weights = time.perf_counter(), Weights(weights)
    experts = LocalExperts(checkpoint.config, weights, range(checkpoint.config.n_group), backend)
    decoder = Decoder(checkpoint.config, weights, experts, backend=backend)
    return decoder, time.perf_counter() - start


@torch.inference_mode()
def measure(decoder: Decoder, backend: Backend, token_ids: list[int], page_format: PageFormat) -> Times:
    """Run a prompt in chunks, then token by token behind it."""
    pages = list(range(-(-len(token_ids) // PAGE_SIZE)))
    cache = PageCache(decoder.config, len(pages), page_format, torch.float32, backend=backend)

    def run(start: int, stop: int) -> float:
        began = time.perf_counter()
        inputs = ForwardInputs.build([token_ids[start:stop]], [start], [pages])
        decoder.logits(decoder.forward(inputs, cache)[-1:])
        return time.perf_counter() - began

    length = len(token_ids) - NUM_STEPS
    prefill = sum(run(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK))
    return Times(prefill, statistics.median(run(at, at + 1) for at in range(length, len(token_ids))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checkpoint = Checkpoint.open(DEMO)
    weights = checkpoint.load(dtype=torch.float32)
    built = {backend: build(checkpoint, weights, backend) for backend in BACKENDS}
    print(f"made in {' and '.join(f'{seconds:.2f} s ({name})' for name, (_, seconds) in built.items())}")
    text = [token for document in lookup_documents() for token in document]
    print(f"{'pages':<6}{'prompt':>7}{'prefill, s':>20}{'ratio':>7}{'step, ms':>18}{'ratio':>7}")
    for page_format in ("full", "fp8"):
        for length in (64, 512, 4096):
            rounds = [
                [measure(built[name][0], name, text[: length + NUM_STEPS], page_format) for name in BACKENDS]
                for _ in range(options.rounds)
            ]
            plain, ours = (
                Times(min(times.prefill for times in column), min(times.step for times in column))
                for column in zip(*rounds, strict=True)
            )
            print(
                f"{page_format:<6}{length:>7}{plain.prefill:>11.3f}{ours.prefill:>9.3f}"
                f"{ours.prefill / plain.prefill:>7.2f}{1000 * plain.step:>10.2f}{1000 * ours.step:>8.2f}"
                f"{ours.step / plain.step:>7.2f}"
            )


if __name__ == "__main__":
    main()

"""One full-width decoder layer on a GPU, as captured CUDA graphs: which kernels it launches, what each costs.

    python -m benchmarks.layer                     decode and prefill, attention alone and with local experts
    python -m benchmarks.layer --batch 64 --context 4096

Weights are random, 671B shapes (tests/model/config_671b.json). A graph is replayed over the same inputs, so
what fits the cache stays there. `attention` is norm to residual.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts
from model.fused.layer import FusedLayer
from model.inputs import PAGE_SIZE, ForwardInputs, Segment
from model.layout import TensorSpec
from model.moe import Done
from model.pages import LayerPages, PageCache
from model.random_weights import random_weights
from model.rope import rope_angles, rope_frequencies

ROOT = Path(__file__).resolve().parent.parent
LAYER = 3  # the first with experts
REPLAYS = 20


@dataclass(frozen=True)
class Launches:
    """What one replay of a graph did: kernels in order with their microseconds, and all of it together."""

    case: str
    total_us: float
    kernels: list[tuple[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 32, 128], help="sequences that decode")
    parser.add_argument("--context", type=int, nargs="*", default=[4096, 32768], help="tokens of each")
    parser.add_argument("--prefill", type=int, nargs="*", default=[0, 16384], help="context before 4,096 new")
    parser.add_argument("--groups", type=int, default=1, help="expert groups held here, of 8")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    options = parser.parse_args()
    bench = LayerBench(options.groups)
    found = []
    for batch in options.batch:
        for context in options.context:
            found += bench.decode(batch, context)
    for before in options.prefill:
        found += bench.prefill(4096, before)
    if options.out:
        options.out.write_text(json.dumps([asdict(launches) for launches in found], indent=1))


class LayerBench:
    """A layer with random weights and room in pages."""

    def __init__(self, groups: int) -> None:
        facts = json.loads((ROOT / "tests/model/config_671b.json").read_text())
        facts.update(num_hidden_layers=LAYER + 1, num_nextn_predict_layers=0)
        self.config = config = ModelConfig.model_validate(facts)
        held = range(groups * config.group_size)

        def wanted(spec: TensorSpec) -> bool:
            return spec.layer == LAYER and (spec.expert < 0 or spec.expert in held)

        weights = random_weights(config, wanted, device="cuda")
        experts = FusedExperts(config, weights, range(groups), "triton", layers=[LAYER])
        self.layer = FusedLayer(config, weights, LAYER, experts, "sparse", "triton")
        self.frequencies = rope_frequencies(config).to("cuda")

    def decode(self, batch: int, context: int) -> list[Launches]:
        """One row of each sequence."""
        num_pages = -(-context // PAGE_SIZE)
        pages = self._pages(batch * num_pages)
        order = torch.randperm(batch * num_pages, device="cuda").view(batch, num_pages)
        positions = torch.full((batch,), context - 1, device="cuda")
        inputs = ForwardInputs(
            token_ids=positions,
            positions=positions,
            slots=order[:, -1] * PAGE_SIZE + (context - 1) % PAGE_SIZE,
            page_table=order,
            segments=tuple(Segment(row, row + 1, context) for row in range(batch)),
        )
        return self._both(f"decode batch {batch} context {context}", inputs, pages)

    def prefill(self, num_rows: int, before: int) -> list[Launches]:
        """A chunk of one prompt, after so much context."""
        length = before + num_rows
        num_pages = -(-length // PAGE_SIZE)
        pages = self._pages(num_pages)
        order = torch.randperm(num_pages, device="cuda")
        positions = torch.arange(before, length, device="cuda")
        inputs = ForwardInputs(
            token_ids=positions,
            positions=positions,
            slots=order[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
            page_table=order[None],
            segments=(Segment(0, num_rows, length),),
        )
        return self._both(f"prefill {num_rows} after {before}", inputs, pages)

    def _pages(self, num_pages: int) -> LayerPages:
        """Pages of one layer with something in them."""
        facts = self.config.model_copy(update={"num_hidden_layers": 1})
        cache = PageCache(facts, num_pages, "fp8", torch.bfloat16, backend="triton", device="cuda")
        pages = cache.layers[0]
        fill_pages(pages, self.config)
        return pages

    def _both(self, name: str, inputs: ForwardInputs, pages: LayerPages) -> list[Launches]:
        residual = torch.randn(inputs.num_rows, self.config.hidden_size, device="cuda").to(torch.bfloat16)
        update = Done(torch.randn_like(residual))
        angles = rope_angles(self.frequencies, inputs.positions)
        halves: dict[str, Callable[[], object]] = {
            "attention": lambda: self.layer.attend(update, residual, inputs, angles, pages, None),
            "with experts": lambda: self.layer.forward(update, residual, inputs, angles, pages, None),
        }
        found = [capture(f"{name}, {half}", run) for half, run in halves.items()]
        for launches in found:
            report(launches)
        return found


def fill_pages(pages: LayerPages, config: ModelConfig) -> None:
    """Random records that are numbers: bytes below those of NaN, scales of one."""
    for tensor in (pages.latents, pages.index_keys):
        tensor.random_(0, 0x70)
    latents = pages.latents
    scales = latents[..., config.kv_lora_rank : config.kv_lora_rank + 4 * (config.kv_lora_rank // 128)]
    one = torch.tensor([1 / 256], dtype=torch.float32, device=latents.device).view(torch.uint8)
    scales.copy_(one.repeat(scales.shape[-1] // 4).expand_as(scales))
    k_pe = torch.randn(*latents.shape[:2], config.qk_rope_head_dim, device=latents.device).to(torch.bfloat16)
    latents[..., -2 * config.qk_rope_head_dim :] = k_pe.view(torch.uint8)
    planes = pages.index_keys[:, -4 * PAGE_SIZE :]
    planes.copy_(one.repeat(PAGE_SIZE).expand_as(planes))


def capture(case: str, run: Callable[[], object]) -> Launches:
    """Capture `run` in a graph, replay it, and read the profiler."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        run()
    graph.replay()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(REPLAYS):
        graph.replay()
    stop.record()
    torch.cuda.synchronize()
    total = start.elapsed_time(stop) * 1000 / REPLAYS
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            graph.replay()
        torch.cuda.synchronize()
    return Launches(case, total, _a_replay(profile, 5))


def _a_replay(profile: torch.profiler.profile, replays: int) -> list[tuple[str, float]]:
    """The kernels of a replay in order, with the median of their times."""
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    count = len(events) // replays
    times: dict[int, list[float]] = defaultdict(list)
    for place, event in enumerate(events[: count * replays]):
        times[place % count].append(event.time_range.end - event.time_range.start)
    return [(events[place].name, sorted(times[place])[replays // 2]) for place in range(count)]


def report(launches: Launches) -> None:
    print(f"\n{launches.case}: {launches.total_us:.1f} us, {len(launches.kernels)} launches")
    for name, microseconds in launches.kernels:
        print(f"  {microseconds:8.1f}  {name[:90]}")


if __name__ == "__main__":
    main()

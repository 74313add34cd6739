"""One full-width layer on a GPU, as captured CUDA graphs: what it costs by batch and context, part by part.

    python -m benchmarks.layer [--out FOLDER]                         every point: table, JSON and PNG
    python -m benchmarks.layer --batch 64 --context 4096 --prefill --launches    kernels by name
    python -m benchmarks.layer --draw RESULT.json                     the picture of an earlier run

The attention half is measured from norm to norm, and by themselves what else a token meets: `experts` (gate,
shared expert, and the routed experts of a GPU that holds 8 of 256 and gets as many rows for each as it has
itself, as when 32 GPUs with the same batch share all experts evenly), `dense_ffn` and `head`. Weights are
random, of the shapes in model/deepseek_v32/config.json; pages lie in random order. A graph is replayed over
the same inputs, so what fits the cache (50 MB: the attention's weights do not) stays there.
"""

import argparse
import datetime
import functools
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from benchmarks.layer_report import BESIDE, Measured, Point, draw, from_json, launches, table, to_json
from cluster.demo import OFFICIAL_671B
from kernels.backend import Backend
from kernels.bf16_gemm import bf16_gemm
from kernels.dispatch_plan import dispatch_plan
from kernels.linear import linear_fp32
from kernels.quantize_rows import quantize_rows
from model.attention import AttentionMode
from model.checkpoint import Wanted, Weights
from model.config import ModelConfig
from model.fused.feed_forward import FusedExperts, FusedFeedForward, Quantized
from model.fused.layer import FusedLayer
from model.fused.operations import operations
from model.inputs import PAGE_SIZE, ForwardInputs, Segment
from model.moe import Done
from model.pages import LayerPages, PageCache, cache_bytes_per_token
from model.random_weights import random_weights
from model.rope import rope_angles, rope_frequencies

MODES: tuple[AttentionMode, ...] = ("sparse", "dense")
LAYER = 3  # the first with experts
SHARE = 8  # routed experts of a GPU where 32 share all of them
NEW_TOKENS = 4096  # of a prompt, in one chunk
_K = 1024
_PROFILED = 3  # replays under the profiler
_SPARE_BYTES = 30 << 30  # of the GPU's memory, for what a long prompt holds for a while
_SMALL_POOL = 4096  # pages, where only compiling is at stake
_WORKERS = 10  # that compile; each holds up to four gigabytes of the GPU


def main(arguments: Iterable[str] | None = None) -> None:
    options = _options(arguments)
    if options.draw:
        results, about = from_json(options.draw.read_text())
        draw(results, options.draw.with_suffix(".png"), f"{about['machine']}, {about['date']}")
        return
    begun = time.perf_counter()
    points = _points(options)
    compile_all(points)
    print(f"compiled after {time.perf_counter() - begun:.0f} s", flush=True)
    results = measure(points, options.groups)
    print(table(results))
    if options.launches:
        print(*map(launches, results), sep="\n")
    print(f"{time.perf_counter() - begun:.0f} s")
    if options.out:
        _save(options.out, results)


def _options(arguments: Iterable[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = functools.partial(parser.add_argument, type=int, nargs="*")
    sizes("--batch", default=[1, 16, 32, 64, 128], help="sequences that decode")
    sizes("--context", default=[4 * _K, 16 * _K, 32 * _K, 64 * _K, 128 * _K], help="tokens of each")
    sizes("--rows", default=[1, 2], help="of each: its last token, and drafts")
    sizes(
        "--prefill", default=[0, 4 * _K, 16 * _K, 64 * _K, 128 * _K], help="context before 4,096 new tokens"
    )
    parser.add_argument("--mode", nargs="*", default=MODES, choices=MODES)
    parser.add_argument("--groups", type=int, default=0, help="also with so many expert groups computed here")
    parser.add_argument("--launches", action="store_true", help="list every kernel by name")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    parser.add_argument("--draw", type=Path, metavar="RESULT", help="draw an earlier run's JSON and stop")
    return parser.parse_args(None if arguments is None else list(arguments))


def _points(options: argparse.Namespace) -> list[Point]:
    """In the order in which they are measured, what shares a profiler session together."""
    groups = [0, options.groups] if options.groups else [0]
    decode = [
        Point("decode", mode, batch, rows, context, held)
        for held, mode, rows, batch, context in itertools.product(
            groups, options.mode, options.rows, options.batch, options.context
        )
    ]
    prefill = [
        Point("prefill", mode, 1, NEW_TOKENS, before, held)
        for held, mode, before in itertools.product(groups, options.mode, options.prefill)
    ]
    sizes = {batch * rows for batch in options.batch for rows in options.rows}
    sizes |= {NEW_TOKENS} if options.prefill else set()
    beside = [Point(kind, "", size, 1, 0) for kind in BESIDE for size in sorted(sizes)]
    return [*decode, *prefill, *beside]


def measure(points: Sequence[Point], groups: int = 0) -> list[Measured]:
    """Every point that fits this GPU's memory, saying which do not."""
    per_page = PAGE_SIZE * cache_bytes_per_token(_one_layer(_official()), "fp8", torch.bfloat16)
    room = (torch.cuda.mem_get_info()[0] - _SPARE_BYTES) // per_page
    needed = [point.batch * -(-point.length // PAGE_SIZE) for point in points]
    bench = LayerBench(_official(), max(pages for pages in needed if pages <= room), groups)
    for point, pages in zip(points, needed, strict=True):
        if pages > room:
            print(f"skipped: {point} needs {pages * per_page / 2**30:.0f} GiB of pages")
    fitting = [point for point, pages in zip(points, needed, strict=True) if pages <= room]
    results: list[Measured] = []
    for together in _sessions(fitting):
        results += _measure_together(bench, together)
        torch.cuda.empty_cache()
    return results


def _sessions(points: Sequence[Point]) -> Iterator[list[Point]]:
    """What is captured and profiled together; a prompt's graph holds gigabytes, so that each goes alone."""
    for (kind, _, _), some in itertools.groupby(points, lambda point: (point.kind, point.mode, point.rows)):
        together = list(some)
        yield from [[point] for point in together] if kind == "prefill" else [together]


def compile_all(points: Sequence[Point]) -> None:
    """Run every point once in spawned processes, so that Triton's disk cache has its kernels."""
    # A dense prompt's kernels are the same at any length, and its tensors take tens of gigabytes.
    short = [
        point for point in points if (point.kind, point.mode) != ("prefill", "dense") or not point.context
    ]
    order = sorted(short, key=lambda point: point.kind != "prefill")  # the longest first
    workers = min(_WORKERS, len(order))
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for point, failure in zip(order, pool.map(_compile, order), strict=True):
            if failure:
                print(f"does not run: {point}: {failure}", flush=True)


def _compile(point: Point) -> str:
    try:
        with torch.inference_mode():
            _small_bench(point.groups).work(point)()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as error:  # it will show again where it is measured
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    return ""


@functools.cache
def _small_bench(groups: int) -> "LayerBench":
    """One a process."""
    return LayerBench(_official(), _SMALL_POOL, groups)


@functools.cache
def _official() -> ModelConfig:
    return ModelConfig.load(OFFICIAL_671B)


def _one_layer(config: ModelConfig) -> ModelConfig:
    return config.model_copy(update={"num_hidden_layers": 1, "num_nextn_predict_layers": 0})


class LayerBench:
    """A layer with random weights, what stands beside it, and pages that all points share.

    Where a point's sequences need more pages than there are, they share them.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        groups: int = 0,
        *,
        device: str = "cuda",
        backend: Backend = "triton",
    ) -> None:
        self._config, self._device, self._backend = config, device, backend
        one = {"n_routed_experts": SHARE, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 1}
        self._share = self._experts(config.model_copy(update=one), 1)
        behind = self._experts(config, groups) if groups else self._share
        ops, mlp = operations(backend, ()), f"model.layers.{LAYER}.mlp"
        weights = self._weights(lambda spec: spec.layer == LAYER and spec.expert < 0)
        self._layers = {
            mode: FusedLayer(config, Weights(weights), LAYER, behind, mode, backend) for mode in MODES
        }
        self._shared = FusedFeedForward(weights, f"{mlp}.shared_experts", backend, ops)
        self._gate = weights.take(f"{mlp}.gate.weight").to(torch.bfloat16)
        self._bias = weights.take(f"{mlp}.gate.e_score_correction_bias")
        weights = self._weights(lambda spec: spec.layer == 0 and spec.part == "dense_ffn")
        self._dense_ffn = FusedFeedForward(weights, "model.layers.0.mlp", backend, ops)
        self._frequencies = rope_frequencies(config).to(device)
        cache = PageCache(
            _one_layer(config), num_pages, "fp8", torch.bfloat16, backend=backend, device=device
        )
        self._pages = cache.layers[0]
        fill_pages(self._pages, config)

    @functools.cached_property
    def _head(self) -> torch.Tensor:
        """[vocab, D]: two gigabytes that few points need."""
        shape = self._config.vocab_size, self._config.hidden_size
        dtype = torch.bfloat16 if self._backend == "triton" else torch.float32
        return torch.empty(shape, dtype=dtype, device=self._device).normal_(0, shape[1] ** -0.5)

    def _weights(self, wanted: Wanted) -> Weights:
        return random_weights(self._config, wanted, device=self._device)

    def _experts(self, config: ModelConfig, groups: int) -> FusedExperts:
        held = range(groups * config.group_size)
        weights = self._weights(lambda spec: spec.layer == LAYER and spec.expert in held)
        return FusedExperts(config, weights, range(groups), self._backend, [LAYER])

    def work(self, point: Point) -> Callable[[], object]:
        """What is captured."""
        x = torch.randn(point.num_rows, self._config.hidden_size, device=self._device).to(torch.bfloat16)
        if point.kind == "head":
            head = self._head
            return lambda: linear_fp32(x, head, backend=self._backend)
        if point.kind == "dense_ffn":
            quantized = quantize_rows(x, backend=self._backend)
            return lambda: self._dense_ffn.forward(quantized)
        if point.kind == "experts":
            return self._experts_of(x)
        return self._attention(point, x)

    def _attention(self, point: Point, residual: torch.Tensor) -> Callable[[], object]:
        layer, update = (
            self._layers["dense" if point.mode == "dense" else "sparse"],
            Done(torch.randn_like(residual)),
        )
        inputs = self._inputs(point)
        angles = rope_angles(self._frequencies, inputs.positions)
        run = layer.forward if point.groups else layer.attend
        return lambda: run(update, residual, inputs, angles, self._pages, None)

    def _inputs(self, point: Point) -> ForwardInputs:
        """The last rows of every sequence, whose pages lie anywhere."""
        wide, length = -(-point.length // PAGE_SIZE), point.length
        num_pages = len(self._pages.latents)
        generator = torch.Generator(self._device).manual_seed(wide)
        order = torch.randperm(num_pages, generator=generator, device=self._device)
        order = order.repeat(-(-point.batch * wide // num_pages))[: point.batch * wide]
        table = order.view(point.batch, wide)
        ends = torch.arange(length - point.rows, length, device=self._device)
        slots = table[:, ends // PAGE_SIZE] * PAGE_SIZE + ends % PAGE_SIZE
        starts = range(0, point.num_rows, point.rows)
        return ForwardInputs(
            token_ids=ends.repeat(point.batch),
            positions=ends.repeat(point.batch),
            slots=slots.flatten(),
            page_table=table,
            segments=tuple(Segment(start, start + point.rows, length) for start in starts),
        )

    def _experts_of(self, x: torch.Tensor) -> Callable[[], object]:
        """Gate and shared expert of the own rows; for every expert here as many rows from everywhere."""
        config, own = self._config, quantize_rows(x, backend=self._backend)
        arrived: Quantized = quantize_rows(x.repeat(SHARE, 1), backend=self._backend)
        choice = (torch.arange(len(x) * SHARE, device=self._device, dtype=torch.int32) % SHARE).unsqueeze(1)
        plan = self._share.list_rows(choice, torch.ones_like(choice, dtype=torch.float32))

        def run() -> object:
            routed = dispatch_plan(
                bf16_gemm(x, self._gate, backend=self._backend),
                self._bias,
                num_groups=config.n_group,
                topk_group=config.topk_group,
                k=config.num_experts_per_tok,
                normalize=config.norm_topk_prob,
                scale=config.routed_scaling_factor,
                first_expert=0,
                num_experts=config.n_routed_experts,
                backend=self._backend,
            )
            return routed, self._shared.forward(own), self._share.forward(LAYER, arrived, plan, None)

        return run


def fill_pages(pages: LayerPages, config: ModelConfig) -> None:
    """Random records that are numbers: bytes below those of NaN, scales of 1 / 256."""
    small = torch.tensor([1 / 256], dtype=torch.float32, device=pages.latents.device).view(torch.uint8)
    rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
    for latents, keys in zip(pages.latents.split(1 << 14), pages.index_keys.split(1 << 14), strict=True):
        latents.random_(0, 0x70)
        scales = latents[..., rank : -2 * rope]
        scales.copy_(small.repeat(scales.shape[-1] // 4).expand_as(scales))
        k_pe = torch.randn(*latents.shape[:2], rope, device=latents.device).to(torch.bfloat16)
        latents[..., -2 * rope :] = k_pe.view(torch.uint8)
        keys.random_(0, 0x70)
        planes = keys[:, -4 * PAGE_SIZE :]
        planes.copy_(small.repeat(PAGE_SIZE).expand_as(planes))


def _measure_together(bench: LayerBench, points: Sequence[Point]) -> list[Measured]:
    works = [bench.work(point) for point in points]  # they hold what the graphs read
    graphs = [captured(work) for work in works]
    times = [_microseconds(graph) for graph in graphs]
    kernels = kernels_of(graphs)
    return [Measured(*each) for each in zip(points, times, kernels, strict=True)]


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of `run`, after two runs outside of it; what `run` reads must stay alive."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(), torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        run()
    return graph


def _microseconds(graph: torch.cuda.CUDAGraph) -> float:
    def replays(count: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(count):
            graph.replay()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop) * 1000 / count)

    once = max(replays(2), 1.0)
    return replays(max(3, min(30, int(30_000 / once))))


def kernels_of(graphs: Sequence[torch.cuda.CUDAGraph]) -> list[list[tuple[str, float]]]:
    """The kernels of a replay of each graph in order, with the median of their times.

    A spinning kernel stands before every replay, by which they are told apart.
    """
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for graph in graphs:
            for _ in range(_PROFILED):
                torch.cuda._sleep(1000)
                graph.replay()
        torch.cuda.synchronize()
    assert profiler.profiler
    events = sorted(
        (event.start_ns(), event.name(), event.duration_ns() / 1000)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == DeviceType.CUDA
    )
    replays: list[list[tuple[str, float]]] = []
    for _, name, microseconds in events:
        if "spin_kernel" in name:
            replays.append([])
        elif replays:
            replays[-1].append((name, microseconds))
    assert len(replays) == _PROFILED * len(graphs), f"{len(replays)} replays of {len(graphs)} graphs"
    return [_medians(list(some)) for some in zip(*[iter(replays)] * _PROFILED, strict=True)]


def _medians(replays: list[list[tuple[str, float]]]) -> list[tuple[str, float]]:
    return [
        (each[0][0], statistics.median(microseconds for _, microseconds in each))
        for each in zip(*replays, strict=True)
    ]


def _save(folder: Path, results: list[Measured]) -> None:
    machine, date = torch.cuda.get_device_name(), datetime.date.today().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"layer_{machine.split()[1].lower()}_{date}.json"
    path.write_text(to_json(results, {"machine": machine, "date": date, "torch": torch.__version__}))
    try:
        draw(results, path.with_suffix(".png"), f"{machine}, {date}")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; draw it elsewhere with --draw {path.name}")


if __name__ == "__main__":
    main()

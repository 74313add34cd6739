"""Timing of GPU calls, and compilation in parallel processes.

L2 is in one of two states before a timed call: *dirty*, after a 512 MB fill, whose lines are written back at
the call's expense; *clean*, after a read of another 512 MB on top, which is nearer to serving. Compare like
with like. All times are microseconds; `fn` is a closure without arguments.

    time_clean(fn), time_dirty(fn)     two CUDA events around one call; they hold about 3 us beside the kernel
    kernel_time(fn)                    profiler (CUPTI): end of the last kernel - start of the first
    kernel_times({name: (fn, clean)})  the same for many calls in one profiler session
    time_graph(fns)                    one CUDA graph of all fns, per fn
    event_floor()                      what an event pair around a one-element kernel reads
    compile_in_parallel(jobs)          every job in spawned processes, for Triton's disk cache
"""

import functools
import importlib
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

FLUSH_BYTES = 512 << 20
FILLER_US = 165.0
CYCLES_PER_US = 1980  # of an H100 at full clock; lower clocks only make the filler longer

Call = Callable[[], Any]


@functools.cache
def _buffers() -> tuple[torch.Tensor, torch.Tensor]:
    length = FLUSH_BYTES // 4
    written = torch.zeros(length, dtype=torch.int32, device="cuda")
    return written, torch.zeros(length, dtype=torch.float32, device="cuda")


def flush(clean: bool) -> None:
    """Evicts everything from L2; `clean` also replaces the dirty lines by clean ones."""
    written, read = _buffers()
    written.fill_(1)
    if clean:
        read.sum()


def _spin(us: float) -> None:
    torch.cuda._sleep(int(us * CYCLES_PER_US))


def _filler_us(fn: Call, slack: float = 2.0) -> float:
    """Warms up, and says for how long the GPU must be kept busy while the host issues one call."""
    for _ in range(2):
        fn()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    fn()
    host = (time.perf_counter() - begun) * 1e6
    torch.cuda.synchronize()
    return min(max(FILLER_US, slack * host + 50.0), 3000.0)


def _time_events(fn: Call, reps: int, clean: bool) -> list[float]:
    filler = _filler_us(fn)
    pairs = []
    for _ in range(reps):
        flush(clean)
        _spin(filler)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        fn()
        end.record()
        pairs.append((begin, end))
        if len(pairs) % 8 == 0:  # keeps the queue of launches short
            end.synchronize()
    torch.cuda.synchronize()
    return [1e3 * begin.elapsed_time(end) for begin, end in pairs]


def time_clean(fn: Call, reps: int = 20) -> float:
    return statistics.median(_time_events(fn, reps, clean=True))


def time_dirty(fn: Call, reps: int = 20) -> float:
    return statistics.median(_time_events(fn, reps, clean=False))


def times_clean(fn: Call, reps: int = 20) -> list[float]:
    """Every sample, sorted (for p10 where a kernel is power-limited)."""
    return sorted(_time_events(fn, reps, clean=True))


def time_graph(fns: Sequence[Call], reps: int = 20) -> float:
    """Captures the fns one after the other in one CUDA graph; median replay divided by their number.

    Give closures over rotating copies of the inputs (at least 4 x 50 MB in all), or everything comes from L2.
    The event pair's ~3 us are in the figure once per replay: use 10 or more fns.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for fn in fns:
                fn()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for fn in fns:
            kept.append(fn())  # results stay alive, so that no two calls share an output
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    samples = []
    for _ in range(reps):
        _spin(FILLER_US)
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * begin.elapsed_time(end) / len(fns))
    del kept
    return statistics.median(samples)


def event_floor(reps: int = 20) -> float:
    one = torch.zeros(1, device="cuda")
    return time_clean(lambda: one.add_(1), reps)


def kernel_times(calls: Mapping[str, tuple[Call, bool]], reps: int = 15) -> dict[str, float]:
    """Profile many calls in one session.

    Each timed call stands between two spin kernels, by which its own kernels are recognised.

    Args:
        calls: name to call and whether L2 is clean.

    Returns:
        name to median; NaN where the profiler saw no kernel.
    """
    fillers = {name: _filler_us(fn, slack=4.0) for name, (fn, _) in calls.items()}
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for name, (fn, clean) in calls.items():
            for _ in range(reps):
                flush(clean)
                _spin(fillers[name])
                fn()
                _spin(1)
            torch.cuda.synchronize()
    spans = sorted(
        (event.start_ns(), event.start_ns() + event.duration_ns(), event.name())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA
    )
    of_calls = _between_spins(spans)
    if len(of_calls) != reps * len(calls):
        raise RuntimeError(f"the profiler shows {len(of_calls)} calls instead of {reps * len(calls)}")
    return {
        name: statistics.median(of_calls[i * reps : (i + 1) * reps]) / 1e3 for i, name in enumerate(calls)
    }


def kernel_time(fn: Call, reps: int = 15, clean: bool = True) -> float:
    return kernel_times({"": (fn, clean)}, reps)[""]


def _between_spins(spans: Sequence[tuple[int, int, str]]) -> list[float]:
    """Start, end and name of device activity in order to how long what stands in each pair of spins took."""
    calls: list[list[tuple[int, int]]] = []
    inside = False
    for start, end, name in spans:
        if "spin_kernel" in name:
            inside = not inside
            if inside:
                calls.append([])
        elif inside:
            calls[-1].append((start, end))
    return [max(e for _, e in call) - min(s for s, _ in call) if call else math.nan for call in calls]


def _compile(module: str, function: str, args: Sequence[Any]) -> str | None:
    try:
        getattr(importlib.import_module(module), function)(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except BaseException as failure:  # a worker must answer whatever happened
        lines = traceback.format_exception_only(failure)
        return " ".join("".join(lines).split())[:300]
    return None


def compile_in_parallel(
    jobs: Sequence[tuple[str, str, Sequence[Any]]], workers: int | None = None, timeout_s: float = 300.0
) -> dict[int, str]:
    """Runs every `module.function(*args)` in spawned processes, so that Triton's disk cache has its kernels.

    The module is imported by name in the worker (sys.path is inherited), so a script calls this under
    `if __name__ == "__main__"`. Returns {index of job: error}, and prints each failure in one line.
    """
    begun = time.perf_counter()
    workers = workers or min(14, max(1, (os.cpu_count() or 2) - 2), max(1, len(jobs)))
    failures: dict[int, str] = {}
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(_compile, *job): i for i, job in enumerate(jobs)}
        for future in as_completed(futures, timeout=timeout_s):
            i = futures[future]
            error = f"worker died: {future.exception()!r}"[:300] if future.exception() else future.result()
            if error is not None:
                failures[i] = error
                print(
                    f"compile FAILED {jobs[i][0]}.{jobs[i][1]}{tuple(jobs[i][2])!r}: {error}"[:500],
                    flush=True,
                )
    print(
        f"compiled {len(jobs)} jobs in {time.perf_counter() - begun:.1f} s, {len(failures)} failed",
        flush=True,
    )
    return failures

"""Every kernel at the shapes of the model, beside the best public ones, on the GPU of this machine.

    python -m benchmarks.kernels [--only fp8_gemm] [--peers FOLDER] [--out FOLDER] [--quick]
    python -m benchmarks.kernels --draw RESULT.json       the picture of an earlier run; needs no GPU

Each result is compared with the reference on a slice before it is timed. Times are medians of single calls,
by the profiler and by events, with L2 full of clean and of dirty lines (`kernels_timing.py`); ceilings are
measured in the same run. A peer is DeepGEMM, FlashMLA or one of vLLM's operations, timed in the same process
where it can be imported (`--peers`: a folder with deep_gemm/, flash_mla/ and vllm_ops/*.so); otherwise its
recorded figure (`peers_h100.json`) stands in and is marked *.
"""

import argparse
import datetime
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks import (
    kernels_indexer,
    kernels_mla,
    kernels_products,
    kernels_routing,
    kernels_rows,
    kernels_small,
)
from benchmarks.kernels_inputs import Case, Made, Peers, load_peers
from benchmarks.kernels_report import (
    Ceilings,
    Result,
    Times,
    draw,
    from_json,
    load_recorded,
    recorded_times,
    summary,
    table,
    to_json,
)
from benchmarks.kernels_timing import event_floor, kernel_times, time_clean, time_dirty
from kernels.fp8_quant import FP8

_WORKERS = 14


def cases() -> list[Case]:
    families = (kernels_products, kernels_indexer, kernels_mla, kernels_rows, kernels_routing, kernels_small)
    return [case for family in families for case in family.cases()]


def chosen(only: str | None) -> list[Case]:
    """The cases whose kernel's name begins so, or whose name and shape hold the words."""
    wanted = (only or "").split()
    return [case for case in cases() if all(word in f"{case.kernel} {case.shape}" for word in wanted)]


def ceilings(reps: int) -> Ceilings:
    return Ceilings(_copied(reps), *_multiplied(reps), event_floor(reps))


def _copied(reps: int) -> float:
    source = torch.randint(256, (4 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / time_clean(lambda: target.copy_(source), reps) / 1e3


def _multiplied(reps: int) -> tuple[float, float]:
    """TFLOP/s of bf16, and of e4m3 with one scale a tensor."""
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    a8, b8, one = a.to(FP8), b.to(FP8).t(), torch.ones((), device="cuda")

    def fp8() -> torch.Tensor:
        return torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    bf16_us, fp8_us = time_clean(lambda: a @ b, reps), time_clean(fp8, reps)
    return 2 * 8192.0**3 / bf16_us / 1e6, 2 * 8192.0**3 / fp8_us / 1e6


def compile_case(kernel: str, shape: str, peers_folder: Path | None) -> tuple[str, str]:
    """In a process of its own: call ours and the peer's once, so that both have compiled what they need.

    Returns:
        What went wrong with ours and with the peer's; empty where nothing did.
    """
    peers = load_peers(peers_folder) if peers_folder else Peers()
    case = next(each for each in cases() if (each.kernel, each.shape) == (kernel, shape))
    try:
        made, of_peer = _make(case, peers)
    except Exception as error:
        return _words(error), ""
    results = _words_of(made.ours), _words_of(made.peer) if made.peer else of_peer
    del made
    torch.cuda.empty_cache()
    return results


def _make(case: Case, peers: Peers) -> tuple[Made, str]:
    """Without the peer where it cannot even be prepared; and then why."""
    try:
        return case.make(peers), ""
    except Exception as error:
        return case.make(Peers()), _words(error)


def _words_of(call: Callable[[], Any]) -> str:
    try:
        call()
        torch.cuda.synchronize()
    except Exception as error:
        return _words(error)
    return ""


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def compile_all(wanted: list[Case], peers_folder: Path | None) -> dict[tuple[str, str], tuple[str, str]]:
    """Name and shape to what went wrong; failures are tried again alone, for one breaks its whole process."""
    begun = time.perf_counter()
    outcome: dict[tuple[str, str], tuple[str, str]] = {}
    todo = [(case.kernel, case.shape) for case in wanted]
    for tasks_per_process in (None, 1):
        with ProcessPoolExecutor(
            min(_WORKERS, len(todo)),
            mp_context=multiprocessing.get_context("spawn"),
            max_tasks_per_child=tasks_per_process,
        ) as pool:
            futures = {key: pool.submit(compile_case, *key, peers_folder) for key in todo}
            for key, future in futures.items():
                try:
                    outcome[key] = future.result()
                except Exception as error:  # the process died
                    outcome[key] = _words(error), ""
        todo = [key for key in todo if any(outcome[key])]
        if not todo:
            break
    print(
        f"compiled {len(wanted)} cases in {time.perf_counter() - begun:.0f} s, {len(todo)} failed", flush=True
    )
    return outcome


def measure(
    case: Case, peers: Peers, failures: tuple[str, str], recorded: dict[str, Any], reps: int
) -> Result:
    """One case, checked and timed; what fails is said, not raised."""
    result = Result(
        case.kernel, case.shape, case.flop, case.num_bytes, case.precision, case.at_least, case.aim
    )
    known = recorded_times(recorded, *case.recorded) if case.recorded else None
    if known is not None and case.recorded is not None:
        result = replace(result, peer=known, peer_name=case.recorded[0], peer_is_recorded=True)
    if failures[0]:
        return replace(result, failure=failures[0])
    try:
        made, unprepared = _make(case, peers)
        error = made.check(made.ours())
        result = replace(result, error=error, tolerance=made.tolerance)
        calls = {"ours": made.ours}
        of_peer = failures[1] or unprepared
        notes = [f"the peer failed: {of_peer}"] if of_peer else []
        if made.peer is not None and not of_peer:
            calls["peer"] = made.peer
        if "peer" in calls and made.peer_checked:
            result = replace(result, peer_error=made.check(calls["peer"]()))
            if not result.peer_error <= made.tolerance:
                notes.append(f"the peer is off by {result.peer_error:.1e} and not timed")
                del calls["peer"]
        times = _times(calls, reps, notes)
    except Exception as error:
        return replace(result, failure=_words(error))
    result = replace(result, ours=times["ours"], notes=notes)
    if "peer" in times:
        name = case.recorded[0] if case.recorded else made.peer_name
        result = replace(result, peer=times["peer"], peer_name=name, peer_is_recorded=False)
    return result


def _times(calls: dict[str, Callable[[], Any]], reps: int, notes: list[str]) -> dict[str, Times]:
    states = (("clean", True), ("dirty", False))
    profiled: dict[str, float | None] = {}
    try:
        profiled = dict(
            kernel_times(
                {f"{who} {state}": (fn, clean) for who, fn in calls.items() for state, clean in states}, reps
            )
        )
    except RuntimeError as error:  # events are still good
        notes.append(_words(error))
    return {
        who: Times(
            profiled.get(f"{who} clean"),
            profiled.get(f"{who} dirty"),
            time_clean(fn, reps),
            time_dirty(fn, reps),
        )
        for who, fn in calls.items()
    }


def run(wanted: list[Case], peers_folder: Path | None, reps: int) -> tuple[list[Result], Ceilings]:
    """Every case; an interrupt ends it early with what there is."""
    failures = compile_all(wanted, peers_folder)
    peers = load_peers(peers_folder)
    for missing in peers.missing:
        print("no peer:", missing)
    measured = ceilings(reps)
    print(measured, flush=True)
    recorded = load_recorded()
    results: list[Result] = []
    begun = time.perf_counter()
    try:
        for case in wanted:
            results.append(measure(case, peers, failures[case.kernel, case.shape], recorded, reps))
            torch.cuda.empty_cache()
            print(f"{time.perf_counter() - begun:4.0f} s  {summary(results[-1])}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped after {len(results)} of {len(wanted)} cases")
    return results, measured


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", help="words that the kernel's name and shape must hold")
    parser.add_argument("--peers", type=Path, help="folder with the peers")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    parser.add_argument("--quick", action="store_true", help="5 repetitions in place of 20")
    parser.add_argument("--draw", type=Path, metavar="RESULT", help="draw an earlier run's JSON and stop")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.draw:
        results, _, about = from_json(options.draw.read_text())
        draw(results, options.draw.with_suffix(".png"), f"{about['machine']}, {about['date']}")
        return
    begun = time.perf_counter()
    results, measured = run(chosen(options.only), options.peers, 5 if options.quick else 20)
    print(table(results, measured))
    print(f"{time.perf_counter() - begun:.0f} s")
    if options.out:
        _save(options.out, results, measured)


def _save(folder: Path, results: list[Result], measured: Ceilings) -> None:
    about = {
        "machine": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kernels_{about['machine'].split()[1].lower()}_{about['date']}.json"
    path.write_text(to_json(results, measured, about))
    try:
        draw(results, path.with_suffix(".png"), f"{about['machine']}, {about['date']}")
    except ModuleNotFoundError as error:
        print(f"no picture: {error}; draw it elsewhere with --draw {path.name}")


if __name__ == "__main__":
    main()

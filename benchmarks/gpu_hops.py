"""What messages between two GPUs cost, by every carrier: hops of a decode step, pages, and the peer's end.

    python -m benchmarks.gpu_hops [--gpus 0 1] [--without chains|pages|failures ...]

A hop is one way. A chain is a decode step's 122 hops in a CUDA graph, alone and while products run on the
GPU of rank 0; their content is compared on every hop of an untimed run. Two processes with a GPU each, paired
over a connection as workers of a cluster are. Prints tables, writes JSON and a picture beside the other
results.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.gpu_chains import LOADS, TOKENS, chains
from benchmarks.gpu_failures import failures
from benchmarks.gpu_page_moves import page_moves
from benchmarks.gpu_pairs import Role, gpu_pair

RESULTS = Path(__file__).parent / "results"
PARTS = ("chains", "pages", "failures")


def measure(gpus: tuple[int, int], parts: Sequence[str]) -> dict[str, Any]:
    """What the asking end finds."""
    report: dict[str, Any] = {"date": date.today().isoformat()}
    if "failures" in parts:
        report["failures"] = failures(gpus)
    if "chains" in parts:
        report["chains"] = _ask(gpus, chains)
    if "pages" in parts:
        report["pages"] = _ask(gpus, page_moves)
    return report


def _ask(gpus: tuple[int, int], role: Role, *arguments: Any) -> Any:
    with gpu_pair(role, *arguments, gpus=gpus) as pair:
        found = pair.hear(0)
        theirs = pair.hear(1)
    for ours, other in zip(found, theirs, strict=True):
        ours["wrong_bytes"] += other["wrong_bytes"]
    return found


def tables(report: dict[str, Any]) -> str:
    lines = []
    if rows := report.get("chains"):
        lines += ["us of a hop (a step is 122); as 4 tensors, or laid out in one buffer", ""]
        lines += [f"{'':<18}" + "".join(f"{tokens:>8}" for tokens in TOKENS) + "  tokens; step of 64, ms"]
        for (kind, laid_out), group in _grouped(rows).items():
            name = f"{kind}{', laid out' if laid_out else ''}"
            hops = "".join(f"{row['hop_us']:>8.2f}" for row in group)
            step = next(row["step_ms"] for row in group if row["tokens"] == 64)
            lines += [f"{name:<18}{hops}  {step:.3f}"]
            for row in group:
                lines += [
                    f"    beside {load:<14} {found['hop_us']:>8.2f} us a hop; the products lose "
                    f"{found['load_slowed']:.0%} of their time{'' if found['outlived'] else ' (ENDED EARLY)'}"
                    for load, found in row["loaded"].items()
                ]
        lines += [f"wrong bytes: {sum(row['wrong_bytes'] for row in rows)}", ""]
    for row in report.get("pages", []):
        lines += [
            f"pages, {row['way']:<13} {row['size']:>7}, {row['order']:<10} {row['alone_us']:>8.0f} us alone, "
            f"posting included; {row['row_gb_s']:>6.1f} GB/s in a row; wrong bytes: {row['wrong_bytes']}"
        ]
    for name, found in report.get("failures", {}).items():
        lines += [f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items())]
    return "\n".join([*lines, *report.get("notes", [])])


def _grouped(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, bool], list[dict[str, Any]]]:
    groups: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["laid_out"]), []).append(row)
    return groups


def draw(report: dict[str, Any], path: Path) -> None:
    """Hops by size, hops beside products, pages."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    figure = Figure(figsize=(13, 4), layout="constrained")
    by_size, by_load, pages = figure.subplots(1, 3)
    for place, ((kind, laid_out), group) in enumerate(_grouped(report["chains"]).items()):
        name = f"{kind}{', laid out' if laid_out else ''}"
        by_size.plot([row["tokens"] for row in group], [row["hop_us"] for row in group], "o-", label=name)
        loaded = next(row["loaded"] for row in group if row["loaded"])
        times = [loaded[load]["hop_us"] for load in LOADS]
        bars = by_load.bar([i + place * 0.13 for i in range(len(times))], times, width=0.12, label=name)
        by_load.bar_label(bars, fmt="%.0f", fontsize=7)
    by_size.set(xlabel="tokens", ylabel="us a hop", title="122 hops in a CUDA graph", ylim=0)
    by_load.set_xticks([i + 0.3 for i in range(len(LOADS))], list(LOADS))
    by_load.set(title="64 tokens beside products", ylabel="us a hop", yscale="log")
    by_size.legend(fontsize=7)
    names = [f"{row['way']}, {row['size']}\n{row['order']}" for row in report["pages"]]
    bars = pages.barh(names, [row["row_gb_s"] for row in report["pages"]])
    pages.bar_label(bars, fmt="%.0f", fontsize=7)
    pages.set(title="pages, 16 pushes in a row", xlabel="GB/s")
    pages.tick_params(labelsize=7)
    pages.invert_yaxis()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, nargs=2, default=(0, 1))
    parser.add_argument("--without", choices=PARTS, nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    parts = [part for part in PARTS if part not in options.without]
    report = measure(tuple(options.gpus), parts)
    print(tables(report))
    options.out.mkdir(exist_ok=True)
    path = options.out / f"gpu_hops_{report['date']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    if "chains" in parts and "pages" in parts:
        draw(report, path.with_suffix(".png"))


if __name__ == "__main__":
    main()

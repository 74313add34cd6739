"""Dollars a million tokens against position, from measured times of a full-width layer.

    python -m benchmarks.cost_curve RESULT.json [--out FOLDER]    from a result of benchmarks.layer; no GPU
    python -m benchmarks.cost_curve [--out FOLDER]                measures the points it needs itself

In the figure, at 2 dollars a GPU-hour: 61 layers of attention as measured at that position, 58 times gate,
shared expert and the routed experts of one GPU's share (8 of 256, as many rows for each as the GPU has
itself: 32 GPUs alike, evenly loaded), 3 dense feed-forward parts, and in decode the head. A prefill token is
one of 4,096 in a chunk. A decode token is one of a batch whose sequences are all as long; how many such
sequences the pages of a GPU hold is said beside it: where these are fewer, the figure is what a token there
adds to a batch of others.
Not in the figure: communication (dispatch, combine, pages that move), gaps between the kernels of different
layers, sampling and scheduling, uneven experts, idle GPUs; nor drafts, which make decode cheaper.

Beside it stand the lines that DeepSeek published for its service on H800 (report of V3.2, figure 3): the
marginal cost of a token at a position in their cluster, everything included. Dense is V3.1-Terminus there,
and here the same model over all it sees.
"""

import argparse
import datetime
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

from benchmarks.layer_report import BESIDE, Measured, Point, from_json
from cluster.demo import OFFICIAL_671B
from model.config import ModelConfig

DOLLARS_AN_HOUR = 2.0
BATCH = 128
PAGE_BYTES = 50 << 30  # of a GPU's 80 GB, beside weights and workspace
_A_TOKEN = 48_856  # bytes in the pages of all layers
_K = 1024
_POSITIONS = (2 * _K, 4 * _K, 8 * _K, 16 * _K, 32 * _K, 64 * _K, 128 * _K)

Phase = Literal["prefill", "decode"]
Mode = Literal["sparse", "dense"]
Line = list[tuple[float, float]]
"""Positions, ascending, and dollars a million tokens there."""

PHASES: tuple[Phase, ...] = ("prefill", "decode")
MODES: tuple[Mode, ...] = ("sparse", "dense")
PUBLISHED: dict[tuple[Phase, Mode], Line] = {
    ("prefill", "sparse"): [(0, 0.0611), (6.59 * _K, 0.0999), (128 * _K, 0.1871)],
    ("prefill", "dense"): [(0, 0.0529), (128 * _K, 0.6658)],
    ("decode", "sparse"): [(0, 0.0952), (2.06 * _K, 0.1457), (101.6 * _K, 0.2274), (128 * _K, 0.2491)],
    ("decode", "dense"): [(0, 0.0705), (128 * _K, 2.1543)],
}


@dataclass(frozen=True)
class Costs:
    """Ours by phase and mode, decode in batches of `batch`."""

    lines: dict[tuple[Phase, Mode], Line]
    batch: int

    @classmethod
    def of(cls, results: Sequence[Measured], batch: int) -> "Costs":
        """From the layer's times.

        Raises:
            ValueError: points that it takes were not measured.
        """
        times = {each.point: each.microseconds for each in results}
        lines: dict[tuple[Phase, Mode], Line] = {}
        for phase in PHASES:
            for mode in MODES:
                line = [
                    (_position(point), _dollars(point, attention, times))
                    for point, attention in times.items()
                    if (point.kind, point.mode, point.groups) == (phase, mode, 0)
                    and (phase == "prefill" or (point.rows, point.batch) == (1, batch))
                ]
                if not line:
                    raise ValueError(
                        f"no {mode} {phase} was measured" + f" at batch {batch}" * (phase == "decode")
                    )
                lines[phase, mode] = sorted(line)
        return cls(lines, batch)

    def break_even(self, phase: Phase) -> float | None:
        """From which position on sparse attention is the cheaper one; None: everywhere, or nowhere."""
        return break_even(self.lines[phase, "sparse"], self.lines[phase, "dense"])


def _position(point: Point) -> float:
    return point.context + point.rows / 2 if point.kind == "prefill" else point.context


def _dollars(point: Point, attention: float, times: dict[Point, float]) -> float:
    """A million tokens, from the microseconds of one layer's attention over `point.num_rows` of them."""
    config, rows = ModelConfig.load(OFFICIAL_671B), point.num_rows
    try:
        experts, dense_ffn, head = (times[Point(kind, "", rows, 1, 0)] for kind in BESIDE)
    except KeyError as missing:
        raise ValueError(f"not measured: {missing.args[0]}") from None
    num_dense = config.first_k_dense_replace
    total = config.num_hidden_layers * attention + num_dense * dense_ffn
    total += (config.num_hidden_layers - num_dense) * experts
    total += head if point.kind == "decode" else 0.0  # of a prompt only the last row's logits are needed
    return total / rows * DOLLARS_AN_HOUR / 3600


def at(line: Line, position: float) -> float | None:
    """Interpolated; None outside of the line."""
    for (left, low), (right, high) in pairwise(line):
        if left <= position <= right:
            return low + (high - low) * (position - left) / (right - left)
    return None


def break_even(sparse: Line, dense: Line) -> float | None:
    """Where the first line falls below the second and stays there; None if it is below everywhere, or above
    at the end."""
    positions = sorted({position for line in (sparse, dense) for position, _ in line})
    gaps = [
        (position, one - other)
        for position in positions
        if (one := at(sparse, position)) is not None and (other := at(dense, position)) is not None
    ]
    above = [place for place, (_, gap) in enumerate(gaps) if gap > 0]
    if not above or above[-1] == len(gaps) - 1:
        return None
    (left, before), (right, after) = gaps[above[-1] : above[-1] + 2]
    return left + (right - left) * before / (before - after)


def table(costs: Costs) -> str:
    lines = [
        f"dollars a million tokens at {DOLLARS_AN_HOUR:g} $ a GPU-hour; decode in a batch of {costs.batch}",
        "phase     position    sparse     dense    published sparse, dense    sequences in 50 GiB of pages",
    ]
    for phase in PHASES:
        sparse, dense = (costs.lines[phase, mode] for mode in MODES)
        for position, dollars in sparse:
            others = [at(dense, position), *(at(PUBLISHED[phase, mode], position) for mode in MODES)]
            figures = "".join(f"{each:10.3f}" if each is not None else f"{'-':>10}" for each in others)
            fit = f"{PAGE_BYTES // (_A_TOKEN * int(position)):12}" if phase == "decode" else ""
            lines.append(f"{phase:8}{position / _K:9.1f}K{dollars:10.3f}{figures}{fit}")
    for phase in PHASES:
        theirs_at = break_even(PUBLISHED[phase, "sparse"], PUBLISHED[phase, "dense"])
        assert theirs_at is not None
        lines.append(f"break-even of {phase}: {_said(costs, phase)}; published {theirs_at / _K:.1f}K tokens")
    return "\n".join(lines)


def _said(costs: Costs, phase: Phase) -> str:
    found = costs.break_even(phase)
    if found is not None:
        return f"{found / _K:.1f}K tokens"
    sparse, dense = (costs.lines[phase, mode][-1][1] for mode in MODES)
    first = costs.lines[phase, "sparse"][0][0] / _K
    return (
        f"below {first:.1f}K tokens, the first that was measured"
        if sparse <= dense
        else "nowhere up to the last"
    )


def to_json(costs: Costs) -> str:
    def named(lines: dict[tuple[Phase, Mode], Line]) -> dict[str, Line]:
        return {f"{phase} {mode}": line for (phase, mode), line in lines.items()}

    facts = {
        "dollars_a_gpu_hour": DOLLARS_AN_HOUR,
        "batch": costs.batch,
        "dollars_a_million_tokens": named(costs.lines),
        "published": named(PUBLISHED),
        "break_even": {phase: costs.break_even(phase) for phase in PHASES},
        "published_break_even": {
            phase: break_even(PUBLISHED[phase, "sparse"], PUBLISHED[phase, "dense"]) for phase in PHASES
        },
    }
    return json.dumps(facts, indent=1) + "\n"


def draw(costs: Costs, path: Path, title: str) -> None:
    """Ours as lines with dots, the published ones thin."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, phase in zip(figure.subplots(1, 2), PHASES, strict=True):
        for mode, color in zip(MODES, ("#2a7f4f", "#d0863b"), strict=True):
            for lines, style, name in (
                (costs.lines, "o-", "ours"),
                (PUBLISHED, ":", "published, all included"),
            ):
                line = lines[phase, mode]
                positions, dollars = zip(*line, strict=True)
                axes.plot(
                    [each / _K for each in positions], dollars, style, color=color, label=f"{mode}, {name}"
                )
        axes.set_xlabel("position, K tokens")
        axes.set_ylabel("$ a million tokens")
        note = f", batch {costs.batch}" if phase == "decode" else ", chunks of 4,096"
        axes.set_title(f"{phase}{note}; break-even {_said(costs, phase)}", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=7)
    figure.suptitle(f"{title}: layers, experts and head as measured, no communication", fontsize=9)
    figure.savefig(path, dpi=150)


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("result", type=Path, nargs="?", help="JSON of benchmarks.layer")
    parser.add_argument("--batch", type=int, default=BATCH, help="sequences that decode together")
    parser.add_argument("--out", type=Path, help="folder for the JSON and the picture")
    options = parser.parse_args(None if arguments is None else list(arguments))
    if options.result:
        results, about = from_json(options.result.read_text())
    else:
        results, about = _measured(options.batch)
    costs = Costs.of(results, options.batch)
    print(table(costs))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"cost_curve_{about['machine'].split()[1].lower()}_{about['date']}"
        (options.out / f"{name}.json").write_text(to_json(costs))
        try:
            draw(costs, options.out / f"{name}.png", f"{about['machine']}, {about['date']}")
        except ModuleNotFoundError as error:
            print(f"no picture: {error}")


def _measured(batch: int) -> tuple[list[Measured], dict[str, str]]:
    import torch

    from benchmarks.layer import NEW_TOKENS, compile_all, measure

    points = [Point("decode", mode, batch, 1, context) for mode in MODES for context in _POSITIONS]
    points += [Point("prefill", mode, 1, NEW_TOKENS, before) for mode in MODES for before in (0, *_POSITIONS)]
    points += [Point(kind, "", size, 1, 0) for kind in BESIDE for size in (batch, NEW_TOKENS)]
    compile_all(points)
    return measure(points), {
        "machine": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()

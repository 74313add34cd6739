"""What `benchmarks/split.py` found, as table, JSON and picture, beside what was to be expected. Needs no GPU.

Expected is a pipeline of two GPUs: with m micro-batches a layer takes the longest of the attention's work,
the experts' work, and one micro-batch's way through both and both hops:

    max(attention, experts, (attention + experts) / m + round trip)

The parts are measured one by one. `attention` has gate and shared expert in it; the latter runs while rows
are away, so one micro-batch can take less than that. What sending, waiting and adding take of the attention's
own stream is in no part, so several can take more. Hidden is what the layer does not show of the round trips.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Of an H100, nominal or, where they differ much, as far as public kernels come.
_HBM = 3.0e6  # bytes a microsecond
_FP8 = 0.8e9  # FLOP a microsecond in products of many rows
_MLA = 0.4e9  # in sparse attention
_LINK = 0.36e6  # bytes a microsecond to another GPU
_HOP = 4.0  # microseconds of an empty message
_ATTENTION_BYTES = 187e6 + 44e6 + 3.7e6  # projections, shared expert, gate
_EXPERT_BYTES = 44.04e6
_ROW_FLOP = 88.1e6  # of one row in one expert


@dataclass(frozen=True)
class Case:
    """One layer of so many routed experts, and the sequences that decode, of both GPUs together."""

    experts: int
    context: int
    batch: int


@dataclass(frozen=True)
class Compared:
    """How far the outputs of some layers are from those of one process, relative to their size."""

    experts: int
    layers: int
    layout: str
    error: float

    def __str__(self) -> str:
        return f"{self.experts} experts, {self.layers} layers deep, {self.layout}: off by {self.error:.1e}"


@dataclass(frozen=True)
class Row:
    """One way to run a case.

    Attributes:
        layout: "colocated", or the split's carrier.
        us: of a layer, all micro-batches; None where it failed.
        attention_us, experts_us: all micro-batches by themselves; round_trip_us: of one of them, both hops.
    """

    case: Case
    layout: str
    micro_batches: int
    us: float | None
    attention_us: float | None = None
    experts_us: float | None = None
    round_trip_us: float | None = None
    failure: str = ""

    @property
    def free_hops_us(self) -> float | None:
        """What the split would take if hops took no time."""
        if self.attention_us is None or self.experts_us is None:
            return None
        through = (self.attention_us + self.experts_us) / self.micro_batches
        return max(self.attention_us, self.experts_us, through)

    @property
    def expected_us(self) -> float | None:
        """What the pipeline of the parts, measured one by one, takes."""
        if self.attention_us is None or self.experts_us is None or self.round_trip_us is None:
            return None
        through = (self.attention_us + self.experts_us) / self.micro_batches + self.round_trip_us
        return max(self.attention_us, self.experts_us, through)

    @property
    def hidden(self) -> float | None:
        """The share of the round trips' time that the layer does not show."""
        if self.us is None or self.free_hops_us is None or not self.round_trip_us:
            return None
        return 1 - (self.us - self.free_hops_us) / (self.round_trip_us * self.micro_batches)


def touched(experts: int, tokens: float, k: int = 8) -> float:
    """Experts that get a row of a gate that chooses evenly."""
    return experts * (1 - (1 - k / experts) ** tokens)


@dataclass(frozen=True)
class Roofline:
    """The least that the parts of a layer can take, in microseconds."""

    attention: float
    experts: float
    round_trip: float

    @classmethod
    def of(cls, case: Case, micro_batches: int, share: float = 1.0) -> "Roofline":
        """Of the split's two GPUs; with a share of the sequences and experts, of one that is colocated."""
        batch = case.batch * share
        keys = batch * min(case.context, 2048)
        reads = micro_batches * _ATTENTION_BYTES + batch * case.context * 132 + keys * 656
        attention = max(reads / _HBM, 278.5e3 * keys / _MLA)
        rows = case.batch / micro_batches
        weights = touched(case.experts, rows) * share * _EXPERT_BYTES
        products = rows * 8 * share * _ROW_FLOP
        experts = micro_batches * max(weights / _HBM, products / _FP8)
        hop = 2 * _HOP + rows * (7392 + 64 + 14336) / _LINK
        return cls(attention, experts, hop)


def least(row: Row) -> float:
    """The pipeline of the rooflines."""
    if row.layout == "colocated":
        parts = Roofline.of(row.case, row.micro_batches, 0.5)
        return parts.attention + parts.experts + parts.round_trip / row.micro_batches
    parts = Roofline.of(row.case, row.micro_batches)
    through = (parts.attention + parts.experts) / row.micro_batches + parts.round_trip
    return max(parts.attention, parts.experts, through)


def ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """A split's time by that of the best colocated one with as many sequences on both GPUs together."""
    return _ratio(row, row.case, rows)


def latency_ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """The same with as many sequences on each GPU that has attention: twice as many on both, colocated."""
    return _ratio(row, replace(row.case, batch=2 * row.case.batch), rows)


def _ratio(row: Row, case: Case, rows: Iterable[Row]) -> float | None:
    others = [each.us for each in rows if each.case == case and each.layout == "colocated" and each.us]
    return row.us / min(others) if others and row.us and row.layout != "colocated" else None


_COLUMNS = (
    "experts", "context", "batch", "layout", "m", "us", "/ colocated", "/ same each", "expected", "roofline",
    "attention", "experts us", "round trip", "hidden", "",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """One line a row, by case; times in microseconds a layer."""
    lines = [list(_COLUMNS)]
    for row in sorted(rows, key=lambda row: (-row.case.experts, row.case.context, row.case.batch)):
        lines.append(
            [
                str(row.case.experts),
                str(row.case.context),
                str(row.case.batch),
                row.layout,
                str(row.micro_batches),
                _number(row.us),
                _number(ratio(row, rows), 2),
                _number(latency_ratio(row, rows), 2),
                _number(row.expected_us),
                _number(least(row)),
                _number(row.attention_us),
                _number(row.experts_us),
                _number(row.round_trip_us),
                _number(row.hidden, 2),
                row.failure,
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def to_json(rows: Sequence[Row], compared: Sequence[Compared], about: Mapping[str, Any]) -> str:
    found = [
        asdict(row)
        | {
            "expected_us": row.expected_us,
            "roofline_us": least(row),
            "hidden": row.hidden,
            "ratio": ratio(row, rows),
            "latency_ratio": latency_ratio(row, rows),
        }
        for row in rows
    ]
    alike = [asdict(each) for each in compared]
    return json.dumps({**about, "compared": alike, "rows": found}, indent=1) + "\n"


def from_json(text: str) -> tuple[list[Row], list[Compared], dict[str, Any]]:
    """The reverse of `to_json`."""
    about = json.loads(text)
    compared = [Compared(**each) for each in about.pop("compared")]
    rows = []
    for found in about.pop("rows"):
        for derived in ("expected_us", "roofline_us", "hidden", "ratio", "latency_ratio"):
            del found[derived]
        rows.append(Row(**found | {"case": Case(**found["case"])}))
    return rows, compared, about


def draw(rows: Sequence[Row], path: Path, title: str) -> None:
    """For each number of experts and context a panel: microseconds a layer by batch, a line a layout."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    panels = sorted({(row.case.experts, row.case.context) for row in rows}, key=lambda p: (p[0], p[1]))
    layouts = sorted({row.layout for row in rows})
    figure = Figure(figsize=(5 * len(panels), 4.6), layout="constrained")
    for place, (experts, context) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), place)
        shown = [row for row in rows if (row.case.experts, row.case.context) == (experts, context) and row.us]
        for layout, m in sorted({(row.layout, row.micro_batches) for row in shown}):
            line = sorted(
                (row.case.batch, row.us) for row in shown if (row.layout, row.micro_batches) == (layout, m)
            )
            color, style = f"C{layouts.index(layout)}", ("-", "--", ":")[m - 1]
            axes.plot(*zip(*line, strict=True), style, color=color, marker=".", label=f"{layout}, m = {m}")
        axes.set_xscale("log", base=2)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{experts} experts, context {context}", fontsize=9)
        axes.set_xlabel("sequences on both GPUs", fontsize=8)
        axes.set_ylabel("us a layer", fontsize=8)
        axes.legend(fontsize=6)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)

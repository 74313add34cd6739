"""What a run of `benchmarks/kernels.py` found, as table, JSON and picture. Needs no GPU."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).parent / "peers_h100.json"


@dataclass(frozen=True)
class Times:
    """Microseconds of one call, as the profiler and as events have it, L2 full of clean or of dirty lines."""

    kernel_clean: float | None = None
    kernel_dirty: float | None = None
    events_clean: float | None = None
    events_dirty: float | None = None

    @property
    def best_known(self) -> float | None:
        """The figure nearest to serving that there is."""
        return next((value for value in self.values() if value is not None), None)

    def values(self) -> list[float | None]:
        return [getattr(self, each.name) for each in fields(self)]


@dataclass(frozen=True)
class Ceilings:
    """What this machine did in this run: GB/s copied (read and written counted), TFLOP/s at 8192^3."""

    copy: float
    bf16: float
    fp8: float
    event_floor: float = 0.0

    def microseconds(self, flop: float, num_bytes: float, precision: str) -> float:
        """The least a call could take."""
        return max(flop / (getattr(self, precision) * 1e6), num_bytes / (self.copy * 1e3))


@dataclass(frozen=True)
class Result:
    """One kernel at one shape.

    Attributes:
        error: against the reference on a slice; a result that is off by more than `tolerance` is no result.
        failure: why there is nothing, in the words of the exception.
        peer, peer_name: of this run, or else recorded.
        notes: what did not work on the way.
    """

    kernel: str
    shape: str
    flop: float
    num_bytes: float
    precision: str
    at_least: float | None
    aim: float | None
    ours: Times | None = None
    error: float | None = None
    tolerance: float = 0.0
    failure: str = ""
    peer: Times | None = None
    peer_name: str = ""
    peer_error: float | None = None
    peer_is_recorded: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.tolerance  # NaN is wrong

    @property
    def ratio(self) -> float | None:
        """The peer's time by ours, measured alike; more than 1 is faster than the peer."""
        if self.ours is None or self.peer is None or self.wrong:
            return None
        pairs = zip(self.peer.values(), self.ours.values(), strict=True)
        return next((theirs / ours for theirs, ours in pairs if theirs and ours), None)

    @property
    def verdict(self) -> str:
        if self.failure:
            return "FAILED"
        if self.wrong:
            return "WRONG"
        if self.ratio is None or self.at_least is None:
            return ""
        if self.aim is not None and self.ratio >= self.aim:
            return "aim"
        return "ok" if self.ratio >= self.at_least else "MISSED"


def recorded_times(recorded: Mapping[str, Any], name: str, shape: str) -> Times | None:
    """The figures of a peer at a shape, from `peers_h100.json`."""
    for figure in recorded["figures"]:
        if (figure["kernel"], figure["shape"]) == (name, shape):
            return Times(figure["kernel_clean_us"], figure["kernel_us"], None, figure["events_us"])
    return None


def load_recorded(path: Path = RECORDED) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


_COLUMNS = (
    "kernel", "shape", "us clean", "us dirty", "ev clean", "ev dirty", "TFLOP/s", "GB/s", "of ceiling",
    "error", "peer", "peer us", "ratio", "at least", "aim", "",
)  # fmt: skip


def table(results: Sequence[Result], ceilings: Ceilings) -> str:
    """One line a result; us are profiler times, ev those of events; a peer with * is the recorded one."""
    rows = [list(_COLUMNS), *(_row(result, ceilings) for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    left = {0, 1, 10, 15}
    lines = [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    notes = [f"{each.kernel}, {each.shape}: {note}" for each in results for note in _notes(each)]
    return "\n".join([*lines, *notes])


def summary(result: Result) -> str:
    """A line for whoever watches."""
    ours, ratio = result.ours.best_known if result.ours else None, result.ratio
    parts = [result.kernel, result.shape, _number(ours), "us, ratio", _number(ratio), result.verdict]
    return "; ".join([" ".join(parts).rstrip(), *_notes(result)])


def _notes(result: Result) -> list[str]:
    return [*([result.failure] if result.failure else []), *result.notes]


def _row(result: Result, ceilings: Ceilings) -> list[str]:
    ours = result.ours or Times()
    time = ours.best_known
    peer_time = result.peer.best_known if result.peer else None
    least = ceilings.microseconds(result.flop, result.num_bytes, result.precision)
    return [
        result.kernel,
        result.shape,
        *(_number(value) for value in ours.values()),
        _number(result.flop / time / 1e6 if time and result.flop else None),
        _number(result.num_bytes / time / 1e3 if time else None),
        _number(least / time if time else None),
        "" if result.error is None else f"{result.error:.1e}",
        result.peer_name + ("*" if result.peer_is_recorded else ""),
        _number(peer_time),
        _number(result.ratio),
        _number(result.at_least),
        _number(result.aim),
        result.verdict,
    ]


def _number(value: float | None) -> str:
    """Three digits, no exponent."""
    if value is None:
        return "-"
    for bound, digits in ((1, 3), (10, 2), (100, 1)):
        if abs(value) < bound:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def to_json(results: Sequence[Result], ceilings: Ceilings, about: Mapping[str, Any]) -> str:
    rows = [asdict(each) | {"ratio": each.ratio, "verdict": each.verdict} for each in results]
    return (
        json.dumps({**about, "ceilings": asdict(ceilings), "results": rows}, indent=1, allow_nan=True) + "\n"
    )


def from_json(text: str) -> tuple[list[Result], Ceilings, dict[str, Any]]:
    """The reverse of `to_json`."""
    about = json.loads(text)
    results = []
    for row in about.pop("results"):
        row = {key: value for key, value in row.items() if key not in ("ratio", "verdict")}
        row["ours"], row["peer"] = (Times(**row[key]) if row[key] else None for key in ("ours", "peer"))
        results.append(Result(**row))
    return results, Ceilings(**about.pop("ceilings")), about


def draw(results: Sequence[Result], path: Path, title: str) -> None:
    """One bar a result, grouped by kernel, with a mark for "at least" and one for the aim."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    shown = [each for each in results if each.ratio is not None or each.verdict in ("WRONG", "FAILED")]
    figure = Figure(figsize=(11, 1.2 + 0.19 * len(shown)), layout="constrained")
    axes = figure.subplots()
    colors = {"aim": "#2a7f4f", "ok": "#5b8fc7", "MISSED": "#d0863b", "": "#9a9a9a"}
    position, ticks, names = 0.0, [], []
    for i, each in enumerate(shown):
        if i and each.kernel != shown[i - 1].kernel:
            position += 0.7
        ratio = each.ratio or 0.0
        axes.barh(position, ratio, height=0.8, color=colors.get(each.verdict, "#c04040"))
        text = f"{ratio:.2f}" if each.ratio is not None else each.verdict
        axes.text(ratio + 0.01, position, text, va="center", fontsize=6)
        for mark, style in ((each.at_least, "-"), (each.aim, ":")):
            if mark is not None:
                axes.plot([mark, mark], [position - 0.45, position + 0.45], style, color="black", linewidth=1)
        ticks.append(position)
        names.append(f"{each.kernel}  {each.shape}{' *' if each.peer_is_recorded else ''}")
        position += 1
    axes.set_yticks(ticks, names, fontsize=6)
    axes.invert_yaxis()
    axes.margins(y=0.005)
    axes.axvline(1, color="grey", linewidth=0.5)
    axes.set_xlabel(
        "peer's time / ours; solid mark: at least, dotted: aim; * against the recorded figure", fontsize=8
    )
    axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=150)

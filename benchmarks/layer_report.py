"""What a run of `benchmarks/layer.py` found: parts, table, JSON and picture. Needs no GPU."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Kind = Literal["decode", "prefill", "experts", "dense_ffn", "head"]

BESIDE: tuple[Kind, ...] = ("experts", "dense_ffn", "head")  # what has no mode and no context
PARTS = ("norms", "projections", "index logits", "selection", "attention", "output", "feed-forward")

# Public figures of one attention layer on an H100, 128 heads, FP8 pages, one row a sequence: NVIDIA's
# AIConfigurator tables (`dsa_generation_module` of SGLang 0.5.14, `wideep_generation_mla`, and prefill).
PUBLIC_US: dict[tuple[str, str, int, int], float] = {
    ("decode", "sparse", 1, 2048): 158.0,
    ("decode", "sparse", 1, 32768): 174.0,
    ("decode", "sparse", 1, 131072): 222.0,
    ("decode", "sparse", 64, 4096): 261.0,
    ("decode", "sparse", 16, 16384): 212.0,
    ("decode", "dense", 64, 4096): 238.0,
    ("decode", "dense", 16, 16384): 239.0,
    ("prefill", "sparse", 1, 0): 6100.0,
    ("prefill", "sparse", 1, 16384): 7500.0,
    ("prefill", "sparse", 1, 131072): 15400.0,
    ("prefill", "dense", 1, 0): 2500.0,
}


@dataclass(frozen=True)
class Point:
    """One measurement of a full-width layer.

    Attributes:
        kind: attention in `decode` or `prefill`; `experts`, `dense_ffn` and `head` have no mode or context.
        mode: sparse or dense attention.
        batch: sequences; rows: of each, in prefill the new tokens.
        context: in decode what a sequence's last row sees, in prefill what lies before the new tokens.
        groups: expert groups computed behind the attention, 0 for none.
    """

    kind: Kind
    mode: Literal["sparse", "dense", ""]
    batch: int
    rows: int
    context: int
    groups: int = 0

    @property
    def num_rows(self) -> int:
        return self.batch * self.rows

    @property
    def length(self) -> int:
        """Tokens of a sequence when it is over."""
        return self.context + (self.rows if self.kind == "prefill" else 0)

    @property
    def public_us(self) -> float | None:
        """The public figure of the same."""
        if self.groups or (self.kind == "decode" and self.rows > 1):
            return None
        return PUBLIC_US.get((self.kind, self.mode, self.batch, self.context))

    def __str__(self) -> str:
        if self.kind in BESIDE:
            return f"{self.kind}, {self.num_rows} rows"
        behind = f", {self.groups} expert groups" if self.groups else ""
        return f"{self.kind} {self.mode}, {self.batch} x {self.rows} rows at {self.context}{behind}"


@dataclass(frozen=True)
class Measured:
    """Microseconds of one replay, and of each kernel of it in order as the profiler has them."""

    point: Point
    microseconds: float
    kernels: list[tuple[str, float]]

    @property
    def ratio(self) -> float | None:
        """The public figure's time by ours; more than 1 is faster than it."""
        public = self.point.public_us
        return public / self.microseconds if public else None


def parts(measured: Measured) -> dict[str, float]:
    """Microseconds by part, of kernels alone: in a graph one may begin before another has ended.

    Products have the same few names wherever they stand, so that the place decides: the attention half runs
    from norm to norm; projections end with `_query_inputs`; what follows the scores and their selection is
    attention; the output is the last product with what prepares its rows.
    """
    found = dict.fromkeys(PARTS, 0.0)
    for part, (_, microseconds) in zip(_places(measured), measured.kernels, strict=True):
        found[part] += microseconds
    return found


_BEFORE_LAST_PRODUCT = ("_latent_outputs", "_quantize_rows", "_gemm_kernel", "Memcpy")


def _places(measured: Measured) -> list[str]:
    names = [name for name, _ in measured.kernels]
    if measured.point.kind in BESIDE:
        return ["feed-forward"] * len(names)
    first, last = [place for place, name in enumerate(names) if "norm_quantize" in name][:2]
    queries = next(place for place, name in enumerate(names) if "_query_inputs" in name)
    output = last - 1
    while names[output - 1].startswith(_BEFORE_LAST_PRODUCT):
        output -= 1
    scored = max((place for place, name in enumerate(names) if "_score_" in name), default=queries)

    def part(place: int, name: str) -> str:
        if place in (first, last):
            return "norms"
        if place > last:
            return "feed-forward"
        if place <= queries:
            return "projections"
        if place >= output:
            return "output"
        if name.lstrip("_").startswith(("select", "mark_")):
            return "selection"  # of a long prompt in turns with the scores
        return "index logits" if place <= scored and name != "_gather" else "attention"

    return [part(place, name) for place, name in enumerate(names)]


_COLUMNS = ("what", "mode", "batch", "rows", "context", "us", "launches", *PARTS, "public", "ratio")


def table(results: Sequence[Measured]) -> str:
    """One line a result, microseconds; `public` is the public figure, `ratio` its time by ours."""
    lines = [list(_COLUMNS), *(_row(each) for each in results)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _row(measured: Measured) -> list[str]:
    point, by_part = measured.point, parts(measured)
    return [
        point.kind + (f" +{point.groups} groups" if point.groups else ""),
        point.mode,
        str(point.batch),
        str(point.rows),
        str(point.context),
        f"{measured.microseconds:.1f}",
        str(len(measured.kernels)),
        *(f"{by_part[part]:.1f}" if by_part[part] else "-" for part in PARTS),
        f"{point.public_us:.0f}" if point.public_us else "",
        f"{measured.ratio:.2f}" if measured.ratio else "",
    ]


def launches(measured: Measured) -> str:
    """Every kernel of a replay by name."""
    lines = [f"\n{measured.point}: {measured.microseconds:.1f} us, {len(measured.kernels)} launches"]
    places = zip(_places(measured), measured.kernels, strict=True)
    return "\n".join([*lines, *(f"  {us:8.1f}  {part:12}  {name[:90]}" for part, (name, us) in places)])


def to_json(results: Sequence[Measured], about: Mapping[str, Any]) -> str:
    rows = [asdict(each) | {"parts": parts(each)} for each in results]
    return json.dumps({**about, "results": rows}, indent=1) + "\n"


def from_json(text: str) -> tuple[list[Measured], dict[str, Any]]:
    """The reverse of `to_json`."""
    about = json.loads(text)
    results = [
        Measured(Point(**row["point"]), row["microseconds"], [(name, us) for name, us in row["kernels"]])
        for row in about.pop("results")
    ]
    return results, about


def draw(results: Sequence[Measured], path: Path, title: str) -> None:
    """Time against context, a colour a batch, dense dashed; crosses are the public figures."""
    from matplotlib.figure import Figure  # no dependency of the project: only this picture needs it

    figure = Figure(figsize=(11, 5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, 2), ("decode", "prefill"), strict=True):
        alike = [each for each in results if each.point.kind == kind and not each.point.groups]
        shown = [each for each in alike if kind == "prefill" or each.point.rows == 1]
        for number, batch in enumerate(sorted({each.point.batch for each in shown})):
            for mode, style in (("sparse", "-"), ("dense", "--")):
                line = [each for each in shown if (each.point.batch, each.point.mode) == (batch, mode)]
                line.sort(key=lambda each: each.point.context)
                positions = [each.point.context / 1024 for each in line]
                label = f"{mode}, batch {batch}" if kind == "decode" else mode
                axes.plot(
                    positions, [each.microseconds for each in line], style, marker=".", color=f"C{number}",
                    label=label,
                )  # fmt: skip
                known = [(at, each.point.public_us) for at, each in zip(positions, line, strict=True)]
                marker = "x" if mode == "sparse" else "+"
                axes.plot(
                    [at for at, us in known if us], [us for _, us in known if us], marker, color=f"C{number}",
                    markersize=9,
                )  # fmt: skip
        axes.set_yscale("log")
        axes.set_xlabel("K tokens of context" if kind == "decode" else "K tokens before 4,096 new ones")
        axes.set_ylabel("microseconds, norm to norm")
        axes.set_title(f"{kind}; x and + are the public figures", fontsize=9)
        axes.legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)

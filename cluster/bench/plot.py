"""Small line plots as SVG, drawn by hand: no script, no library, colours from the page's style."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT = 560, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 32
_TICKS = 5


@dataclass(frozen=True)
class Line:
    """One line of a plot; a value of None leaves a gap."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class _Frame:
    """Where numbers lie in the picture: x from `low_x` to `high_x`, y from 0 to `high_y`."""

    low_x: float
    high_x: float
    high_y: float

    def x(self, place: float) -> float:
        return _LEFT + (place - self.low_x) / (self.high_x - self.low_x) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - value / self.high_y * (_HEIGHT - _TOP - _BOTTOM)


def plot(title: str, x: Sequence[float], lines: Sequence[Line], x_unit: str, y_unit: str) -> str:
    """A figure of caption, legend and plot, whose y axis begins at 0; "" where there is nothing to draw.

    Args:
        title: of the figure.
        x: places, ascending; as many as each line has values.
        lines: what is drawn; at most five, for so many colours there are.
        x_unit, y_unit: what the numbers of the axes count.
    """
    drawn = [value for line in lines for value in line.values if value is not None]
    if not drawn:
        return ""
    low_x, top = min(x[0], 0.0), max(max(drawn), 1e-9)
    high_x = max(x[-1], low_x + 1e-9)
    x_step, y_step = _nice((high_x - low_x) / _TICKS), _nice(top / _TICKS)
    frame = _Frame(low_x, high_x, math.ceil(top / y_step - 1e-9) * y_step)
    parts = [*_y_axis(frame, y_step), *_x_axis(frame, x_step)]
    for index, line in enumerate(lines):
        parts += _draw(frame, index, line, x, f" {x_unit}", f" {y_unit}")
    keys = "".join(
        f'<span><i class="s{index}"></i>{html.escape(line.name)}</span>' for index, line in enumerate(lines)
    )
    return (
        f'<figure><figcaption><b>{html.escape(title)}</b> <span class="unit">{html.escape(y_unit)} over '
        f'{html.escape(x_unit)}</span><span class="legend">{keys}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg></figure>"
    )


def number(value: float) -> str:
    """As short as three digits allow."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _nice(step: float) -> float:
    """The least of 1, 2 and 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * (1 - 1e-9))


def _y_axis(frame: _Frame, step: float) -> list[str]:
    parts = []
    for index in range(round(frame.high_y / step) + 1):
        y = frame.y(index * step)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{number(index * step)}</text>')
    return parts


def _x_axis(frame: _Frame, step: float) -> list[str]:
    first = math.ceil(frame.low_x / step - 1e-9)
    places = [index * step for index in range(first, math.floor(frame.high_x / step + 1e-9) + 1)]
    return [
        f'<text x="{frame.x(place):.1f}" y="{_HEIGHT - 10}" text-anchor="middle">{number(place)}</text>'
        for place in places
    ]


def _draw(frame: _Frame, index: int, line: Line, x: Sequence[float], x_unit: str, y_unit: str) -> list[str]:
    """The line, broken where values are missing, and a point that says its number at each value."""
    path, points, is_down = [], [], False
    for place, value in zip(x, line.values, strict=True):
        if value is None:
            is_down = False
            continue
        at_x, at_y = frame.x(place), frame.y(value)
        path.append(f"{'L' if is_down else 'M'}{at_x:.1f} {at_y:.1f}")
        said = html.escape(f"{line.name}: {number(value)}{y_unit} at {number(place)}{x_unit}")
        points.append(f'<circle cx="{at_x:.1f}" cy="{at_y:.1f}" r="2"><title>{said}</title></circle>')
        is_down = True
    return [f'<g class="s{index}"><path d="{"".join(path)}"/>{"".join(points)}</g>']

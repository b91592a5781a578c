"""Line charts as SVG, without any script. Runs in: the driver and the command line."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["COLOURS", "Line", "line_chart", "ticks", "time_ticks"]

COLOURS = 8
"""The page's style has so many; lines beyond them begin anew."""

WIDTH, HEIGHT = 440, 190
LEFT, RIGHT, TOP, BOTTOM = 54, 10, 10, 24
LOG_RATIO = 1000.0
"""Numbers above 0 that differ by more are drawn on a logarithmic scale."""

_MINUTES = (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440)
_CLOCK_STEPS = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, *(60.0 * each for each in _MINUTES))

Format = Callable[[float], str]
Points = Sequence[tuple[float, float]]
Ticks = Callable[[float, float, int], list[float]]


@dataclass(frozen=True)
class Line:
    """One line, or a band between two, in one colour."""

    name: str
    points: Points
    colour: int = 0
    band: Sequence[tuple[float, ...]] = ()
    """(x, low, high)."""


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_text: Format,
    y_text: Format,
    y_from: float | None = None,
    y_to: float | None = None,
    x_ticks: Ticks | None = None,
) -> str:
    """Return a chart; what is not finite is a gap. "" if there is nothing to draw."""
    xs = [x for line in lines for x, y in line.points if math.isfinite(y)]
    ys = [y for line in lines for _, y in line.points if math.isfinite(y)]
    ys += [y for line in lines for row in line.band for y in row[1:] if math.isfinite(y)]
    if not xs:
        return ""
    low, high = min(ys), max(ys)
    is_log = y_from is None and low > 0 and high / low > LOG_RATIO
    low = low if y_from is None else min(low, y_from)
    high = high if y_to is None else max(high, y_to)
    if low == high:
        low, high = low - (abs(low) or 1) * 0.1, high + (abs(high) or 1) * 0.1
    scale = _Scale(min(xs), max(xs), low, high, is_log)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">',
        *_grid(scale, x_text, y_text, x_ticks or ticks),
    ]
    for line in lines:
        if area := scale.area(line.band):
            parts.append(f'<path class="band c{line.colour % COLOURS}" d="{area}"/>')
    for line in lines:
        name = html.escape(line.name)
        parts.append(
            f'<path class="line c{line.colour % COLOURS}" d="{scale.path(line.points)}">'
            f"<title>{name}</title></path>"
        )
        if len(line.points) == 1:
            x, y = scale.at(*line.points[0])
            parts.append(f'<circle class="dot c{line.colour % COLOURS}" cx="{x}" cy="{y}" r="3"/>')
    return "".join([*parts, "</svg>"])


class _Scale:
    def __init__(self, left: float, right: float, low: float, high: float, is_log: bool) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high
        self.is_log = is_log

    def at(self, x: float, y: float) -> tuple[float, float]:
        return round(self.x(x), 1), round(self.y(y), 1)

    def x(self, value: float) -> float:
        part = (value - self.left) / ((self.right - self.left) or 1)
        return LEFT + part * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return TOP + (high - value) / ((high - low) or 1) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        parts, pen, before = [], "M", -math.inf
        for x, y in points:
            if not math.isfinite(y):
                pen = "M"
                continue
            if x < before:  # a restart goes back to an earlier step
                pen = "M"
            before = x
            across, down = self.at(x, y)
            parts.append(f"{pen}{across},{down}")
            pen = "L"
        return "".join(parts)

    def area(self, rows: Sequence[tuple[float, ...]]) -> str:
        rows = [row for row in rows if all(map(math.isfinite, row))]
        rows = sorted(row for row in rows if self.left <= row[0] <= self.right)
        if len(rows) < 2:
            return ""
        there = [self.at(x, high) for x, _, high in rows]
        back = [self.at(x, low) for x, low, _ in reversed(rows)]
        return "M" + "L".join(f"{x},{y}" for x, y in [*there, *back]) + "Z"


def _grid(scale: _Scale, x_text: Format, y_text: Format, x_ticks: Ticks) -> list[str]:
    parts = []
    marks = _powers(scale.low, scale.high) if scale.is_log else ticks(scale.low, scale.high, 4)
    for value in marks:
        y = round(scale.y(value), 1)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">'
            f"{html.escape(y_text(value))}</text>"
        )
    for value in x_ticks(scale.left, scale.right, 4):
        x = round(scale.x(value), 1)
        anchor = "end" if x > WIDTH - RIGHT - 12 else "middle"
        parts.append(
            f'<text x="{x}" y="{HEIGHT - 7}" text-anchor="{anchor}">'
            f"{html.escape(x_text(value))}</text>"
        )
    return parts


def ticks(low: float, high: float, about: int) -> list[float]:
    """Return round numbers between two numbers.

    >>> ticks(0, 10, 4)
    [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    >>> ticks(3, 3, 4)
    [3.0]
    """
    if not low < high:
        return [float(low)]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 5, 10) if each * power >= rough * 0.75)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def time_ticks(low: float, high: float, about: int) -> list[float]:
    """Return times in seconds that one would read off a clock.

    >>> time_ticks(12, 3600, 4)
    [900.0, 1800.0, 2700.0, 3600.0]
    """
    rough = (high - low) / about
    step = next((each for each in _CLOCK_STEPS if each >= 0.75 * rough), 0.0)
    if not rough >= 1 or not step:
        return ticks(low, high, about)
    return [step * number for number in range(math.ceil(low / step), int(high // step) + 1)]


def _powers(low: float, high: float) -> list[float]:
    first, last = math.ceil(math.log10(low)), math.floor(math.log10(high))
    every = max(1, (last - first) // 4)
    return [10.0**power for power in range(first, last + 1, every)]

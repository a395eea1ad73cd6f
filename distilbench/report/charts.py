"""Charts as inline SVG: no script, no font and no picture from elsewhere. Every text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from distilbench.report.formats import html

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 12, 44
"""Pixels of a chart and of its margins, which hold the axes."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low .. high`` to pixels ``start .. end``, linear or logarithmic, with a format for its ticks."""

    low: float
    high: float
    start: float
    end: float
    shown: Callable[[float], str] = "{:g}".format
    whole: bool = False
    """Whether only whole numbers get a tick."""
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high = (math.log(self.low), math.log(self.high)) if self.is_log else (self.low, self.high)
        return self.start + ((math.log(value) if self.is_log else value) - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Four to nine round numbers within the axis; at most five on a logarithmic one."""
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for factors in ((1, 2, 5), (1, 3), (1,)):  # whose labels do not touch
                ticks = [m * 10.0**p for p in powers for m in factors if self.low <= m * 10.0**p <= self.high]
                if len(ticks) <= 5:
                    break
            return ticks
        step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 8)
        step = max(step, 1) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        return [round(step * i, 12) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def horizontal(values: Iterable[float], unit: str = "", whole: bool = False) -> Axis:
    """Return the axis below a chart, which holds all values with a margin; ``unit`` follows each tick."""
    return Axis(*_with_margin(values), LEFT, WIDTH - RIGHT, f"{{:g}}{unit}".format, whole)


def logarithmic(values: Iterable[float]) -> Axis:
    """Return the axis below a chart of counts that span powers of ten."""
    low, high = _with_margin([math.log(value) for value in values])
    return Axis(math.exp(low), math.exp(high), LEFT, WIDTH - RIGHT, "{:,.0f}".format, is_log=True)


def vertical(values: Iterable[float]) -> Axis:
    """Return the axis at the left of a chart."""
    return Axis(*_with_margin(values), HEIGHT - BOTTOM, TOP)


def _with_margin(values: Iterable[float]) -> tuple[float, float]:
    """Return the range of values and some room; one value gets room on either side."""
    values = list(values)
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def frame(x: Axis, y: Axis, x_title: str, y_title: str, marks: str, title: str) -> str:
    """Return a whole chart: grid, ticks, titles, and ``marks`` (SVG) on top; ``title`` is what a screen reader says."""
    across = "".join(
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}" text-anchor="end">{html(y.shown(t))}</text>'
        for t in y.ticks
    )
    along = "".join(
        f'<text x="{x(t):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{html(x.shown(t))}</text>'
        for t in x.ticks
    )
    middle = (LEFT + WIDTH - RIGHT) / 2
    titles = (
        f'<text class="axis" x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{html(x_title)}</text>'
        f'<text class="axis" x="13" y="{HEIGHT / 2 - 20}" text-anchor="middle" '
        f'transform="rotate(-90 13 {HEIGHT / 2 - 20})">{html(y_title)}</text>'
    )
    return bare(f"{across}{along}{titles}{marks}", title)


def bare(marks: str, title: str, height: int = HEIGHT) -> str:
    """Return a chart without axes of its own."""
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{html(title)}">{marks}</svg>'


def dot(x: float, y: float, tip: str, kind: str = "", radius: float = 4.5, attributes: str = "") -> str:
    """Return a point with a tooltip."""
    place = f'cx="{x:.1f}" cy="{y:.1f}" r="{radius}"'
    return f'<circle class="{kind}" {place}{attributes}><title>{html(tip)}</title></circle>'


def cross(x: float, y: float, tip: str) -> str:
    """Mark where a trial was stopped, with a tooltip."""
    return f'<path class="stopped" d="M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8"><title>{html(tip)}</title></path>'


def line(points: Sequence[tuple[float, float]], kind: str, tip: str = "", attributes: str = "") -> str:
    """Return a polyline with a tooltip."""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="{kind}" points="{path}"{attributes}><title>{html(tip)}</title></polyline>'


def whisker(x: float, low: float, high: float, kind: str = "") -> str:
    """Draw an upright interval."""
    return f'<line class="whisker {kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    """Return a short text beside a mark."""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html(text)}</text>'


def bars(shares: Mapping[str, float], title: str) -> str:
    """Horizontal bars with their names above them, for shares in [0, 1]."""
    height, gap = 12, 36
    marks = "".join(
        f"{label(0, i * gap + 14, name)}{label(WIDTH, i * gap + 14, f'{100 * share:.0f} %', anchor='end')}"
        f'<rect class="bar" x="0" y="{i * gap + 20}" width="{max(share * WIDTH, 1):.1f}" height="{height}" rx="2"/>'
        for i, (name, share) in enumerate(shares.items())
    )
    return bare(marks, title, max(len(shares) * gap, 1))


FOREST_WIDTH, FOREST_HEIGHT = 100, 22


def forest_axis(limits: Iterable[tuple[float, float]]) -> Axis:
    """One axis for the intervals of all rows, zero included; a few very wide ones run out of it rather than rule it."""
    reach = sorted(max(abs(low), abs(high)) for low, high in limits) or [1.0]
    most = max(1.15 * reach[min(len(reach) - 1, int(0.9 * len(reach)))], 0.1)
    return Axis(-most, most, 4, FOREST_WIDTH - 4)


def forest(scale: Axis, low: float, middle: float, high: float, kind: str, tip: str) -> str:
    """Return a row's interval around zero, the line of no difference."""
    zero, y = scale(0), FOREST_HEIGHT / 2
    ends = [min(max(scale(v), 0.0), FOREST_WIDTH) for v in (low, high)]
    at = min(max(scale(middle), 3.0), FOREST_WIDTH - 3)
    return (
        f'<svg class="forest {kind}" viewBox="0 0 {FOREST_WIDTH} {FOREST_HEIGHT}" role="img" '
        f'aria-label="{html(tip)}">'
        f'<line class="zero" x1="{zero}" x2="{zero}" y1="0" y2="{FOREST_HEIGHT}"/>'
        f'<line class="reach" x1="{ends[0]:.1f}" x2="{ends[1]:.1f}" y1="{y}" y2="{y}"/>'
        f'<rect class="middle" x="{at - 4:.1f}" y="{y - 4}" width="8" height="8"/></svg>'
    )

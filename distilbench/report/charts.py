"""Charts as data: marks in data units, and axes that contain them all; ``charts.html`` draws them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 12, 44
"""Size of a chart and of its margins, which hold the axes, in pixels."""

FOREST_WIDTH = 100
"""Width of the interval in a row of the table, in pixels."""


@dataclass(frozen=True)
class Axis:
    """A scale from ``low .. high`` to pixels ``start .. end``, linear or logarithmic, with a format for its ticks."""

    low: float
    high: float
    start: float
    end: float
    text: Callable[[float], str] = "{:g}".format
    is_integer: bool = False
    """Whether only whole numbers get a tick."""
    is_log: bool = False
    max_ticks: int = 9
    """Maximum number of ticks, so that their labels don't overlap; at most five on a logarithmic axis."""

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = map(math.log, (self.low, self.high, value)) if self.is_log else (self.low, self.high, value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers within the axis."""
        from matplotlib.ticker import LogLocator, MaxNLocator  # after the configuration has been checked

        decades = math.log10(self.high / self.low) if self.is_log else 0.0
        factors = (1, 2, 5) if decades < 1.5 else (1, 3) if decades < 2.5 else (1,)
        linear = MaxNLocator(self.max_ticks - 1, steps=[1, 2, 5, 10], integer=self.is_integer, min_n_ticks=1)
        locator = LogLocator(subs=factors, numticks=99) if decades > 0.7 else linear  # the former needs powers of ten
        found = (round(float(tick), 12) for tick in locator.tick_values(self.low, self.high))
        return [tick for tick in found if self.low <= tick <= self.high]


@dataclass(frozen=True)
class Mark:
    """Points drawn as one shape, coloured by ``kind``, with tooltip ``tip``; a dot is large, a point is small.

    ``row`` is the rank of the row that it represents, for the page's filter and details; ``label`` is drawn next to it.
    """

    shape: Literal["line", "dot", "point", "cross", "whisker"]
    points: Sequence[tuple[float, float]]
    kind: str = ""
    tip: str = ""
    row: int | None = None
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """Marks on two titled axes, or on parallel axes: ``parallel_axes`` has each one's name and labels of 0 and 1."""

    title: str
    marks: Sequence[Mark]
    x_title: str = ""
    y_title: str = "accuracy, %"
    x_text: Callable[[float], str] = "{:g}".format
    y_text: Callable[[float], str] = "{:g}".format
    is_integer: bool = False
    is_log: bool = False
    """Of the x axis, like ``is_integer``."""
    parallel_axes: Sequence[tuple[str, str, str]] = ()

    @cached_property
    def x(self) -> Axis:
        """The x axis, which contains all marks with a margin."""
        if self.parallel_axes:
            return Axis(0, len(self.parallel_axes) - 1, LEFT, WIDTH - LEFT)
        values = [x for mark in self.marks for x, _ in mark.points]
        if self.is_log:
            low, high = map(math.exp, _with_margin([math.log(value) for value in values]))
        else:
            low, high = _with_margin(values)
        return Axis(
            low, high, LEFT, WIDTH - RIGHT, self.x_text, self.is_integer, self.is_log, 9 if self.is_integer else 6
        )

    @cached_property
    def y(self) -> Axis:
        """The y axis, likewise."""
        if self.parallel_axes:
            return Axis(0, 1, HEIGHT - 20, TOP + 20)
        return Axis(
            *_with_margin([y for mark in self.marks for _, y in mark.points]), HEIGHT - BOTTOM, TOP, self.y_text
        )


def _with_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of values with a margin, also for a single value."""
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or max(abs(high) * 0.05, 1e-6)
    return low - margin, high + margin


def forest_axis(limits: Iterable[tuple[float, float]]) -> Axis:
    """Return a common axis for the intervals of all rows, including zero; the widest tenth may exceed it."""
    reach = sorted(max(abs(low), abs(high)) for low, high in limits) or [1.0]
    most = max(1.15 * reach[min(len(reach) - 1, int(0.9 * len(reach)))], 0.1)
    return Axis(-most, most, 4, FOREST_WIDTH - 4)

"""The charts of a report's page: what each draws, and the words below it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from distilbench.cli import counted
from distilbench.identity import value_of
from distilbench.report import charts
from distilbench.report.findings import (
    CostOf,
    Report,
    by_depth,
    comparable_in_time,
    data_curve,
    half_of_text,
    history,
    importance,
    pareto_front,
)
from distilbench.report.formats import flops, one_line, percent
from distilbench.report.names import varying_keys
from distilbench.report.rows import Row
from distilbench.report.words import said

log = logging.getLogger(__name__)

MOST_POINTS = 1000
"""Points in a chart: a browser slows down beyond some thousands."""
_LONGEST_NAME = 9
_MOST_AXES = 4
"""Settings that lines are drawn across, the most telling ones: more would not be told apart on a phone."""


class Figure(NamedTuple):
    """One way to draw a figure, of which a reader chooses by its name where there are several."""

    choice: str
    svg: str
    caption: str


def figures_of(report: Report) -> dict[str, list[Figure]]:
    """Return the figures that these trials have something to show in, by title; one that fails costs a line."""
    figures = {}
    for title, draw in _FIGURES.items():
        try:
            figures[title] = draw(report)
        except Exception as error:  # a figure's boundary: the report goes on without it
            log.warning("no figure of %r: %s", title, error)
    return {title: drawn for title, drawn in figures.items() if drawn}


def kind_of(row: Row) -> str:
    """Return the class that colours a row: base, a verdict's, ended or untested."""
    if row.is_baseline:
        return "base"
    return row.claim.name.lower() if row.claim else "untested" if row.trials else "ended"


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that get a point: beyond a few hundred best, evenly spaced ones, which hide no shape."""
    rest = rows[MOST_POINTS // 2 :]
    step = max(1, -(-len(rest) // (MOST_POINTS // 2)))
    return [row for i, row in enumerate(rows) if i < MOST_POINTS // 2 or i % step == 0 or row.is_baseline]


def _tip(row: Row) -> str:
    return one_line(f"{row.label}: {percent(row.accuracy)}, {said(row)}")


def _dot(row: Row, x: float, y: float) -> str:
    """Return a row's point, which the filter hides and whose card shows on hover, touch and focus."""
    linked = f' data-row="{row.rank}" tabindex="-1"'
    return charts.dot(x, y, _tip(row), kind_of(row), 6 if row.is_baseline else 4.5, linked)


def _trade_off(report: Report) -> list[Figure]:
    """Draw accuracy against cost, for each way to count it that two settings or more have."""
    timed = comparable_in_time(report)
    estimated = " (estimates where trials shared the device)" if any(row.cost.is_estimate for row in timed) else ""
    ways: tuple[tuple[str, str, Sequence[Row], CostOf], ...] = (
        ("FLOPs", "", report.rows, lambda row: row.cost.flops),
        ("training time", estimated, timed, lambda row: row.cost.seconds),
    )
    known = [(name, note, [row for row in rows if row.trials and cost(row) > 0], cost)
             for name, note, rows, cost in ways]  # fmt: skip
    return [_against_cost(report, name, note, rows, cost) for name, note, rows, cost in known if len(rows) > 1]


def _against_cost(report: Report, choice: str, note: str, rows: Sequence[Row], cost: CostOf) -> Figure:
    """``rows`` are those that have this cost, by which others are stopped too."""
    name = choice + note
    front = pareto_front(rows, cost)
    stopped = [row for row in report.rows if row.stopped and cost(row) > 0]
    unit, unit_name = _unit(name, max(cost(row) for row in (*rows, *stopped)))
    x = charts.horizontal([cost(row) / unit for row in (*rows, *stopped)], f" {unit_name}")
    y = charts.vertical([100 * row.accuracy_so_far for row in (*rows, *stopped)])
    marks = charts.line([(x(cost(row) / unit), y(100 * row.accuracy)) for row in front], "front", "Pareto front")
    for row in stopped:
        marks += charts.cross(x(cost(row) / unit), y(100 * row.accuracy_so_far), f"{row.label}: {row.status}")
    for row in sorted(_thinned(rows), key=lambda row: row.is_baseline):
        marks += _dot(row, x(cost(row) / unit), y(100 * row.accuracy))
    left = sum(bool(row.trials) for row in report.rows) - len(rows)
    caption = f"Each point is a setting; the dotted line joins those that no other beats in both ({len(front)}). "
    caption += "The open circle is the baseline. " if report.baseline and report.baseline.trials else ""
    caption += "Crosses are where trials were stopped. " if stopped else ""
    caption += f"{counted(left, 'setting')} left out, whose {name} can't be compared." if left > 0 else ""
    return Figure(choice, charts.frame(x, y, name, "accuracy, %", marks, f"Accuracy against {name}"), caption)


def _unit(kind: str, most: float) -> tuple[float, str]:
    """Return the unit that tells costs apart best: hours, minutes or seconds; powers of a thousand FLOPs."""
    if kind == "FLOPs":
        power = flops(most).partition(" ")[2]
        return 1000.0 ** " kMGTPE".index(power or " "), power
    return next((unit, name) for unit, name in ((3600, "h"), (60, "min"), (1, "s")) if most >= 2 * unit or unit == 1)


def _depths(report: Report) -> list[Figure]:
    depths = by_depth(report.rows)
    if len(depths) < 2:
        return []
    accuracies = {depth: [100 * row.accuracy for row in rows] for depth, rows in depths.items()}
    x = charts.horizontal(depths, whole=True)
    y = charts.vertical([accuracy for found in accuracies.values() for accuracy in found])
    means = [(x(depth), y(sum(found) / len(found))) for depth, found in accuracies.items()]
    marks = charts.line(means, "", "mean of the settings of a depth") + "".join(
        _dot(row, x(depth), y(100 * row.accuracy)) for depth, rows in depths.items() for row in _thinned(rows)
    )
    caption = "Each point is a setting, the line their mean: settings of a depth differ in what else was varied."
    chart = charts.frame(x, y, "frozen encoder layers", "accuracy, %", marks, "Accuracy by freeze depth")
    return [Figure("", chart, caption)]


def _data_curve(report: Report) -> list[Figure]:
    """Draw accuracy, and FLOPs, against the number of training examples: a line a depth."""
    curves = data_curve(report)
    if not curves:
        return []
    halves = {depth: half_of_text(rows) for depth, rows in curves.items()}
    costs = [f"{cost:.2f} points at depth {depth}" for depth, cost in halves.items() if cost is not None]
    half = f"Half of the text costs about {', '.join(costs)}. " if costs else ""
    caption = "The best setting of each amount, a line a depth, with 95 % intervals. " + half
    figures = [Figure("accuracy", _along_text(curves, lambda row: 100 * row.accuracy, "accuracy, %", True), caption)]
    if all(row.cost.flops > 0 for rows in curves.values() for row in rows):
        unit, name = _unit("FLOPs", max(row.cost.flops for rows in curves.values() for row in rows))
        chart = _along_text(curves, lambda row: row.cost.flops / unit, f"FLOPs, {name}", False)
        figures.append(Figure("FLOPs", chart, ""))
    return figures


def _along_text(curves: Mapping[int, Sequence[Row]], value: CostOf, title: str, has_whiskers: bool) -> str:
    rows = [row for curve in curves.values() for row in curve]
    halves = {id(row): 100 * row.accuracy_half_width if has_whiskers else 0.0 for row in rows}
    x = charts.logarithmic([row.first.train_examples for row in rows])
    y = charts.vertical([value(row) + sign * halves[id(row)] for row in rows for sign in (-1, 1)])
    marks = ""
    for i, (depth, curve) in enumerate(curves.items()):
        kind = f"hue{i % 4}"
        marks += charts.line(
            [(x(row.first.train_examples), y(value(row))) for row in curve], kind, f"{depth} layers frozen"
        )
        for row in curve:
            at, half = x(row.first.train_examples), halves[id(row)]
            marks += charts.whisker(at, y(value(row) - half), y(value(row) + half), kind) + _dot(row, at, y(value(row)))
        below = 20 if i % 2 else -10  # two lines end close to each other
        marks += charts.label(x(curve[0].first.train_examples) + 8, y(value(curve[0])) + below, f"depth {depth}")
    return charts.frame(x, y, "training examples", title, marks, f"{title} against training examples")


def _curves(report: Report) -> list[Figure]:
    drawn = [curve for curve in report.curves if len(curve.points) > 1]
    if not drawn:
        return []
    x = charts.horizontal([step for curve in drawn for step, _ in curve.points], whole=True)
    y = charts.vertical([100 * value for curve in drawn for _, value in curve.points])
    marks = ""
    for i, curve in reversed(list(enumerate(drawn))):
        kind = "base" if curve.is_baseline else "" if i == 0 else "faint"
        points = [(x(step), y(100 * value)) for step, value in curve.points]
        marks += charts.line(points, kind, one_line(curve.label))
        marks += "".join(charts.dot(*point, one_line(curve.label), kind, 3) for point in points)
    best = next((curve.label for curve in drawn if not curve.is_baseline), "")
    caption = f"Accuracy on the split {report.sample.selection_split} at each evaluation, first seed of the best. "
    caption += f"Solid: {best}. " if best else ""
    caption += "Dashed: the baseline." if any(curve.is_baseline for curve in drawn) else ""
    return [Figure("", charts.frame(x, y, "step", "accuracy, %", marks, "Learning curves"), caption)]


def _history(report: Report) -> list[Figure]:
    """Draw what each further trial brought: each setting's accuracy in the order of their start, the best so far."""
    told = history(report)
    if len(told) < 3:
        return []
    x = charts.horizontal(range(1, len(told) + 1), whole=True)
    y = charts.vertical([100 * row.accuracy_so_far for row, _ in told])
    steps = [(x(i), y(100 * best)) for i, (_, best) in enumerate(told, start=1) if not math.isnan(best)]
    marks = charts.line(steps, "", "best so far")
    for i, (row, _) in list(enumerate(told, start=1))[:: -(-len(told) // MOST_POINTS)]:
        place = x(i), y(100 * row.accuracy_so_far)
        marks += _dot(row, *place) if row.trials else charts.cross(*place, f"{row.label}: {row.status}")
    caption = "Settings in the order in which they were tried; the line is the best so far, an optimistic figure."
    return [Figure("", charts.frame(x, y, "settings tried", "accuracy, %", marks, "The sweep as it went"), caption)]


def _parallel(report: Report) -> list[Figure]:
    """Draw every finished setting as a line across what varied, and its accuracy."""
    rows = [row for row in _thinned(report.rows) if row.trials]
    keys = varying_keys([row.treatment for row in rows])[:_MOST_AXES]
    if len(rows) < 5 or len(keys) < 2:
        return []
    scales = [_scale([value_of(row.treatment, key) for row in rows]) for key in keys]
    scales.append(_scale([100 * row.accuracy for row in rows]))
    across = charts.Axis(0, len(keys), charts.LEFT, charts.WIDTH - charts.LEFT)
    marks = ""
    for row in reversed(rows):
        values = [*(value_of(row.treatment, key) for key in keys), 100 * row.accuracy]
        points = [(across(i), at(value)) for i, ((at, *_), value) in enumerate(zip(scales, values, strict=True))]
        kind = f"setting {kind_of(row)}"
        marks += charts.line(points, kind, _tip(row), f' data-row="{row.rank}"')
    names = [*(key.removesuffix(".name").rpartition(".")[2] for key in keys), "accuracy"]
    for i, (name, (_, low, high)) in enumerate(zip(names, scales, strict=True)):
        marks += charts.whisker(across(i), charts.TOP + 18, charts.HEIGHT - 18)
        ends = ((charts.HEIGHT - 4, low), (charts.TOP + 13, high))
        marks += "".join(charts.label(across(i), y, text, anchor="middle") for y, text in ends)
        shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}\N{HORIZONTAL ELLIPSIS}"
        marks += charts.label(across(i), charts.TOP, shown, "axis", "middle")
    caption = "A line a setting, coloured by its verdict, from what varied to accuracy."
    return [Figure("", charts.bare(marks, "Every setting"), caption)]


def _scale(values: Sequence[object]) -> tuple[Callable[[object], float], str, str]:
    """Return an upright axis of values of any kind, with the words at its two ends.

    Numbers by size, logarithmic where they span a factor of ten; anything else in the order of its words.
    """
    bottom, top = charts.HEIGHT - 20.0, charts.TOP + 20.0
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) < len(values):
        words = sorted({str(value) for value in values})
        step = (top - bottom) / max(len(words) - 1, 1)
        return lambda value: bottom + step * words.index(str(value)), one_line(words[0]), one_line(words[-1])
    low, high = min(numbers), max(numbers)
    high = high if high > low else low + 1
    axis = charts.Axis(low, high, bottom, top, is_log=low > 0 and high >= 10 * low)
    return lambda value: axis(float(str(value))), f"{low:.3g}", f"{high:.3g}"


def _importance(report: Report) -> list[Figure]:
    shares = importance(report.rows)
    shown = {one_line(name): share for name, share in list(shares.items())[:7]}
    caption = (
        "Share of the variance of accuracy that each varied setting explains (fANOVA, by Optuna): a hint from "
        f"{counted(sum(bool(row.trials) for row in report.rows), 'setting')}, not a test; a sampler that looks at "
        "results tries some values more often."
    )
    return [Figure("", charts.bars(shown, "What mattered"), caption)] if shares else []


_FIGURES: dict[str, Callable[[Report], list[Figure]]] = {
    "Accuracy against cost": _trade_off,
    "How much text": _data_curve,
    "Accuracy by freeze depth": _depths,
    "Learning curves": _curves,
    "The sweep as it went": _history,
    "Every setting": _parallel,
    "What mattered": _importance,
}

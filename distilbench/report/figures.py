"""The charts of a report's page, with their captions."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from distilbench.cli import pluralize
from distilbench.identity import value_of
from distilbench.report.charts import Axis, Chart, Mark
from distilbench.report.findings import CostOf, Report, by_score, pareto_front
from distilbench.report.formats import flops, one_line, percent
from distilbench.report.names import varying_keys
from distilbench.report.rows import Row
from distilbench.report.words import describe_verdict

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

log = logging.getLogger(__name__)

MOST_POINTS = 1000
"""Maximum number of points per chart: browsers slow down beyond some thousands."""
FEWEST_FOR_IMPORTANCE, MOST_FOR_IMPORTANCE = 20, 200
"""Settings below which a parameter's importance is meaningless, and above which a sample is used (500 took 10 s)."""
TREES = 32
"""Trees in fANOVA's forest; Optuna's default of 64 takes twice as long."""
_LONGEST_NAME = 9
_MOST_AXES = 4
"""Maximum number of settings in the parallel-coordinate chart, most informative first: a phone has room for no more."""


class Figure(NamedTuple):
    """One variant of a figure: a chart, or shares for a bar chart; readers pick among several by ``variant``."""

    variant: str
    chart: Chart | Mapping[str, float]
    caption: str


def figures_of(report: Report) -> dict[str, list[Figure]]:
    """Return the non-empty figures of a report, by title; a failure to draw one is logged."""
    figures = {}
    for title, draw in _FIGURES.items():
        try:
            figures[title] = list(draw(report))
        except Exception as error:  # broad on purpose: the report continues without this figure
            log.warning("no figure of %r: %s", title, error)
    return {title: drawn for title, drawn in figures.items() if drawn}


def kind_of(row: Row) -> str:
    """Return the CSS class for a row's colour: base, ended, untested, or its verdict."""
    if row.is_baseline:
        return "base"
    return row.final_verdict.name.lower() if row.final_verdict else "untested" if row.trials else "ended"


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """Return the rows to draw: the best few hundred, and evenly spaced ones of the rest, to keep the shape."""
    rest = rows[MOST_POINTS // 2 :]
    step = max(1, -(-len(rest) // (MOST_POINTS // 2)))
    return [row for i, row in enumerate(rows) if i < MOST_POINTS // 2 or i % step == 0 or row.is_baseline]


def _mark_of(row: Row, *points: tuple[float, float]) -> Mark:
    """Return the mark for a row: a dot, a line through several points, or a cross if no trial finished."""
    if not row.trials:
        return Mark("cross", points, tip=f"{row.name}: {row.status}")
    tip = f"{row.name}: {percent(row.accuracy)}, {describe_verdict(row)}"
    if len(points) > 1:
        return Mark("line", points, f"setting {kind_of(row)}", tip, row.rank)
    return Mark("dot", points, kind_of(row), tip, row.rank)


def comparable_in_time(report: Report) -> list[Row]:
    """Return the rows whose training times are comparable: the baseline's, and those measured like it."""
    if report.baseline is None or not report.baseline.trials:
        alike = len({trial.measured_on for row in report.candidates for trial in row.trials}) == 1
        return report.candidates if alike else []
    return [row for row in report.rows if row.is_baseline or not math.isnan(row.saving("seconds"))]


def _trade_off(report: Report) -> Iterator[Figure]:
    """Draw accuracy against FLOPs and against time, if two settings or more have them."""
    rows = [row for row in report.rows if row.cost.flops > 0]
    yield from _against_cost(report, rows, "FLOPs", lambda row: row.cost.flops, flops)
    timed = [row for row in comparable_in_time(report) if row.cost.seconds > 0]
    longest = max((row.cost.seconds for row in timed), default=0.0)
    unit, name = (3600, "h") if longest >= 7200 else (60, "min") if longest >= 120 else (1, "s")
    title = "training time"
    title += " (estimates where trials shared the device)" if any(row.cost.is_estimate for row in timed) else ""
    yield from _against_cost(report, timed, title, lambda row: row.cost.seconds / unit, f"{{:g}} {name}".format)


def _against_cost(
    report: Report, rows: Sequence[Row], name: str, cost: CostOf, text: Callable[[float], str]
) -> Iterator[Figure]:
    """Draw accuracy against a cost, which all ``rows`` have."""
    finished = [row for row in rows if row.trials]
    if len(finished) < 2:
        return
    stopped = [row for row in report.rows if not row.trials and row.accuracy_so_far >= 0 and cost(row) > 0]
    front = pareto_front(finished, cost)
    marks = [Mark("line", [(cost(row), 100 * row.accuracy) for row in front], "front", "Pareto front")]
    drawn = [*stopped, *sorted(_thinned(finished), key=lambda row: row.is_baseline)]
    marks += [_mark_of(row, (cost(row), 100 * row.accuracy_so_far)) for row in drawn]
    left = sum(bool(row.trials) for row in report.rows) - len(finished)
    caption = f"Each point is a setting; the dotted line joins those that no other beats in both ({len(front)}). "
    caption += "The open circle is the baseline. " if report.baseline and report.baseline.trials else ""
    caption += "Crosses are where trials were stopped. " if stopped else ""
    caption += f"{pluralize(left, 'setting')} left out, whose {name} can't be compared." if left > 0 else ""
    yield Figure(name.partition(" (")[0], Chart(f"Accuracy against {name}", marks, name, x_text=text), caption)


def by_depth(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Return the rows with a result by number of frozen layers, fewest first; not other policies, nor adapters."""
    depths: dict[int, list[Row]] = {}
    for row in rows:
        layers = row.treatment.get("freeze.layers")
        if row.trials and isinstance(layers, int) and not {"freeze.policy", "adapter.name"} & row.treatment.keys():
            depths.setdefault(layers, []).append(row)
    return dict(sorted(depths.items()))


def _depths(report: Report) -> Iterator[Figure]:
    depths = by_depth(report.rows)
    if len(depths) < 2:
        return
    means = [(depth, 100 * sum(row.accuracy for row in rows) / len(rows)) for depth, rows in depths.items()]
    marks = [Mark("line", means, tip="mean of the settings of a depth")]
    marks += [_mark_of(row, (depth, 100 * row.accuracy)) for depth, rows in depths.items() for row in _thinned(rows)]
    caption = "Each point is a setting, the line their mean: settings of a depth differ in what else was varied."
    yield Figure("", Chart("Accuracy by freeze depth", marks, "frozen encoder layers", is_integer=True), caption)


def data_curve(report: Report) -> dict[int, list[Row]]:
    """Return the best row of each amount of training text, smallest first, by frozen layers; two amounts or more."""
    curves = {}
    for depth, rows in by_depth(report.rows).items():
        best = {
            row.first_trial.train_examples: row for row in reversed(by_score(rows)) if row.first_trial.train_examples
        }
        if len(best) > 1:
            curves[depth] = [best[amount] for amount in sorted(best)]
    return curves


def cost_of_halving_text(curve: Sequence[Row]) -> float | None:
    """Return the points of accuracy that halving the text costs, interpolated on a log axis; None if out of range."""
    amounts = [row.first_trial.train_examples for row in curve]
    if amounts[-1] / 2 < amounts[0]:
        return None
    at_half = np.interp(math.log(amounts[-1] / 2), np.log(amounts), [row.accuracy for row in curve])
    return 100 * (curve[-1].accuracy - float(at_half))


def _data_curve(report: Report) -> Iterator[Figure]:
    """Draw accuracy and FLOPs against the number of training examples, with one line per depth."""
    curves = data_curve(report)
    if not curves:
        return
    halves = {depth: cost_of_halving_text(rows) for depth, rows in curves.items()}
    costs = [f"{cost:.2f} points at depth {depth}" for depth, cost in halves.items() if cost is not None]
    half = f"Half of the text costs about {', '.join(costs)}. " if costs else ""
    caption = "The best setting of each amount, a line a depth, with 95 % intervals. " + half
    yield Figure("accuracy", _against_examples(curves, lambda row: 100 * row.accuracy, "accuracy, %"), caption)
    if all(row.cost.flops > 0 for rows in curves.values() for row in rows):
        yield Figure("FLOPs", _against_examples(curves, lambda row: row.cost.flops, "FLOPs", flops), "")


def _against_examples(
    curves: Mapping[int, Sequence[Row]], value: CostOf, title: str, text: Callable[[float], str] = "{:g}".format
) -> Chart:
    """Draw values against the number of examples, with intervals except for FLOPs, which are exact."""
    marks = []
    for i, (depth, curve) in enumerate(curves.items()):
        kind, points = f"hue{i % 4}", [(row.first_trial.train_examples, value(row)) for row in curve]
        marks.append(Mark("line", points, kind, f"{depth} layers frozen", label=f"depth {depth}"))
        for row, (examples, height) in zip(curve, points, strict=True):
            half = 0 if title == "FLOPs" else 100 * row.accuracy_half_width
            marks.append(Mark("whisker", [(examples, height - half), (examples, height + half)], kind))
            marks.append(_mark_of(row, (examples, height)))
    name = f"{title} against training examples"
    return Chart(name, marks, "training examples", title, "{:,.0f}".format, text, is_log=True)


def _curves(report: Report) -> Iterator[Figure]:
    drawn = [(row, points) for row, points in report.curves if len(points) > 1]
    if not drawn:
        return
    marks = []
    for i, (row, points) in reversed(list(enumerate(drawn))):
        kind = "base" if row.is_baseline else "" if i == 0 else "faint"
        shown = [(step, 100 * value) for step, value in points]
        marks.append(Mark("line", shown, kind, row.name))
        marks += [Mark("point", [point], kind, row.name) for point in shown]
    best = next((row.name for row, _ in drawn if not row.is_baseline), "")
    caption = f"Accuracy on the split {report.sample.selection_split} at each evaluation, first seed of the best. "
    caption += f"Solid: {best}. " if best else ""
    caption += "Dashed: the baseline." if any(row.is_baseline for row, _ in drawn) else ""
    yield Figure("", Chart("Learning curves", marks, "step", is_integer=True), caption)


def history(report: Report) -> list[tuple[Row, float]]:
    """Return the rows with an accuracy in the order of their start, each with the best accuracy so far."""
    rows = sorted(report.rows, key=lambda row: row.started_ms)
    best = np.fmax.accumulate([row.accuracy for row in rows])  # NaN until the first result
    return [
        (row, float(so_far))
        for row, so_far in zip(rows, best, strict=True)
        if row.accuracy_so_far == row.accuracy_so_far
    ]


def _history(report: Report) -> Iterator[Figure]:
    """Draw the optimisation history: each setting's accuracy in the order of their start, and the best so far."""
    numbered = list(enumerate(history(report), start=1))
    if len(numbered) < 3:
        return
    best = [(place, 100 * accuracy) for place, (_, accuracy) in numbered if not math.isnan(accuracy)]
    marks = [Mark("line", best, tip="best so far")] if best else []
    shown = numbered[:: -(-len(numbered) // MOST_POINTS)]
    marks += [_mark_of(row, (place, 100 * row.accuracy_so_far)) for place, (row, _) in shown]
    caption = "Settings in the order in which they were tried; the line is the best so far, an optimistic figure."
    yield Figure("", Chart("The sweep as it went", marks, "settings tried", is_integer=True), caption)


def _parallel(report: Report) -> Iterator[Figure]:
    """Draw parallel coordinates: every finished setting as a line through its values and its accuracy."""
    rows = [row for row in _thinned(report.rows) if row.trials]
    keys = varying_keys([row.treatment for row in rows])[:_MOST_AXES]
    if len(rows) < 5 or len(keys) < 2:
        return
    columns = {
        key.removesuffix(".name").rpartition(".")[2]: [value_of(row.treatment, key) for row in rows] for key in keys
    }
    columns["accuracy"] = [100 * row.accuracy for row in rows]
    scaled = {name: _scale(values) for name, values in columns.items()}
    lines = zip(*(heights for heights, _, _ in scaled.values()), strict=True)
    marks = [_mark_of(row, *enumerate(line)) for row, line in zip(rows, lines, strict=True)]
    parallel_axes = [
        (name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}\N{HORIZONTAL ELLIPSIS}", low, high)
        for name, (_, low, high) in scaled.items()
    ]
    caption = "A line a setting, coloured by its verdict, from what varied to accuracy."
    yield Figure("", Chart("Every setting", marks[::-1], parallel_axes=parallel_axes), caption)


def _scale(values: Sequence[object]) -> tuple[list[float], str, str]:
    """Return values of any type as heights in [0, 1], and the labels of both ends.

    Numbers are scaled by size, logarithmically if they span a factor of ten; other values are sorted as strings.
    """
    numbers, words = _numbers(values), sorted({*map(str, values)})
    low, high = (min(numbers), max(numbers)) if numbers else (0, len(words) - 1)
    axis = Axis(low, high if high > low else low + 1, 0, 1, is_log=low > 0 and high >= 10 * low)
    heights = [axis(number) for number in numbers or [words.index(str(value)) for value in values]]
    ends = (f"{low:.3g}", f"{high:.3g}") if numbers else (words[0], words[-1])
    return heights, *ends


def _numbers(values: Sequence[object]) -> list[float]:
    """Return the values as numbers; an empty list if any is not a number."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    return numbers if len(numbers) == len(values) else []


def importance(rows: Sequence[Row]) -> dict[str, float]:
    """Return each varied setting's share of the accuracy's variance, largest first; empty if too few rows, or equal.

    Uses Optuna's fANOVA (Hutter, Hoos and Leyton-Brown 2014, ICML) on an in-memory study of the rows.
    """
    finished = [row for row in rows if row.trials]
    keys = varying_keys([row.treatment for row in finished])
    if len(finished) < FEWEST_FOR_IMPORTANCE or len(keys) < 2 or len({row.accuracy for row in finished}) == 1:
        return {}
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    columns = {key: [value_of(row.treatment, key) for row in finished] for key in keys}
    values: dict[str, Sequence[Any]] = {k: _numbers(column) or [*map(repr, column)] for k, column in columns.items()}
    spaces = {key: _space_of(column) for key, column in values.items()}
    study = optuna.create_study(direction="maximize")
    for i in range(0, len(finished), math.ceil(len(finished) / MOST_FOR_IMPORTANCE)):
        params = {key: values[key][i] for key in keys}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=finished[i].accuracy))
    evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=TREES, seed=0)
    return dict(optuna.importance.get_param_importances(study, evaluator=evaluator))


def _space_of(values: Sequence[Any]) -> BaseDistribution:
    """Return the Optuna distribution that ``values`` span: a range (log over a factor of ten), or categories."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    low, high = min(values), max(values)
    if isinstance(low, str):
        return CategoricalDistribution(sorted(set(values)))
    return FloatDistribution(low, high, log=low > 0 and high >= 10 * low)


def _importance(report: Report) -> Iterator[Figure]:
    shares = importance(report.rows)
    caption = (
        "Share of the variance of accuracy that each varied setting explains (fANOVA, by Optuna): a hint from "
        f"{pluralize(sum(bool(row.trials) for row in report.rows), 'setting')}, not a test; a sampler that looks at "
        "results tries some values more often."
    )
    if shares:
        yield Figure("", {one_line(name): share for name, share in list(shares.items())[:7]}, caption)


_FIGURES: dict[str, Callable[[Report], Iterator[Figure]]] = {
    "Accuracy against cost": _trade_off,
    "How much text": _data_curve,
    "Accuracy by freeze depth": _depths,
    "Learning curves": _curves,
    "The sweep as it went": _history,
    "Every setting": _parallel,
    "What mattered": _importance,
}

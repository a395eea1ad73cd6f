"""A report as one HTML file that needs nothing else: the answer first, then the table, then charts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template

from distilbench.report import charts
from distilbench.report.columns import FULL, Column, filled, plain
from distilbench.report.findings import (
    FEWEST_FOR_IMPORTANCE,
    Report,
    by_depth,
    comparable_in_time,
    expected_best,
    headline,
    importance,
    pareto_front,
    saving,
)
from distilbench.report.formats import duration, html, one_line, percent
from distilbench.report.rows import Row
from distilbench.report.tables import failures, notes_of, protocol_lines
from distilbench.report.words import VERDICTS, said, survival
from distilbench.results import Verdict

TEMPLATE = Path(__file__).with_name("page.html")
FEWEST_DRAWS = 5
"""Settings from which on the best of several is worth a chart."""
MOST_POINTS = 1000
"""Points in a chart: a browser slows down beyond some thousands."""
_SLIM = ("loss", "trainable_parameters", "status", "seeds")
"""Columns that a phone leaves out."""


def page(report: Report) -> str:
    """Write the whole page. Names and settings are escaped; a policy in it forbids the browser to load anything."""
    confirmed = "".join(
        f"<li><b>{html(found.label)}</b> {html(survival(found.first, found.again))}</li>"
        for found in report.confirmation
    )
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html(report.title),
        headline=html(headline(report)),
        saving=html(saving(report)),
        counts=_counts(report),
        confirmation=f"<h2>Confirmed with fresh seeds?</h2><ul>{confirmed}</ul>" if confirmed else "",
        header="".join(map(_head, filled(FULL, report.table_rows))),
        rows=_rows(report),
        charts="".join(_charts(report)),
        failures=_failures(report),
        notes="".join(f"<li>{html(line)}</li>" for line in (*protocol_lines(report), *notes_of(report))),
    )


def _counts(report: Report) -> str:
    """How many settings came to which verdict, and how many seeds stand behind one."""
    counts = Counter(row.verdict for row in report.candidates)
    items = [(counts[verdict], name, _class(verdict)) for verdict, name in VERDICTS.items() if counts[verdict]]
    ended = sum(not row.trials for row in report.rows)
    items += [(ended, "without a finished trial", "ended")] if ended else []
    seeds = sorted({row.n for row in report.candidates})
    shown = "".join(f'<li class="{kind}"><b>{count:,}</b> {name}</li>' for count, name, kind in items)
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else ""
    shown += f"<li>seeds for each setting: <b>{span}</b></li>" if span else ""
    address = report.url if report.url.startswith(("http://", "https://")) else ""
    return shown + (f'<li><a href="{escape(address)}">runs in MLflow</a></li>' if address else "")


def _class(verdict: Verdict) -> str:
    return verdict.name.lower()


def _kind(row: Row) -> str:
    """The class that colours a row: base, a verdict's, ended or untested."""
    if row.is_baseline:
        return "base"
    return _class(row.verdict) if row.verdict else "untested" if row.trials else "ended"


def _is_drawn(column: Column) -> bool:
    """Whether a column's cells hold a picture beside their number."""
    return column.key == "difference_points"


def _head(column: Column) -> str:
    kind = "" if column.is_text or _is_drawn(column) else "number"
    return f'<th class="{kind}"><button>{html(column.title)}</button></th>'


def _rows(report: Report) -> str:
    found = [row.difference for row in report.table_rows if row.difference]
    scale = charts.forest_axis([(difference.low, difference.high) for difference in found])
    columns, lines = filled(FULL, report.table_rows), []
    for row in report.table_rows:
        cells = "".join(_cell(column, row, scale) for column in columns)
        lines.append(f'<tr class="base">{cells}</tr>' if row.is_baseline else f"<tr>{cells}</tr>")
    return "".join(lines)


def _cell(column: Column, row: Row, scale: charts.Axis) -> str:
    """A cell with the value that sorts it; the colour of a verdict is that of its interval."""
    text, found = column.text(row), row.difference
    shown = html(text)
    if column.key == "setting" and row.url.startswith(("http://", "https://")):
        shown = f'<a href="{escape(row.url)}">{shown}</a>'
    if _is_drawn(column) and found:
        shown = charts.forest(scale, found.low, found.points, found.high, _kind(row), text) + shown
    kinds = [column.key, *(["number"] if not column.is_text and not _is_drawn(column) else [])]
    kinds += ["slim"] if column.key in _SLIM else [_kind(row)] if column.key == "verdict" else []
    value = escape(str(plain(column.value(row)) if not column.is_text else text))
    return f'<td class="{" ".join(kinds)}" data-title="{html(column.title)}" data-value="{value}">{shown}</td>'


def _failures(report: Report) -> str:
    lines = "".join(f"<li>{html(line)}</li>" for line in failures(report))
    return f"<h2>What did not finish</h2><ul>{lines}</ul>" if lines else ""


def _charts(report: Report) -> Iterator[str]:
    yield from _trade_off(report)
    yield from _depths(report)
    yield from _curves(report)
    yield from _importance(report)
    yield from _best_of(report)


def _figure(title: str, chart: str, caption: str) -> str:
    return f"<figure><h2>{html(title)}</h2>{chart}<figcaption>{html(caption)}</figcaption></figure>"


def _drawn(rows: Sequence[Row]) -> list[Row]:
    """The rows that get a point: beyond a few hundred best, evenly spaced ones, which hide no shape."""
    rest = rows[MOST_POINTS // 2 :]
    step = max(1, -(-len(rest) // (MOST_POINTS // 2)))
    return [row for i, row in enumerate(rows) if i < MOST_POINTS // 2 or i % step == 0 or row.is_baseline]


def _tip(row: Row) -> str:
    return one_line(f"{row.label}: {percent(row.accuracy)}, {duration(row.seconds)}, {said(row)}")


def _trade_off(report: Report) -> Iterator[str]:
    rows = [row for row in comparable_in_time(report) if not math.isnan(row.seconds)]
    if len(rows) < 2:
        return
    unit, name = _unit(max(row.seconds for row in rows))
    x = charts.horizontal([row.seconds / unit for row in rows], f" {name}")
    y = charts.vertical([100 * row.accuracy for row in rows])
    front = pareto_front(rows)
    marks = charts.line([(x(r.seconds / unit), y(100 * r.accuracy)) for r in front], "front", "Pareto front")
    for row in sorted(_drawn(rows), key=lambda r: r.is_baseline):
        marks += charts.dot(
            x(row.seconds / unit), y(100 * row.accuracy), _tip(row), _kind(row), 6 if row.is_baseline else 4.5
        )
    left = len(report.candidates) + (report.baseline is not None) - len(rows)
    caption = f"Each point is a setting; the dotted line joins those that no other beats in both ({len(front)}). "
    caption += "The open circle is the baseline. " if report.baseline and report.baseline.trials else ""
    caption += f"{left} settings whose times can't be compared are left out." if left > 0 else ""
    title = "Accuracy against training time"
    yield _figure(title, charts.frame(x, y, "training time", "accuracy, %", marks, title), caption)


def _unit(longest: float) -> tuple[int, str]:
    """The unit that tells seconds apart best: hours, minutes or seconds."""
    return next((unit, name) for unit, name in ((3600, "h"), (60, "min"), (1, "s")) if longest >= 2 * unit or unit == 1)


def _depths(report: Report) -> Iterator[str]:
    depths = by_depth(report.rows)
    if len(depths) < 2:
        return
    x = charts.horizontal(depths, whole=True)
    y = charts.vertical([100 * accuracy for found in depths.values() for accuracy in found])
    means = [(x(depth), y(100 * sum(found) / len(found))) for depth, found in depths.items()]
    marks = charts.line(means, "", "mean of the settings of a depth") + "".join(
        charts.dot(x(row.treatment["freeze.layers"]), y(100 * row.accuracy), _tip(row), _kind(row))  # type: ignore[arg-type]
        for row in _drawn(report.rows)
        if row.trials and row.treatment.get("freeze.layers") in depths
    )
    title = "Accuracy by freeze depth"
    caption = "Each point is a setting, the line their mean: settings of a depth differ in what else was varied."
    yield _figure(title, charts.frame(x, y, "frozen encoder layers", "accuracy, %", marks, title), caption)


def _curves(report: Report) -> Iterator[str]:
    drawn = [curve for curve in report.curves if curve.points]
    if not drawn:
        return
    x = charts.horizontal([step for curve in drawn for step, _ in curve.points], whole=True)
    y = charts.vertical([100 * value for curve in drawn for _, value in curve.points])
    marks = ""
    for i, curve in reversed(list(enumerate(drawn))):
        kind = "base" if curve.is_baseline else "" if i == 0 else "faint"
        places = [(x(step), y(100 * value)) for step, value in curve.points]
        marks += charts.line(places, kind, one_line(curve.label))
        marks += "".join(charts.dot(*place, one_line(curve.label), kind, 3) for place in places)
    title = "Learning curves"
    best = next((curve.label for curve in drawn if not curve.is_baseline), "")
    caption = (
        f"Accuracy on the split {report.sample.selection_split} at each evaluation, first seed of the best settings. "
    )
    caption += f"Solid: {best}. " if best else ""
    caption += "Dashed: the baseline." if any(curve.is_baseline for curve in drawn) else ""
    yield _figure(title, charts.frame(x, y, "step", "accuracy, %", marks, title), caption)


def _importance(report: Report) -> Iterator[str]:
    shares = importance(report.rows)
    title = "What mattered"
    if shares:
        shown = {one_line(name): share for name, share in list(shares.items())[:7]}
        caption = "Share of the variance of accuracy that each varied setting explains (fANOVA, by Optuna)."
        yield _figure(title, charts.bars(shown, title), caption)
    elif len(report.candidates) > 3:
        yield _figure(
            title, "", f"Parameter importance takes {FEWEST_FOR_IMPORTANCE} settings that differ in two ways."
        )


def _best_of(report: Report) -> Iterator[str]:
    curve = expected_best(report.candidates)
    if len(report.candidates) < FEWEST_DRAWS:
        return
    x, y = charts.horizontal([k for k, _ in curve], whole=True), charts.vertical([100 * value for _, value in curve])
    marks = charts.line([(x(k), y(100 * value)) for k, value in curve], "", "expected best")
    base = report.baseline
    if base is not None and base.trials and y.low <= 100 * base.accuracy <= y.high:
        level = y(100 * base.accuracy)
        marks += charts.line([(x(curve[0][0]), level), (x(curve[-1][0]), level)], "base", "baseline")
    title = "Expected best of k settings"
    caption = (
        "Were k of these settings drawn at random (Dodge et al., 2019): where it flattens, more trials add little. "
    )
    caption += "The best of many is an optimistic figure: see the confirmation."
    yield _figure(title, charts.frame(x, y, "settings tried, k", "accuracy, %", marks, title), caption)

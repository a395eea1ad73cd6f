"""A report as one HTML file that needs nothing else: the answer first, then the table, then charts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template

from distilbench.cli import command, override
from distilbench.identity import value_of
from distilbench.report import charts
from distilbench.report.answer import answer
from distilbench.report.columns import FULL, Column, filled, plain
from distilbench.report.figures import figures_of, kind_of
from distilbench.report.findings import Report
from distilbench.report.formats import html, one_line
from distilbench.report.names import in_order
from distilbench.report.rows import Row
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.tables import failures, notes_of, protocol_lines
from distilbench.report.words import VERDICTS, survival

TEMPLATE = Path(__file__).with_name("page.html")
_SLIM = ("loss", "trainable_parameters", "seeds", "p_holm", "train_cpu_seconds", "peak_memory_bytes")
"""Columns that are shown once all are asked for."""
_LONGEST_WORD = 40


def page(report: Report) -> str:
    """Write the whole page. Names and settings are escaped; a policy in it forbids the browser to load anything."""
    confirmed = "".join(f"<li><b>{html(row.label)}</b> {html(survival(row))}</li>" for row in report.confirmation)
    first, *more = answer(report)
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html(report.title),
        headline=html(first),
        saving="".join(map(html, more)),
        counts=_counts(report),
        confirmation=f"<h2>Confirmed with fresh seeds?</h2><ul>{confirmed}</ul>" if confirmed else "",
        kinds=_choices([(v.name.lower(), name) for v, name in VERDICTS.items()] + [("ended", "did not finish")]),
        depths=_choices([(d, f"depth {d}") for d in sorted({str(_depth(row)) for row in report.table_rows})]),
        columns=_choices([(str(i), column.title) for i, column in enumerate(filled(FULL, report.table_rows))]),
        header="".join(map(_head, filled(FULL, report.table_rows))),
        rows=_rows(report),
        charts="".join(figures_of(report)),
        slices=_slices(report),
        failures=_failures(report),
        notes="".join(f"<li>{html(line)}</li>" for line in (*protocol_lines(report), *notes_of(report))),
    )


def _counts(report: Report) -> str:
    """How many settings came to which verdict, and how many seeds stand behind one."""
    counts = Counter(row.claim for row in report.candidates)
    items = [(counts[verdict], name, verdict.name.lower()) for verdict, name in VERDICTS.items() if counts[verdict]]
    ended = sum(not row.trials for row in report.rows)
    items += [(ended, "without a finished trial", "ended")] if ended else []
    seeds = sorted({row.n for row in report.candidates})
    shown = "".join(f'<li class="{kind}"><b>{count:,}</b> {name}</li>' for count, name, kind in items)
    span = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}" if seeds else ""
    shown += f"<li>seeds for each setting: <b>{span}</b></li>" if span else ""
    address = report.url if report.url.startswith(("http://", "https://")) else ""
    return shown + (f'<li><a href="{escape(address)}">runs in MLflow</a></li>' if address else "")


def _is_drawn(column: Column) -> bool:
    """Whether a column's cells hold a picture beside their number."""
    return column.key == "difference_points"


def _head(column: Column) -> str:
    kind = "" if column.is_text or _is_drawn(column) else "number"
    kind += " slim" if column.key in _SLIM else ""
    return f'<th scope="col" class="{kind}"><button>{html(column.title)}</button></th>'


def _rows(report: Report) -> str:
    found = [row.difference for row in report.table_rows if row.difference]
    scale = charts.forest_axis([(difference.low, difference.high) for difference in found])
    columns, lines = filled(FULL, report.table_rows), []
    for row in report.table_rows:
        cells = "".join(_cell(column, row, scale) for column in columns)
        told = f'data-row="{row.rank}" data-kind="{kind_of(row)}" data-depth="{html(str(_depth(row)))}"'
        told += f' data-command="{html(_command(row, report))}"'
        lines.append(f"<tr{' class=base' if row.is_baseline else ''} {told}>{cells}</tr>")
    return "".join(lines)


def _depth(row: Row) -> object:
    return row.treatment.get("freeze.layers", "")


def _command(row: Row, report: Report) -> str:
    """Return the line that trains a setting again: its sources, and what a plain command line does otherwise."""
    ours = {key: value_of(row.treatment, key) for key in {*row.treatment, *report.usual} - {"train.precision"}}
    told = {key: value for key, value in ours.items() if value != value_of(report.usual, key)}
    if told.get("freeze.embeddings") == (ours.get("freeze.layers") != 0):
        del told["freeze.embeddings"]  # it follows the layers
    changed = (override(key.removesuffix(".name"), told[key]) for key in in_order([*told]))
    return command("train", [*report.sources, *changed, f"seed={row.first.seed}"])


def _choices(values: Sequence[tuple[str, str]]) -> str:
    return "".join(f'<option value="{html(value)}">{html(name)}</option>' for value, name in values)


def _cell(column: Column, row: Row, scale: charts.Axis) -> str:
    """Return a cell with the value that sorts it; the colour of a verdict is that of its interval."""
    text, found = column.text(row), row.difference
    shown = _unbroken(text) if column.key == "setting" else html(text)
    shown = shown if _is_drawn(column) else shown.replace(" (", " <br>(")
    if column.key == "setting" and row.first.url.startswith(("http://", "https://")):
        shown = f'<a href="{escape(row.first.url)}">{shown}</a>'
    if _is_drawn(column) and found:
        shown = charts.forest(scale, found.low, found.points, found.high, kind_of(row), text) + shown
    kinds = [column.key, *(["number"] if not column.is_text and not _is_drawn(column) else [])]
    kinds += ["slim"] if column.key in _SLIM else [kind_of(row)] if column.key == "verdict" else []
    value = escape(str(plain(column.value(row)) if not column.is_text else text))
    return f'<td class="{" ".join(kinds)}" data-title="{html(column.title)}" data-value="{value}">{shown}</td>'


def _unbroken(text: str) -> str:
    """Words that are broken between each other alone, unless one is longer than a line of a phone."""
    words = (html(word) for word in one_line(text).split(" "))
    return " ".join(word if len(word) > _LONGEST_WORD else f"<span>{word}</span>" for word in words)


def _slices(report: Report) -> str:
    """Return the best settings on each slice: a plain table, in the order in which it is made."""
    head = "".join(f'<th scope="col">{html(column.title)}</th>' for column in SLICES)
    rows = (
        "".join(
            f'<td class="{"" if c.is_text else "number"}" data-title="{html(c.title)}">{html(c.text(row))}</td>'
            for c in SLICES
        )
        for row in report.slices
    )
    body = "".join(f"<tr>{cells}</tr>" for cells in rows)
    table = f'<div class="wide"><table id="slices"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    return f"<h2>By slice</h2>{table}" if report.slices else ""


def _failures(report: Report) -> str:
    lines = "".join(f"<li>{html(line)}</li>" for line in failures(report))
    return f"<h2>What did not finish</h2><ul>{lines}</ul>" if lines else ""

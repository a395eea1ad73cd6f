"""The columns of every table: what each says of a row to people, and its plain value for sorting and for CSV."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich import box
from rich.table import Table
from rich.text import Text

from distilbench.report.formats import (
    csv_text,
    duration,
    interval,
    latex,
    less,
    markdown,
    markdown_row,
    millions,
    one_line,
    p_value,
    points,
    spread,
    url_in_markdown,
)
from distilbench.report.rows import Row
from distilbench.report.words import said
from distilbench.results import Verdict

Value = float | int | str | bool | None
"""Plain numbers: shares, seconds, points; None or NaN where there is none."""

WIDE = 150
"""Columns of text from which on a terminal gets every column."""


@dataclass(frozen=True)
class Column:
    """One column. ``key`` names it everywhere: in CSV's header and in the page; ``title`` is for people."""

    key: str
    value: Callable[[Row], Value]
    title: str = ""
    text: Callable[[Row], str] = str
    is_text: bool = False
    narrow: int = 0
    """Characters that it takes in a narrow terminal, which leaves columns of 0 away; settings get what is left."""


def _of_difference(name: str) -> Callable[[Row], Value]:
    return lambda row: getattr(row.difference, name) if row.difference else None


def _of_treatment(key: str) -> Column:
    return Column(key, lambda row: str(row.treatment.get(key, "")))


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return "" if row.points is None else points(row.points)
    return f"{points(found.points)} ({interval(found.low, found.high)})"


def _time(row: Row) -> str:
    if math.isnan(row.seconds):
        return ""
    saved = "" if row.time_gain_percent is None else f" ({less(row.time_gain_percent)})"
    return duration(row.seconds) + saved


_ALL = (
    Column("trial", lambda row: row.number, "#", lambda row: row.number.rpartition("/")[2], narrow=3),
    Column("setting", lambda row: row.label, "setting", lambda row: row.label, is_text=True, narrow=1),
    Column("is_baseline", lambda row: row.is_baseline),
    Column("seeds", lambda row: " ".join(map(str, row.seeds)), "n", lambda row: str(row.n)),
    Column("accuracy", lambda row: row.accuracy, "accuracy",
           lambda row: spread(row.accuracy, row.accuracy_deviation) if row.trials else "", narrow=8),
    Column("accuracy_deviation", lambda row: row.accuracy_deviation),
    Column("loss", lambda row: row.loss, "loss", lambda row: f"{row.loss:.4f}" if row.trials else ""),
    Column("train_seconds", lambda row: row.seconds, "time", _time, narrow=12),
    Column("train_seconds_deviation", lambda row: row.seconds_deviation),
    Column("difference_points", _of_difference("points"), "difference (95 %)", _difference, narrow=16),
    Column("difference_low_points", _of_difference("low")),
    Column("difference_high_points", _of_difference("high")),
    Column("p", _of_difference("p")),
    Column("p_holm", _of_difference("p_holm"), "p (Holm)",
           lambda row: p_value(row.difference.p_holm) if row.difference else ""),
    Column("time_gain_percent", lambda row: row.time_gain_percent),
    Column("trainable_parameters", lambda row: row.trainable_parameters, "trained",
           lambda row: millions(row.trainable_parameters)),
    Column("verdict", lambda row: row.verdict or "", "verdict", said, is_text=True, narrow=11),
    Column("not_tested", lambda row: row.untested or ""),
    Column("status", lambda row: row.status, "status", lambda row: row.status, is_text=True),
    Column("protocol", lambda row: row.all_trials[0].protocol_id),
    Column("runs", lambda row: " ".join(trial.run_id for trial in row.all_trials)),
    *map(_of_treatment, ("freeze.layers", "scheduler.name", "optim.lr", "optim.weight_decay")),
)  # fmt: skip
CSV = {column.key: column for column in _ALL}


def _choose(*keys: str) -> tuple[Column, ...]:
    return tuple(CSV[key] for key in keys)


BRIEF = _choose("trial", "setting", "difference_points", "verdict", "accuracy", "train_seconds")
NOTE = (*BRIEF, *_choose("p_holm", "seeds"))
FULL = (*BRIEF, *_choose("p_holm", "loss", "trainable_parameters", "seeds", "status"))
PAPER = tuple(
    replace(column, narrow=0)
    for column in (
        replace(CSV["setting"], title="experiment"),
        *_choose("accuracy", "loss"),
        replace(CSV["train_seconds"], title="training time",
                text=lambda row: duration(row.seconds) if row.trials else row.status),
        replace(CSV["time_gain_percent"], title="time gain",
                text=lambda row: "-" if row.time_gain_percent is None else f"{row.time_gain_percent:+.0f} %"),
    )
)  # fmt: skip
"""Table 1 of the course report (TPF-03): Experimento, Acurácia, Loss, Tempo de Treino, Ganho de Tempo."""
LAYOUTS = {"full": FULL, "paper": PAPER}

_STYLES = {Verdict.BETTER: "green", Verdict.AHEAD: "yellow", Verdict.WORSE: "red"}


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Leave away the columns in which nothing stands."""
    return [column for column in columns if not column.title or any(column.text(row) for row in rows)]


def rich_table(rows: Sequence[Row], columns: Sequence[Column], width: int) -> Table:
    """Lay rows out for a terminal of ``width`` columns, a narrow one without the columns that it has no room for."""
    columns = filled(columns, rows)
    is_narrow = width < WIDE and any(column.narrow for column in columns)
    columns = [column for column in columns if column.narrow or not is_narrow]
    left = max(width - 3 - sum(column.narrow + 2 for column in columns if column.key != "setting"), 20)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        room = (left if column.key == "setting" else column.narrow) if is_narrow else None
        whole = not column.is_text and not is_narrow
        table.add_column(_folded(column.title, is_narrow), justify=side, overflow="fold", width=room, no_wrap=whole)
    for row in rows:
        style = "bold" if row.is_baseline else _STYLES.get(row.verdict, "") if row.verdict else ""
        cells = (_folded(one_line(column.text(row)), is_narrow) for column in columns)
        table.add_row(*(Text(cell) for cell in cells), style=style)
    return table


def _folded(text: str, is_narrow: bool) -> str:
    """Put an interval, a deviation, a share below its figure where there is little room."""
    return text.replace(" (", "\n(").replace(" ± ", "\n± ") if is_narrow else text


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return header, rule and rows; a setting links to its run where it has one."""
    columns = filled(columns, rows)
    lines = [markdown_row([column.title for column in columns])]
    lines.append(markdown_row(["---" if column.is_text else "---:" for column in columns]))
    return lines + [markdown_row([_in_markdown(column, row) for column in columns]) for row in rows]


def _in_markdown(column: Column, row: Row) -> str:
    text = markdown(column.text(row))
    if not column.is_text:
        return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}(", " (")  # numbers are never broken
    if column.key != "setting":
        return text
    label = f"[{text}]({url_in_markdown(row.url)})" if row.url else text
    return f"**{label}**" if row.is_baseline else label


def latex_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return a ``tabular`` with booktabs' rules."""
    columns = filled(columns, rows)
    align = "".join("l" if column.is_text else "r" for column in columns)
    head, *body = (" & ".join(cells) + r" \\" for cells in (
        [latex(column.title) for column in columns],
        *([latex(column.text(row)) for column in columns] for row in rows),
    ))  # fmt: skip
    return [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def plain(value: Value) -> float | int | str | bool:
    """Return a value that nobody takes for a formula, nothing for what there is not."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return csv_text(value) if isinstance(value, str) else value

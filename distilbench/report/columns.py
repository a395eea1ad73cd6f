"""The columns of every table: what each says of a row to people, and its plain value for sorting and for CSV."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from rich import box
from rich.table import Table
from rich.text import Text

from distilbench.report.costs import NO_SAVING, average
from distilbench.report.formats import (
    duration,
    flops,
    interval,
    latex,
    less,
    markdown,
    markdown_row,
    memory,
    millions,
    one_line,
    p_value,
    points,
    spread,
    url_in_markdown,
)
from distilbench.report.rows import Row
from distilbench.report.words import decided_by, said
from distilbench.results import Status, Verdict

Value = float | int | str | bool | None
"""Plain numbers: shares, seconds, points; None or NaN where there is none."""

_LEAST_TEXT, _MOST_KEPT = 20, 40
"""Characters that a column of words is left in a terminal, where it is broken between words, and of the longest one."""


@dataclass(frozen=True)
class Column:
    """One column. ``key`` names it everywhere: in CSV's header and in the page; ``title`` is for people."""

    key: str
    value: Callable[[Row], Value]
    title: str = ""
    text: Callable[[Row], str] = str
    is_text: bool = False


def _of(path: str) -> Callable[[Row], Value]:
    """Return what reads an attribute of a row, such as ``difference.low``; None where there is none."""

    def value(row: Row) -> Value:
        found: Any = row
        for name in path.split("."):
            found = getattr(found, name, None)
        return cast(Value, found)

    return value


def _of_treatment(key: str) -> Column:
    return Column(key, lambda row: str(row.treatment.get(key, "")))


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return "" if row.points is None else points(row.points)
    return f"{points(found.points)} ({interval(found.low, found.high)})"


def _cost(name: str, text: Callable[[float], str], few: bool = False) -> Callable[[Row], str]:
    """Tell a cost and, in brackets, what of the baseline's it saves; ``few``: it is counted, not measured."""

    def told(row: Row) -> str:
        value, percent = getattr(row.cost, name), getattr(row.saving, name)
        return "" if math.isnan(value) else text(value) + (f" ({less(percent, few)})" if percent is not None else "")

    return told


def _measure(name: str) -> Callable[[Row], str]:
    """Tell the mean of a measure over a setting's trials."""

    def told(row: Row) -> str:
        value = average([getattr(trial, name) for trial in row.trials])[0]
        return "" if math.isnan(value) else f"{value:.4f}"

    return told


def _time(row: Row) -> str:
    told = _cost("seconds", duration)(row)
    return f"about {told}" if row.cost.is_estimate else told


def _seeds(row: Row) -> str:
    """How many seeds finished, and how the others ended."""
    ended = Counter(trial.status.lower() for trial in row.other_trials if trial.status is not Status.FINISHED)
    told = ", ".join(f"{count} {status}" for status, count in ended.items())
    return f"{row.n} ({told})" if told and row.trials else str(row.n)


def _short(name: str) -> Callable[[Row], str]:
    """Tell what a setting takes less, or more, than the baseline in a few characters: ``-35 %``."""

    def told(row: Row) -> str:
        saved = getattr(row.saving, name)
        return "" if saved is None else f"{-saved:+.0f} %" if round(saved) else "0 %"

    return told


_ALL = (
    Column("trial", lambda row: row.number, "#", lambda row: row.number),
    Column("setting", lambda row: row.label, "setting", lambda row: row.label, is_text=True),
    Column("slice", lambda row: row.slice),
    Column("examples", lambda row: row.examples or None),
    Column("is_baseline", lambda row: row.is_baseline),
    Column("seeds", lambda row: " ".join(map(str, row.seeds)), "n", _seeds),
    Column("accuracy", lambda row: row.accuracy, "accuracy",
           lambda row: spread(row.accuracy, row.accuracy_deviation) if row.trials else ""),
    Column("accuracy_deviation", lambda row: row.accuracy_deviation),
    Column("loss", lambda row: row.loss, "loss", lambda row: f"{row.loss:.4f}" if row.trials else ""),
    Column("brier", lambda row: average([trial.brier for trial in row.trials])[0], "Brier", _measure("brier")),
    Column("ece", lambda row: average([trial.ece for trial in row.trials])[0], "ECE", _measure("ece")),
    Column("train_seconds", lambda row: row.cost.seconds, "time", _time),
    Column("train_seconds_deviation", lambda row: row.cost.seconds_deviation),
    Column("is_time_estimate", lambda row: row.cost.is_estimate),
    Column("train_cpu_seconds", lambda row: row.cost.cpu_seconds, "CPU time",
           _cost("cpu_seconds", duration)),
    Column("train_flops", lambda row: row.cost.flops, "FLOPs",
           _cost("flops", flops, few=True)),
    Column("peak_memory_bytes", lambda row: row.cost.memory, "memory",
           _cost("memory", memory)),
    Column("difference_points", _of("difference.points"), "difference (95 %)", _difference),
    Column("difference_low_points", _of("difference.low")),
    Column("difference_high_points", _of("difference.high")),
    Column("p", _of("difference.p")),
    Column("p_holm", _of("difference.p_holm"), "p (Holm)",
           lambda row: p_value(row.difference.p_holm) if row.difference else ""),
    Column("loses_at_most_points", _of("difference.loses_at_most"), "loses at most",
           lambda row: f"{max(row.difference.loses_at_most, 0):.2f}" if row.difference else ""),
    Column("p_margin", _of("difference.p_loss")),
    Column("p_margin_holm", _of("difference.p_loss_holm")),
    Column("seeds_needed", _of("difference.needed.seeds"), "to decide", decided_by),
    Column("examples_needed", _of("difference.needed.examples")),
    Column("has_learned", lambda row: row.has_learned),
    Column("time_gain_percent", lambda row: row.saving.seconds),
    Column("flops_gain_percent", lambda row: row.saving.flops),
    Column("trainable_parameters", lambda row: row.trainable_parameters, "trained",
           lambda row: millions(row.trainable_parameters)),
    Column("verdict", lambda row: row.claim or "", "verdict", said, is_text=True),
    Column("not_tested", lambda row: row.untested or ""),
    Column("status", lambda row: row.status),
    Column("protocol", lambda row: row.first.protocol_id),
    Column("runs", lambda row: " ".join(trial.run_id for trial in row.all_trials)),
    *map(_of_treatment, ("freeze.layers", "scheduler.name", "optim.lr", "optim.weight_decay")),
)  # fmt: skip
CSV = {column.key: column for column in _ALL}


def _choose(*keys: str) -> tuple[Column, ...]:
    return tuple(CSV[key] for key in keys)


NOTE = _choose("trial", "setting", "difference_points", "loses_at_most_points", "verdict", "accuracy", "train_flops",
               "train_seconds")  # fmt: skip
"""What has room in half of MLflow's page."""
FULL = _choose("trial", "setting", "difference_points", "loses_at_most_points", "verdict", "seeds_needed", "accuracy",
               "train_flops", "train_seconds", "seeds", "train_cpu_seconds", "peak_memory_bytes",
               "trainable_parameters", "p_holm", "loss", "brier", "ece")  # fmt: skip
BRIEF = (
    *_choose("trial", "setting", "accuracy", "difference_points", "verdict"),
    replace(CSV["flops_gain_percent"], title="FLOPs", text=_short("flops")),
    replace(CSV["time_gain_percent"], title="time", text=_short("seconds")),
    *_choose("seeds_needed", "loses_at_most_points", "seeds"),
)
"""What a terminal shows that has no room for all, as many of them as there is room for."""
PAPER = (
    replace(CSV["setting"], title="experiment"),
    *_choose("accuracy", "loss"),
    replace(CSV["train_seconds"], title="training time",
            text=lambda row: _time(replace(row, saving=NO_SAVING)) or row.status),
    replace(CSV["time_gain_percent"], title="time gain",
            text=lambda row: "-" if row.saving.seconds is None else f"{row.saving.seconds:+.0f} %"),
)  # fmt: skip
"""Table 1 of the course report (TPF-03): Experimento, Acurácia, Loss, Tempo de Treino, Ganho de Tempo."""
LAYOUTS = {"full": FULL, "paper": PAPER}

_STYLES: dict[Verdict | None, str] = {Verdict.BETTER: "green", Verdict.AHEAD: "yellow", Verdict.WORSE: "red"}


def filled(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Leave away the columns in which nothing stands."""
    return [column for column in columns if not column.title or any(column.text(row) for row in rows)]


def fitting(rows: Sequence[Row], width: int) -> Sequence[Column]:
    """Return the columns that a terminal of ``width`` has room for, a line a row."""
    if _width(FULL, rows) <= width:
        return FULL
    brief = filled(BRIEF, rows)
    return next(brief[:n] for n in range(len(brief), 0, -1) if n <= 6 or _width(brief[:n], rows) <= width)


def _width(columns: Sequence[Column], rows: Sequence[Row]) -> int:
    """Count the characters that a table takes at least."""
    known = filled(columns, rows)
    widths = [max(len(column.title), *(len(one_line(column.text(row))) for row in rows)) for column in known]
    return sum(2 + (min(n, _LEAST_TEXT) if column.is_text else n) for column, n in zip(known, widths, strict=True))


def _setting_width(setting: Column, columns: Sequence[Column], rows: Sequence[Row], width: int) -> int:
    """Return what settings get of a terminal's ``width``: what others leave, and their words whole before a verdict is.

    Rich would narrow both alike, keep the words whole all the same, and cut what then has no room.
    """
    room = tight = width - 2
    for column in columns:
        if column is not setting:
            cells = [column.title, *(one_line(column.text(row)) for row in rows)]
            longest = max(len(line) for cell in cells for line in cell.replace(" (", "\n(").split("\n"))
            room -= 2 + (min(longest, _LEAST_TEXT) if column.is_text else longest)
            tight -= 2 + (_longest_word(column, rows) if column.is_text else longest)
    whole = max(len(one_line(setting.text(row))) for row in rows)
    return min(whole, max(room, min(_longest_word(setting, rows), _MOST_KEPT, tight), 1))


def _longest_word(column: Column, rows: Sequence[Row]) -> int:
    return max((len(word) for row in rows for word in one_line(column.text(row)).split()), default=0)


def rich_table(rows: Sequence[Row], columns: Sequence[Column], width: int) -> Table:
    """Lay rows out for a terminal of ``width`` columns; brackets stand below their figures where there is no room."""
    columns, is_folded = filled(columns, rows), _width(columns, rows) > width
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in columns:
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        title = column.title.replace(" (", "\n(") if is_folded else column.title
        kept = _setting_width(column, columns, rows, width) if is_folded and column.key == "setting" else None
        table.add_column(title, justify=side, overflow="fold", no_wrap=not column.is_text, width=kept)
    for row in rows:
        cells = [one_line(column.text(row)) for column in columns]
        cells = [cell.replace(" (", "\n(") if is_folded else cell for cell in cells]
        table.add_row(*map(Text, cells), style="bold" if row.is_baseline else _STYLES.get(row.claim, ""))
    return table


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return header, rule and rows; a setting links to its run where it has one."""
    columns = filled(columns, rows)
    lines = [markdown_row([column.title.replace(" %", "\N{NO-BREAK SPACE}%") for column in columns])]
    lines.append(markdown_row(["---" if column.is_text else "---:" for column in columns]))
    return lines + [markdown_row([_in_markdown(column, row) for column in columns]) for row in rows]


def _in_markdown(column: Column, row: Row) -> str:
    text = markdown(column.text(row)).replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    if not column.is_text:
        return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}(", " (")  # numbers are never broken
    if column.key != "setting":
        return text
    label = f"[{text}]({url_in_markdown(row.first.url)})" if row.first.url else text
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
    """Return a value for a spreadsheet: nothing for what there is not, and no text that it takes for a formula.

    OWASP, CSV Injection: a quote before ``= + - @``.
    """
    if isinstance(value, str):
        shown = one_line(value)
        return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
    return "" if value is None or math.isnan(value) else value

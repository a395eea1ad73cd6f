"""The columns of all tables, each with its text for people and a plain value for sorting and CSV; table renderers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, cast
from urllib.parse import quote

from rich import box
from rich.table import Table
from rich.text import Text

from distilbench.report import formats
from distilbench.report.rows import Cost, Row, average
from distilbench.report.words import decided_by, describe_verdict
from distilbench.results import Verdict

Value = float | int | str | bool | None
"""A plain value: shares, seconds, percentage points, text; None or NaN if missing."""

LEAST_TEXT = 20
"""The least width in characters of a text column in a terminal, where it wraps between words."""

LONGEST_PART = {"setting": 32, "slice": 32, "verdict": 7}
"""The longest part of a text that a terminal does not break; a longer part of a name is the path of a file."""


@dataclass(frozen=True)
class Column:
    """One column: ``key`` is its name in CSV's header and on the page, ``title`` its heading for people.

    The text of a cell is ``text_of(row)`` or, without ``text_of``, the value formatted by ``format_value``.
    """

    key: str
    value: Callable[[Row], Value]
    title: str = ""
    text_of: Callable[[Row], str] | None = None
    format_value: Callable[[Any], str] = str
    is_text: bool = False

    def text(self, row: Row) -> str:
        """Return the text of a row's cell; empty without a value."""
        if self.text_of:
            return self.text_of(row)
        value = self.value(row)
        return "" if value is None or value != value else self.format_value(value)


def _attribute(path: str) -> Callable[[Row], Any]:
    """Return a getter for a dotted attribute of a row, such as ``difference.low``; it returns None if missing."""
    return lambda row: reduce(lambda found, name: getattr(found, name, None), path.split("."), cast(Any, row))


def _mean(measure: str) -> Callable[[Row], Value]:
    """Return a getter for the mean of a measure over seeds; it is not known of a slice."""
    return lambda row: math.nan if row.slice else average([getattr(trial, measure) for trial in row.trials])[0]


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return "" if math.isnan(row.points) else formats.points(row.points)
    return f"{formats.points(found.points)} ({formats.interval(found.low, found.high)})"


def _cost(name: str, text: Callable[[float], str], is_count: bool = False) -> Callable[[Row], str]:
    """Return a formatter for a cost and, in brackets, its saving against the baseline; ``is_count``: say "fewer"."""

    def text_of(row: Row) -> str:
        value, percent = getattr(row.cost, name), row.saving(name)
        saved = "" if math.isnan(percent) else f" ({formats.saving(percent, is_count)})"
        return "" if math.isnan(value) else text(value) + saved

    return text_of


def _time(row: Row) -> str:
    text = _cost("seconds", formats.duration)(row)
    if row.cost.is_estimate:
        return f"about {text}"
    return text.replace("(", "(about ") if row.is_saving_estimate else text


def _saved_time(text: Callable[[float], str], missing: str = "") -> Callable[[Row], str]:
    """Return a formatter for the saving of time alone."""

    def text_of(row: Row) -> str:
        saved = row.saving("seconds")
        return missing if math.isnan(saved) else f"{'about ' if row.is_saving_estimate else ''}{text(saved)}"

    return text_of


def _seeds(row: Row) -> str:
    """Return how many seeds finished, and how the others ended."""
    ended = Counter(trial.status.lower() for trial in row.unfinished_trials)
    counts = ", ".join(f"{count} {status}" for status, count in ended.items())
    return f"{row.num_seeds} ({counts})" if counts and row.trials else str(row.num_seeds)


def _short(saved: float) -> str:
    """Return the change in cost against the baseline in a few characters: ``-35 %``, at most ``-99 %``."""
    return f"{-min(saved, 99):+.0f} %" if round(saved) else "0 %"


_ALL = (
    Column("trial", _attribute("number"), "#"),
    Column("setting", _attribute("label"), "setting", is_text=True),
    Column("slice", _attribute("slice")),
    Column("examples", lambda row: row.examples or None),
    Column("is_baseline", _attribute("is_baseline")),
    Column("seeds", lambda row: " ".join(map(str, row.seeds)), "n", _seeds),
    Column("accuracy", _attribute("accuracy"), "accuracy",
           lambda row: formats.mean_and_deviation(row.accuracy, row.accuracy_deviation) if row.trials else ""),
    Column("accuracy_deviation", _attribute("accuracy_deviation")),
    Column("loss", _attribute("loss"), "loss", format_value="{:.4f}".format),
    Column("brier", _mean("brier"), "Brier", format_value="{:.4f}".format),
    Column("ece", _mean("ece"), "ECE", format_value="{:.4f}".format),
    Column("train_seconds", _attribute("cost.seconds"), "time", _time),
    Column("is_time_estimate", _attribute("cost.is_estimate")),
    Column("train_cpu_seconds", _attribute("cost.cpu_seconds"), "CPU time", _cost("cpu_seconds", formats.duration)),
    Column("train_flops", _attribute("cost.flops"), "FLOPs", _cost("flops", formats.flops, is_count=True)),
    Column("peak_memory_bytes", _attribute("cost.memory"), "memory", _cost("memory", formats.memory)),
    Column("difference_points", _attribute("points"), "difference (95 %)", _difference),
    Column("difference_low_points", _attribute("difference.low")),
    Column("difference_high_points", _attribute("difference.high")),
    Column("p", _attribute("difference.p")),
    Column("p_holm", _attribute("difference.p_holm"), "p (Holm)", format_value=formats.p_value),
    Column("loses_at_most_points", _attribute("difference.loses_at_most"), "loses at most",
           format_value=lambda lost: f"{max(lost, 0):.2f}"),
    Column("p_margin", _attribute("difference.p_loss")),
    Column("p_margin_holm", _attribute("difference.p_loss_holm")),
    Column("seeds_needed", _attribute("difference.needed.seeds"), "to decide", decided_by),
    Column("examples_needed", _attribute("difference.needed.examples")),
    Column("has_learned", _attribute("has_learned")),
    Column("time_gain_percent", lambda row: row.saving("seconds")),
    Column("flops_gain_percent", lambda row: row.saving("flops")),
    Column("trainable_parameters", _attribute("trainable_parameters"), "trained", format_value=formats.millions),
    Column("verdict", lambda row: row.final_verdict or "", "verdict", describe_verdict, is_text=True),
    Column("verdict_of_fresh_seeds", lambda row: row.final_row is not row),
    Column("not_tested", lambda row: row.untested or ""),
    Column("status", _attribute("status")),
    Column("protocol", _attribute("first_trial.protocol_id")),
    Column("runs", lambda row: " ".join(trial.run_id for trial in row.all_trials)),
    *(Column(key, lambda row, key=key: str(row.treatment.get(key, "")))  # type: ignore[misc]
      for key in ("freeze.layers", "scheduler.name", "optim.lr", "optim.weight_decay")),
)  # fmt: skip
CSV = {column.key: column for column in _ALL}


def _choose(*keys: str) -> tuple[Column, ...]:
    return tuple(CSV[key] for key in keys)


MLFLOW_NOTE = _choose("trial", "setting", "difference_points", "loses_at_most_points", "verdict", "accuracy",
                      "train_flops", "train_seconds")  # fmt: skip
"""Columns that fit into half of MLflow's page."""
FULL = _choose("trial", "setting", "difference_points", "loses_at_most_points", "verdict", "seeds_needed", "accuracy",
               "train_flops", "train_seconds", "seeds", "train_cpu_seconds", "peak_memory_bytes",
               "trainable_parameters", "p_holm", "loss", "brier", "ece")  # fmt: skip
NARROW = (
    *_choose("trial", "setting", "accuracy", "difference_points", "verdict"),
    replace(CSV["flops_gain_percent"], title="FLOPs", format_value=_short),
    replace(CSV["time_gain_percent"], title="time", text_of=_saved_time(_short)),
    *_choose("seeds_needed", "loses_at_most_points", "seeds"),
)
"""Columns for a narrow terminal, which shows as many of them as fit."""
PAPER = (
    replace(CSV["setting"], title="experiment"),
    *_choose("accuracy", "loss"),
    replace(CSV["train_seconds"], title="training time",
            text_of=lambda row: _time(replace(row, baseline_cost=Cost())) or row.status),
    replace(CSV["time_gain_percent"], title="time gain", text_of=_saved_time("{:+.0f} %".format, "-")),
)  # fmt: skip
"""Table 1 of the course report (TPF-03): Experimento, Acurácia, Loss, Tempo de Treino, Ganho de Tempo."""
LAYOUTS = {"full": FULL, "paper": PAPER}

_STYLES: dict[Verdict | None, str] = {Verdict.BETTER: "green", Verdict.AHEAD: "yellow", Verdict.WORSE: "red"}


def drop_empty(columns: Sequence[Column], rows: Sequence[Row]) -> list[Column]:
    """Return the columns that are not empty."""
    return [column for column in columns if not column.title or any(column.text(row) for row in rows)]


def _texts(column: Column, rows: Sequence[Row], is_folded: bool) -> list[str]:
    """Return a column's title and cells; in a folded table, brackets and deviations are on a second line."""
    texts = [column.title, *(formats.one_line(column.text(row)) for row in rows)]
    return [text.replace(" (", "\n(").replace(" ±", "\n±") for text in texts] if is_folded else texts


def _width(columns: Sequence[Column], rows: Sequence[Row], is_folded: bool, least: int = LEAST_TEXT) -> int:
    """Return the least width of the columns in characters: neither figures nor parts of names are wrapped."""
    total = 0
    for column in columns:
        texts = _texts(column, rows, is_folded)
        longest = max(map(len, "\n".join(texts).split("\n")))
        total += 2 + (min(longest, max(least, _longest_part(column, texts))) if column.is_text else longest)
    return total


def _longest_part(column: Column, texts: Sequence[str]) -> int:
    return min(max(map(len, " ".join(texts).split(" "))), LONGEST_PART[column.key])


def rich_table(rows: Sequence[Row], columns: Sequence[Column], width: int) -> Table:
    """Lay out rows for a terminal of ``width`` characters, in the first way that breaks neither figures nor names.

    That is all columns; otherwise, of the full layout those for a narrow terminal, as many as fit: rows take one line
    or, with seven columns or fewer, two. The setting and the verdict then get 24 characters each if costs take two
    columns, and 12 if they take one. The setting's column gets the remaining width, because Rich would narrow all text
    columns equally.
    """
    least = {7: 24, 6: 12} if columns is FULL else {}
    fewer = drop_empty(NARROW if columns is FULL else columns, rows)
    ways = [(drop_empty(columns, rows), False, LEAST_TEXT)]
    for n in range(len(fewer), 0, -1):
        ways += [(fewer[:n], False, LEAST_TEXT), *([(fewer[:n], True, least.get(n, 0))] if n < 8 else [])]
    columns, is_folded, _ = next((way for way in ways if _width(way[0], rows, *way[1:]) <= width), ways[-1])
    room = width - 2 - _width([column for column in columns if column.key != "setting"], rows, is_folded)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    cells = []
    for column in columns:
        title, *texts = _texts(column, rows, is_folded)
        cells.append(texts)
        kept = min(max(room, _longest_part(column, texts)), max(map(len, texts))) if column.key == "setting" else None
        side: Literal["left", "right"] = "left" if column.is_text else "right"
        table.add_column(title, justify=side, overflow="fold", no_wrap=not column.is_text, width=kept)
    for row, shown in zip(rows, zip(*cells, strict=True), strict=True):
        table.add_row(*map(Text, shown), style="bold" if row.is_baseline else _STYLES.get(row.final_verdict, ""))
    return table


def markdown_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return header, rule and rows; a setting links to its run, if any."""
    columns = drop_empty(columns, rows)
    titles = [column.title.replace(" %", "\N{NO-BREAK SPACE}%") for column in columns]
    rules = ["---" if column.is_text else "---:" for column in columns]
    body = ([_in_markdown(column, row) for column in columns] for row in rows)
    return [f"| {' | '.join(cells)} |" for cells in (titles, rules, *body)]


_IN_LINKS = ":/?#[]@!$&'*+,;=%~"
"""Characters of a URL that need no escaping in Markdown's links and table cells."""


def _in_markdown(column: Column, row: Row) -> str:
    text = formats.markdown(column.text(row)).replace("n = ", "n\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}")
    if not column.is_text:
        return text.replace(" ", "\N{NO-BREAK SPACE}").replace("\N{NO-BREAK SPACE}(", " (")  # numbers don't wrap
    if column.key != "setting":
        return text
    label = f"[{text}]({quote(row.first_trial.url, safe=_IN_LINKS)})" if row.first_trial.url else text
    return f"**{label}**" if row.is_baseline else label


def latex_table(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
    """Return a LaTeX ``tabular`` with booktabs rules."""
    columns = drop_empty(columns, rows)
    align = "".join("l" if column.is_text else "r" for column in columns)
    head, *body = (" & ".join(cells) + r" \\" for cells in (
        [formats.latex(column.title) for column in columns],
        *([formats.latex(column.text(row)) for column in columns] for row in rows),
    ))  # fmt: skip
    return [rf"\begin{{tabular}}{{{align}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]


def to_csv_value(value: Value) -> float | int | str | bool:
    """Return a value that is safe in a spreadsheet: empty if missing, and no text that could be read as a formula.

    A quote is put before ``= + - @`` (OWASP, CSV Injection).
    """
    if isinstance(value, str):
        shown = formats.one_line(value)
        return f"'{shown}" if shown[:1] in ("=", "+", "-", "@") else shown
    return "" if value is None or math.isnan(value) else value

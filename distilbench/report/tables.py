"""A report as text: for the terminal, and as Markdown, LaTeX and CSV; in full, or laid out as in the course report."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.report.findings import Report, headline, saving, unfinished
from distilbench.report.formats import (
    csv_text,
    duration,
    interval,
    latex,
    markdown,
    markdown_row,
    millions,
    one_line,
    p_value,
    points,
    spread,
    time_gain,
)
from distilbench.report.rows import Row

WIDE = 150
"""Columns of text from which on a terminal gets every column."""
ERRORS_TOLD = 5
_LONGEST_ERROR = 200


@dataclass(frozen=True)
class Column:
    """One column: its title, what it says of a row, and whether a narrow terminal keeps it."""

    title: str
    text: Callable[[Row], str]
    right: bool = True
    narrow: int = 0
    """Characters that it takes in a narrow terminal, which leaves columns of 0 away; the first gets what is left."""


def _accuracy(row: Row) -> str:
    return spread(row.accuracy, row.accuracy_deviation) if row.trials else ""


def _difference(row: Row) -> str:
    found = row.difference
    if found is None:
        return "" if row.points is None else points(row.points)
    return f"{points(found.points)} ({interval(found.low, found.high)})"


def _gain(row: Row) -> str:
    if row.is_baseline or not row.trials or row.verdict.startswith("not tested: the baseline did"):
        return ""
    return time_gain(row.time_gain_percent)


def _seconds(row: Row) -> str:
    return duration(row.seconds) if row.trials and not math.isnan(row.seconds) else ""


def _said(row: Row) -> str:
    """The verdict, or how a setting without a finished trial ended."""
    return row.verdict if row.trials else row.status


FULL = (
    Column("setting", lambda row: row.label, right=False, narrow=20),
    Column("difference (95 %)", _difference, narrow=18),
    Column("verdict", _said, right=False, narrow=15),
    Column("accuracy", _accuracy, narrow=8),
    Column("time gain", _gain, narrow=10),
    Column("time", _seconds),
    Column("p (Holm)", lambda row: p_value(row.difference.p_holm) if row.difference else ""),
    Column("loss", lambda row: f"{row.loss:.4f}" if row.trials else ""),
    Column("trained", lambda row: millions(row.trainable_parameters)),
    Column("n", lambda row: str(row.n)),
    Column("status", lambda row: row.status, right=False),
)
PAPER = (
    Column("experiment", lambda row: row.label, right=False),
    Column("accuracy", _accuracy),
    Column("loss", lambda row: f"{row.loss:.4f}" if row.trials else ""),
    Column("training time", lambda row: _seconds(row) or row.status),
    Column(
        "time gain",
        lambda row: "-" if row.is_baseline or row.time_gain_percent is None else f"{row.time_gain_percent:+.0f} %",
    ),
)
"""Table 1 of the course report (TPF-03): Experimento, Acurácia, Loss, Tempo de Treino, Ganho de Tempo."""
LAYOUTS = {"full": FULL, "paper": PAPER}


def rows_of(report: Report, layout: str) -> list[Row]:
    """The rows in the layout's order: best first, but the paper's table begins with the baseline."""
    rows = list(report.table_rows)
    return sorted(rows, key=lambda row: not row.is_baseline) if layout == "paper" else rows


def protocol_lines(report: Report) -> list[str]:
    """What all rows share: what was trained on what, and which split chose and which reported."""
    sample = report.sample
    return [
        f"protocol {sample.protocol_id}: {one_line(sample.model)} on {one_line(sample.data)}",
        f"{sample.metric} on the split {sample.selection_split} picked epochs, figures are of the split "
        f"{sample.report_split}",
    ]


def notes_of(report: Report) -> list[str]:
    """What a reader of the table must know besides."""
    tests = (
        "Exact McNemar for one seed, a paired test over seeds and examples for several. p is corrected for the number "
        "of settings (Holm), each interval is of its own comparison."
    )
    more = len(report.rows) - len(report.table_rows)
    cut = [f"{more:,} more settings are not shown."] if more else []
    untimed = sorted({row.time_note for row in report.table_rows if row.time_note})
    return [*report.notes, *(f"Times not compared: {reason}." for reason in untimed), *cut, tests]


def print_report(console: Console, report: Report, layout: str = "full", most: int = 25) -> None:
    """Print the answer, the table of the best ``most`` rows (and the baseline), and what failed."""
    console.print()
    console.print(Text(one_line(report.title), "bold"))
    for line in protocol_lines(report):
        console.print(Text(line, "dim"))
    console.print(_rich_table(report, layout, most, console.width))
    for sentence in filter(None, (headline(report), saving(report))):
        console.print(Text(one_line(sentence), "bold"))
    for line in (*_confirmation_lines(report), *failures(report), *notes_of(report)):
        console.print(Text(line))


def _rich_table(report: Report, layout: str, most: int, width: int) -> Table:
    narrow = width < WIDE and layout != "paper"
    columns = [column for column in LAYOUTS[layout] if column.narrow or not narrow]
    left = max(width - 2 - sum(column.narrow + 1 for column in columns[1:]), 20)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for i, column in enumerate(columns):
        side: Literal["left", "right"] = "right" if column.right else "left"
        room = (column.narrow if i else left) if narrow else None
        whole = column.right and not narrow
        table.add_column(_folded(column.title, narrow), justify=side, overflow="fold", width=room, no_wrap=whole)
    rows = rows_of(report, layout)
    for row in [row for i, row in enumerate(rows) if i < most or row.is_baseline]:
        style = "bold" if row.is_baseline else _STYLES.get(_said(row).split(" ")[0].rstrip(","), "")
        cells = (_folded(one_line(column.text(row)), narrow) for column in columns)
        table.add_row(*(Text(cell) for cell in cells), style=style)
    if len(rows) > most:
        table.caption = f"the best {most} of {len(report.rows):,}; the rest stands in the files"
    return table


def _folded(text: str, narrow: bool) -> str:
    """An interval and a deviation go below their figure where there is little room."""
    return text.replace(" (", "\n(").replace(" ± ", "\n± ") if narrow else text


_STYLES = {"better": "green", "ahead": "yellow", "worse": "red"}


def failures(report: Report) -> list[str]:
    """One line for each of the first trials that did not finish, and how many more there are."""
    ended = unfinished(report.rows)
    lines = [
        f"{trial.status.value} {one_line(trial.name)} (seed {trial.seed})"
        + (f": {one_line(trial.error)[:_LONGEST_ERROR]}" if trial.error else "")
        for trial in ended[:ERRORS_TOLD]
    ]
    more = len(ended) - ERRORS_TOLD
    return lines + ([f"and {more:,} more that did not finish"] if more > 0 else [])


def _confirmation_lines(report: Report) -> Iterator[str]:
    for found in report.confirmation:
        yield f"{one_line(found.label)}: {survival(found.first, found.again)}"


def survival(first: Row, again: Row) -> str:
    """Both figures side by side, and whether the advantage is still there: points, interval and seeds of each."""
    word = "confirmed" if again.verdict.startswith("better") else "not confirmed"
    return f"{word}: {_shown(first)} in the sweep, {_shown(again)} with fresh seeds"


def _shown(row: Row) -> str:
    if row.difference is None:
        return f"{points(row.points)} points, {row.verdict}" if row.points is not None else row.status
    return f"{_difference(row)} points, n = {row.difference.n}, corrected p {p_value(row.difference.p_holm)}"


def markdown_report(report: Report, layout: str = "full") -> str:
    """The report as GitHub-flavoured Markdown; labels link to runs, and nothing in a name acts as markup."""
    columns = LAYOUTS[layout]
    lines = [f"# {markdown(report.title)}", "", *(f"{markdown(line)}  " for line in protocol_lines(report)), ""]
    lines += [f"**{markdown(s)}**" + "  " for s in (headline(report), saving(report)) if s]
    lines += ["", *markdown_table(rows_of(report, layout), columns, linked=True), ""]
    told = [*_confirmation_lines(report), *failures(report), *notes_of(report)]
    return "\n".join([*lines, *(f"- {markdown(line)}" for line in told), ""])


def markdown_table(rows: Sequence[Row], columns: Sequence[Column], linked: bool) -> list[str]:
    """Header, rule and rows; the first column links to the row's run where it has one and ``linked`` asks for it."""
    lines = [markdown_row([column.title for column in columns])]
    lines.append(markdown_row(["---:" if column.right else "---" for column in columns]))
    for row in rows:
        first, *rest = (markdown(column.text(row)) for column in columns)
        label = f"[{first}]({_address(row.url)})" if linked and row.url else first
        lines.append(markdown_row([f"**{label}**" if row.is_baseline else label, *rest]))
    return lines


def _address(url: str) -> str:
    """A URL that can't end Markdown's link early."""
    return url.replace("(", "%28").replace(")", "%29").replace(" ", "%20").replace("|", "%7C")


NOTE_COLUMNS = tuple(column for column in FULL if column.title not in ("status", "loss", "trained"))
NOTE_ROWS = 10


def note(report: Report) -> str:
    """The report as short Markdown for the description of a sweep's run: the answer and the first rows, with links."""
    rows = [row for i, row in enumerate(report.table_rows) if i < NOTE_ROWS or row.is_baseline]
    lines = [f"**{markdown(s)}**" + "  " for s in (headline(report), saving(report)) if s]
    lines += [f"{markdown(line)}  " for line in _confirmation_lines(report)]
    more = len(report.rows) - len(rows)
    table = [
        *markdown_table(rows, NOTE_COLUMNS, linked=True),
        "",
        *([f"{more:,} more in report.html."] if more else []),
    ]
    return "\n".join([*lines, "", *table, "", *(f"{markdown(line)}  " for line in protocol_lines(report))])


def latex_report(report: Report, layout: str = "full") -> str:
    """A table for LaTeX with booktabs; the caption says what it rests on."""
    columns = LAYOUTS[layout]
    align = "".join("r" if column.right else "l" for column in columns)
    rows = [" & ".join(latex(column.text(row)) for column in columns) + r" \\" for row in rows_of(report, layout)]
    caption = " ".join([headline(report), *(f"{line}." for line in protocol_lines(report)), *notes_of(report)])
    head = " & ".join(latex(column.title) for column in columns) + r" \\"
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        head,
        r"\midrule",
    ]
    return "\n".join(
        [*lines, *rows, r"\bottomrule", r"\end{tabular}", rf"\caption{{{latex(caption)}}}", r"\end{table}", ""]
    )


def csv_report(report: Report) -> str:
    """Every row with plain numbers (shares as shares, seconds, points), empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_CSV)
    for row in report.rows:
        writer.writerow([value(row) for value in _CSV.values()])
    return stream.getvalue()


def _number(value: float | None) -> float | str:
    return "" if value is None or math.isnan(value) else value


def _of_difference(name: str) -> Callable[[Row], float | str]:
    return lambda row: "" if row.difference is None else _number(getattr(row.difference, name))


def _of_treatment(key: str) -> Callable[[Row], str]:
    return lambda row: csv_text(str(row.treatment.get(key, "")))


_CSV: dict[str, Callable[[Row], object]] = {
    "setting": lambda row: csv_text(row.label),
    "is_baseline": lambda row: row.is_baseline,
    "seeds": lambda row: " ".join(map(str, row.seeds)),
    "accuracy": lambda row: _number(row.accuracy),
    "accuracy_deviation": lambda row: _number(row.accuracy_deviation),
    "loss": lambda row: _number(row.loss),
    "train_seconds": lambda row: _number(row.seconds),
    "train_seconds_deviation": lambda row: _number(row.seconds_deviation),
    "difference_points": _of_difference("points"),
    "difference_low_points": _of_difference("low"),
    "difference_high_points": _of_difference("high"),
    "p": _of_difference("p"),
    "p_holm": _of_difference("p_holm"),
    "time_gain_percent": lambda row: _number(row.time_gain_percent),
    "trainable_parameters": lambda row: row.trainable_parameters,
    "verdict": lambda row: csv_text(row.verdict),
    "status": lambda row: row.status,
    "protocol": lambda row: (*row.trials, *row.others)[0].protocol_id,
    "runs": lambda row: " ".join(trial.run_id for trial in (*row.trials, *row.others)),
    **{key: _of_treatment(key) for key in ("freeze.layers", "scheduler.name", "optim.lr", "optim.weight_decay")},
}

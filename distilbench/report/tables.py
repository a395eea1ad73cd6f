"""Reports as text: for the terminal, and as Markdown, LaTeX and CSV; in full or in the course report's layout."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from distilbench.cli import pluralize
from distilbench.report.columns import (
    CSV,
    LAYOUTS,
    MLFLOW_NOTE,
    latex_table,
    markdown_table,
    rich_table,
    to_csv_value,
)
from distilbench.report.findings import Report, answer, tried_settings
from distilbench.report.formats import latex, markdown, one_line, percent
from distilbench.report.rows import Row, noise_of_time
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.slices import NOTE as SLICES_NOTE
from distilbench.report.words import describe_confirmation, describe_difference, describe_verdict

ERRORS_TOLD = 5
_LONGEST_ERROR = 200
NOTE_ROWS = 10


def _sort_rows(report: Report, layout: str) -> list[Row]:
    """Return the rows in the layout's order: best first; in ``paper``, the baseline comes first."""
    return sorted(report.table_rows, key=lambda row: layout == "paper" and not row.is_baseline)


def protocol_lines(report: Report) -> list[str]:
    """State what all rows share: model, data, the splits that select and report, and the floor."""
    sample, majority = report.sample, report.majority
    return [
        f"protocol {sample.protocol_id}: {one_line(sample.model)} on {one_line(sample.data)}",
        f"{sample.metric} on the split {sample.selection_split} picked epochs and winners, figures are of the split "
        f"{sample.report_split}"
        + (f"; always predicting the most frequent label scores {percent(majority)}" if majority else ""),
    ]


def details(report: Report) -> Iterator[str]:
    """State what readers of the table need besides: confirmations, failures, and how to read the figures."""
    for row in report.confirmation:
        yield one_line(describe_confirmation(row))
    yield from failures(report)
    yield from notes_of(report)


def notes_of(report: Report) -> Iterator[str]:
    """State how the figures were obtained and tested."""
    yield from report.notes
    noise, trials = noise_of_time([trial for row in report.rows for trial in row.trials])
    if trials:
        yield (
            f"Times of equal work vary by ± {noise:.0f} % (standard deviation, {trials} trials); FLOPs are "
            "counted, not measured."
        )
    for reason in sorted({row.time_note for row in report.table_rows if row.time_note}):
        yield f"Times not compared: {reason}."
    if any(row.cost.is_estimate for row in report.table_rows):
        yield "Times told as 'about' are estimates: what one trial would take alone, by a probe."
    if more := len(report.rows) - len(report.table_rows):
        yield f"Not shown: {pluralize(more, 'setting')} more."
    common = {*report.baseline.seeds} if report.baseline else set()
    if any(common & {*row.seeds} and common != {*row.seeds} for row in report.table_rows if row.difference):
        yield "Differences are over the seeds (n) that the baseline has as well, accuracies over all."
    if any(row.difference for row in report.table_rows):
        yield (
            f"Good enough: shown to lose less than {pluralize(report.margin, 'point')} (one-sided, 2.5 %). Better, "
            "worse: exact McNemar for one seed, a paired test over seeds and examples for several. Both are corrected "
            "for the number of settings tried (Holm), and so are the largest losses (Bonferroni); intervals are not."
        )
    if report.slices:
        yield SLICES_NOTE


def failures(report: Report) -> list[str]:
    """Return one line for each of the first unfinished trials, and how many more there are."""
    ended = [(row, trial) for row in report.rows for trial in row.unfinished_trials]
    lines = [
        f"{trial.status.value} {one_line(row.name)} (seed {trial.seed})"
        + (f": {one_line(trial.error)[:_LONGEST_ERROR]}" if trial.error else "")
        for row, trial in ended[:ERRORS_TOLD]
    ]
    more = len(ended) - ERRORS_TOLD
    return lines + ([f"and {more:,} more that did not finish"] if more > 0 else [])


def print_report(console: Console, report: Report, layout: str = "full", most: int = 25) -> None:
    """Print the answer, the table of the best ``most`` rows (and the baseline), and what failed."""
    rows = _sort_rows(report, layout)
    shown = [row for i, row in enumerate(rows) if i < most or row.is_baseline]
    table = rich_table(shown, LAYOUTS[layout], console.width)
    if len(rows) > most:
        table.caption = f"the best {most} of {len(report.rows):,}; the rest stands in the files"
    console.print()
    console.print(Text(one_line(report.title), "bold"))
    for line in protocol_lines(report):
        console.print(Text(line, "dim"))
    for sentence in answer(report):
        console.print(Text(one_line(sentence), "bold"))
    console.print(table)
    if report.slices:
        console.print(rich_table(report.slices, SLICES, console.width))
    for line in details(report):
        console.print(Text(line))
    for label, text in {"start": report.ui_command, "open": report.url}.items():
        if text:
            console.print(Text(f"{label:<8}{text}"), soft_wrap=True)  # unwrapped, so that it can be clicked


def markdown_report(report: Report, layout: str = "full") -> str:
    """Write the report as GitHub-flavoured Markdown; labels link to runs, and markup in names is escaped."""
    lines = [f"# {markdown(report.title)}", "", *(f"{markdown(line)}  " for line in protocol_lines(report)), ""]
    lines += [f"**{markdown(sentence)}**  " for sentence in answer(report)]
    lines += ["", *markdown_table(_sort_rows(report, layout), LAYOUTS[layout]), ""]
    lines += ["## By slice", "", *markdown_table(report.slices, SLICES), ""] if report.slices else []
    return "\n".join([*lines, *(f"- {markdown(line)}" for line in details(report)), ""])


def note(report: Report) -> str:
    """Write the description of a sweep's run in Markdown: the answer and the first rows, with links."""
    rows = [row for i, row in enumerate(report.table_rows) if i < NOTE_ROWS or row.is_baseline]
    lines = [f"**{markdown(sentence)}**  " for sentence in answer(report)]
    lines += [f"{markdown(describe_confirmation(row))}  " for row in report.confirmation]
    lines += ["", *markdown_table(rows, MLFLOW_NOTE), ""]
    more = len(report.rows) - len(rows)
    lines += [f"{more:,} more in report.html.", ""] if more else []
    return "\n".join([*lines, *(f"{markdown(line)}  " for line in protocol_lines(report))])


def trial_note(report: Report, row: Row) -> tuple[str, str]:
    """Return a sweep's verdict on a setting in Markdown: below a table of it and its baseline, and alone."""
    is_chosen = report.num_settings > len(report.rows) - 1
    tried = f"all that its sweep tried ({report.num_settings} settings)" if is_chosen else tried_settings(report)
    verdict = f"{describe_verdict(row)}, corrected for {tried}"
    headline = markdown(f"{describe_difference(row)} against the baseline. {report.title}: {verdict}.")
    rows = [row, *([report.baseline] if report.baseline else [])]
    return "\n".join([*markdown_table(rows, MLFLOW_NOTE), "", f"**{headline}**", ""]), headline


def latex_report(report: Report, layout: str = "full") -> str:
    """Write a LaTeX table with booktabs; the caption holds the answer and the notes."""
    caption = " ".join([*answer(report), *(f"{line}." for line in protocol_lines(report)), *notes_of(report)])
    lines = [r"% \usepackage{booktabs}", r"\begin{table}", rf"\caption{{{latex(caption)}}}"]
    lines += [*latex_table(_sort_rows(report, layout), LAYOUTS[layout]), r"\end{table}", ""]
    if report.slices:
        lines += [r"\begin{table}", r"\caption{By slice}", *latex_table(report.slices, SLICES), r"\end{table}", ""]
    return "\n".join(lines)


def csv_report(report: Report) -> str:
    """Write every row with plain numbers (shares, seconds, percentage points), empty if missing."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV)
    for row in (*report.rows, *report.slices):
        writer.writerow([to_csv_value(column.value(row)) for column in CSV.values()])
    return stream.getvalue()

"""The comparison of a single trial with its baseline, as a sentence, a table and metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from distilbench.cli import pluralize
from distilbench.report import words
from distilbench.report.columns import CSV, markdown_table
from distilbench.report.comparison import compare_with_baseline
from distilbench.report.formats import interval, markdown, p_value, points
from distilbench.report.names import name_of, varying_values
from distilbench.report.rows import Row, row_from
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.slices import NOTE as SLICES_NOTE
from distilbench.report.slices import rows_by_slice
from distilbench.results import StoredTrial, Verdict

COLUMNS = (
    replace(CSV["setting"], title=" "),
    *(CSV[key] for key in ("accuracy", "difference_points", "loss", "train_flops", "train_seconds")),
)

METRICS = ("difference_points", "difference_low_points", "difference_high_points", "p", "loses_at_most_points",
           "p_margin", "time_gain_percent", "flops_gain_percent")  # fmt: skip
"""Columns that are MLflow's metrics of a comparison; ``p`` is ``mcnemar_p`` there."""


@dataclass(frozen=True)
class Comparison:
    """A trial and its baseline as rows, with the floor, the accuracy of always predicting the most frequent label.

    ``slices`` are the rows on parts of the examples; ``margin`` is in percentage points.
    """

    row: Row
    baseline: Row
    majority: float | None
    margin: float
    slices: tuple[Row, ...] = ()


def compare(
    trial: StoredTrial, baseline: StoredTrial, margin: float, selected_on_report_split: bool = False
) -> Comparison:
    """Compare two finished trials of one protocol; its other arguments are those of :func:`compare_with_baseline`."""
    rows = [replace(row_from([replace(baseline, url="")]), label="baseline", is_baseline=True),
            replace(row_from([replace(trial, url="")]), label="this trial")]  # fmt: skip
    (base, row), majority = compare_with_baseline(rows, 0, margin, selected_on_report_split=selected_on_report_split)
    return Comparison(row, base, majority, margin, rows_by_slice([base, row], margin, 1))


def sentence(comparison: Comparison) -> str:
    """State the outcome of the comparison and its limits in a few short sentences."""
    trial, base, found = comparison.row.trials[0], comparison.baseline.trials[0], comparison.row.difference
    if trial.run_id and trial.run_id == base.run_id:
        return "This trial is the baseline."
    if found is None:
        size = points(comparison.row.points)
        return f"{size} points against the baseline, not tested: {words.reason_untested(comparison.row)}."
    on_these, margin = f"on these {comparison.row.examples:,} examples", pluralize(comparison.margin, "point")
    idle = "".join(
        f"The {name} has not learned: {words.describe_above_majority(row.accuracy, comparison.majority)}. "
        for name, row in (("baseline", comparison.baseline), ("trial", comparison.row))
        if row.has_learned is False and comparison.majority
    )
    if comparison.row.verdict is None:
        size = points(found.points)
        return f"{idle}Not judged {on_these}: {size} points against the baseline. {_scope(trial, base)}"
    outcome = {
        Verdict.BETTER: f"Better than the baseline {on_these}.",
        Verdict.AHEAD: f"Ahead of the baseline {on_these}, to be confirmed: the split that reports also picks.",
        Verdict.GOOD_ENOUGH: f"Good enough {on_these}: it {words.describe_loss(found)}, less than {margin}.",
        Verdict.WORSE: f"Worse than the baseline {on_these}.",
        Verdict.UNDECIDED: f"Undecided {on_these}: it may lose up to {found.loses_at_most:.2f} points, "
        f"and the margin is {margin}; "
        f"{words.what_decides(found.needed, comparison.row.examples)}.",
    }[comparison.row.verdict]
    return f"{idle}{outcome} {_scope(trial, base)}"


def _scope(trial: StoredTrial, baseline: StoredTrial) -> str:
    """State the scope of a comparison of two single trials."""
    same_seed = trial.seed == baseline.seed
    if trial.treatment == baseline.treatment:
        if same_seed:
            return "Settings and seed are the baseline's: this repeats it."
        return (
            f"Only the seed differs ({trial.seed}, baseline {baseline.seed}): this shows how much a seed alone changes."
        )
    seeds = f"One seed each ({trial.seed})" if same_seed else f"One seed each ({trial.seed}, baseline {baseline.seed})"
    swept = "; the sweep's report corrects for all that was tried" if trial.number else ""
    return f"{seeds}: this compares two trained models, not yet their settings{swept}."


def comparison_markdown(comparison: Comparison) -> str:
    """Write the comparison in Markdown: table, outcome, notes, what differs, and slices."""
    both = comparison.row, comparison.baseline
    ours, theirs = map(name_of, varying_values([row.treatment for row in both], [row.choices for row in both]))
    names = f"This trial: {markdown(ours)}. Baseline: {markdown(theirs)}." if ours else ""
    notes = " ".join(f"{note}." for note in notes_of(comparison))
    slices = [*markdown_table(comparison.slices, SLICES), "", SLICES_NOTE, ""] if comparison.slices else []
    lines = [f"**{sentence(comparison)}**", "", notes, "", names, ""]
    return "\n".join([*markdown_table([comparison.row, comparison.baseline], COLUMNS), "", *lines, *slices])


def comparison_headline(comparison: Comparison) -> str:
    """Return a line or two of Markdown with the difference from the baseline and the outcome."""
    if comparison.baseline.has_learned is False:  # the sentence itself begins with this and has the points
        return markdown(sentence(comparison))
    return markdown(f"{words.describe_difference(comparison.row)} against the baseline. {sentence(comparison)}")


def comparison_metrics(comparison: Comparison) -> dict[str, float]:
    """Return the available figures of the comparison, by MLflow metric name."""
    found = {"mcnemar_p" if key == "p" else key: CSV[key].value(comparison.row) for key in METRICS}
    if comparison.row.is_saving_estimate:
        del found["time_gain_percent"]
    return {name: float(value) for name, value in found.items() if value is not None and value == value}


def notes_of(comparison: Comparison) -> Iterator[str]:
    """Yield notes on the comparison: interval and p, and why times are not compared."""
    found = comparison.row.difference
    if found is not None:
        yield f"95 % interval {interval(found.low, found.high)} points, exact McNemar p {p_value(found.p)}"
    if comparison.row.time_note:
        yield f"Times not compared: {comparison.row.time_note}"

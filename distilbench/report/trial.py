"""A trial beside its baseline, and the summary of a trial: what people read at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.cli import counted
from distilbench.identity import SourceUsed
from distilbench.report.columns import CSV, markdown_table, rich_table
from distilbench.report.comparison import floor_of, has_learned, judge
from distilbench.report.formats import (
    duration,
    interval,
    markdown,
    memory,
    p_value,
    percent,
    points,
)
from distilbench.report.rows import Row, Untested, row_from
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.slices import NOTE as SLICES_NOTE
from distilbench.report.slices import by_slice, rows_by_slice
from distilbench.report.words import above_floor, loss_of, size_of
from distilbench.results import Evaluation, Predictions, Status, StoredTrial, TrialResult, Verdict
from distilbench.settings import SchedulerSettings, SettingsError, TrialSettings

_WIDTH = 100
"""Columns of text that a summary takes at most, where the terminal is wider."""
_MOST_LABELS = 8
"""Labels whose examples a summary counts."""
_COLUMNS = (
    replace(CSV["setting"], title=" "),
    *(CSV[key] for key in ("accuracy", "difference_points", "loss", "train_flops", "train_seconds")),
)


@dataclass(frozen=True)
class Comparison:
    """A trial beside its baseline: a report of two rows, the accuracy of the most frequent label alone, the margin.

    ``slices`` are the rows on parts of the examples.
    """

    row: Row
    baseline: Row
    floor: float | None
    margin: float
    slices: tuple[Row, ...] = ()


def compare(trial: StoredTrial, baseline: StoredTrial, margin: float, picked_here: bool = False) -> Comparison:
    """Compare two finished trials, with a margin in points; ``picked_here`` as in :func:`judge`.

    Raises :class:`SettingsError` for trials of two protocols, or with predictions of other examples.
    """
    if trial.protocol_id != baseline.protocol_id:
        raise SettingsError(
            f"trials to compare must be of one protocol, got {trial.protocol_id} ({trial.name}) and "
            f"{baseline.protocol_id} ({baseline.name}); train a baseline with this trial's model, data and metric"
        )
    rows = [replace(row_from([replace(baseline, url="")]), label="baseline", is_baseline=True),
            replace(row_from([replace(trial, url="")]), label="this trial")]  # fmt: skip
    read = attrgetter("predictions")
    (base, row), floor = judge(rows, 0, read, margin, picked_here=picked_here)
    if row.untested is Untested.EXAMPLES:
        raise SettingsError(
            f"predictions to compare must be of the same examples, got others in {trial.name} than in "
            f"{baseline.name}; train the baseline again"
        )
    return Comparison(row, base, floor, margin, rows_by_slice([base, row], read, margin))


def sentence(comparison: Comparison) -> str:
    """Say what may be claimed of a trial, and what may not, in a few short sentences."""
    trial, base, found = comparison.row.trials[0], comparison.baseline.trials[0], comparison.row.difference
    if trial.run_id and trial.run_id == base.run_id:
        return "This trial is the baseline."
    if found is None:
        size = points(comparison.row.points or 0.0)
        return f"{size} points against the baseline, not tested: predictions of the examples are missing."
    on_these, margin = f"on these {found.examples:,} examples", counted(comparison.margin, "point")
    idle = "".join(
        f"The {name} has not learned: {above_floor(row.accuracy, comparison.floor)}. "
        for name, row in (("baseline", comparison.baseline), ("trial", comparison.row))
        if row.has_learned is False and comparison.floor
    )
    if comparison.row.verdict is None:
        return f"{idle}Not judged {on_these}: {points(found.points)} points against the baseline."
    outcome = {
        Verdict.BETTER: f"Better than the baseline {on_these}.",
        Verdict.AHEAD: f"Ahead of the baseline {on_these}, to be confirmed: the split that reports also picks.",
        Verdict.GOOD_ENOUGH: f"Good enough {on_these}: it {loss_of(found)}, less than {margin}.",
        Verdict.WORSE: f"Worse than the baseline {on_these}.",
        Verdict.UNDECIDED: f"Undecided {on_these}: it {loss_of(found)}, and {margin} would do.",
    }[comparison.row.verdict]
    return f"{idle}{outcome} {_scope(trial, base)}"


def _scope(trial: StoredTrial, baseline: StoredTrial) -> str:
    """Return what one seed each can speak of."""
    same_seed = trial.seed == baseline.seed
    if trial.treatment == baseline.treatment:
        if same_seed:
            return "Settings and seed are the baseline's: this repeats it."
        return f"Only the seed differs ({trial.seed}, baseline {baseline.seed}): this shows what a seed can do."
    seeds = f"One seed each ({trial.seed})" if same_seed else f"One seed each ({trial.seed}, baseline {baseline.seed})"
    swept = "; the sweep's report corrects for all that was tried" if trial.number else ""
    return f"{seeds}: this speaks of two trained models, not yet of their settings{swept}."


def comparison_markdown(comparison: Comparison) -> str:
    """Write the table of both, what may be claimed, and the notes as Markdown; names are escaped."""
    ours, theirs = (markdown(row.trials[0].name) for row in (comparison.row, comparison.baseline))
    names = f"This trial: {ours}. Baseline: {theirs}."
    notes = " ".join(f"{note}." for note in _notes(comparison))
    slices = [*markdown_table(comparison.slices, SLICES), "", SLICES_NOTE, ""] if comparison.slices else []
    told = [f"**{sentence(comparison)}**", "", notes, "", names, ""]
    return "\n".join([*markdown_table([comparison.row, comparison.baseline], _COLUMNS), "", *told, *slices])


def comparison_headline(comparison: Comparison) -> str:
    """Say in a line or two, as Markdown, how far a trial is from its baseline, and what may be claimed."""
    return markdown(f"{size_of(comparison.row)} against the baseline. {sentence(comparison)}")


def comparison_metrics(comparison: Comparison) -> dict[str, float]:
    """Return the comparison's figures by the names that MLflow has, those that there are."""
    row, found = comparison.row, comparison.row.difference
    measured = not (row.cost.is_estimate or comparison.baseline.cost.is_estimate)
    figures = {
        "difference_points": row.points,
        "time_gain_percent": row.saving.seconds if measured else None,
        "flops_gain_percent": row.saving.flops,
    }
    if found is not None:
        figures |= {
            "difference_low_points": found.low,
            "difference_high_points": found.high,
            "mcnemar_p": found.p,
            "loses_at_most_points": found.loses_at_most,
            "p_margin": found.p_loss,
        }
    return {name: value for name, value in figures.items() if value is not None}


def _notes(comparison: Comparison) -> Iterator[str]:
    found = comparison.row.difference
    if found is not None:
        yield f"95 % interval {interval(found.low, found.high)} points, exact McNemar p {p_value(found.p)}"
    if comparison.row.saving.time_note:
        yield f"Times not compared: {comparison.row.saving.time_note}"


@dataclass(frozen=True)
class Summary:
    """What is shown at a trial's end.

    ``settings`` are those trained with, ``labels`` examples by split and label, ``dropped`` examples left out by
    reason, ``shared`` those reported on whose text stands in train too.
    ``baseline_command`` makes the baseline that is missing; both it and ``comparison`` are None for a baseline.
    """

    name: str
    settings: TrialSettings
    model: SourceUsed
    data: SourceUsed
    labels: Mapping[str, Mapping[str, int]]
    dropped: Mapping[str, int]
    shared: int
    result: TrialResult
    predictions: Predictions | None = None
    comparison: Comparison | None = None
    baseline_command: str | None = None
    run_url: str | None = None
    ui_command: str | None = None
    output_dir: str | None = None


def print_summary(console: Console, summary: Summary) -> None:
    """Print what was trained, on what, with what result, and how it compares; readable without a terminal too."""
    width = min(console.width, _WIDTH)
    console.print()
    console.print(_heading(summary), width=width)
    console.print(_facts(summary), width=width)
    for line in _comparison_lines(summary, width):
        console.print(line, width=width)
    lines = {"baseline": summary.baseline_command, "output": summary.output_dir, "first": summary.ui_command,
             "runs": summary.run_url}  # fmt: skip
    for label, text in lines.items():
        if text:  # never wrapped, so that it can be clicked or copied
            console.print(Text.assemble((f"{label:<10}", "dim"), text), soft_wrap=True)


def _heading(summary: Summary) -> Text:
    status = summary.result.status
    style = "bold green" if status is Status.FINISHED else "bold red"
    heading = Text.assemble((summary.name, "bold"), "  ", (status.value, style))
    stand_ins = [source for source in (summary.model, summary.data) if source.fallback_for]
    if stand_ins:
        asked = " and ".join(str(source.fallback_for) for source in stand_ins)
        warning = f"FALLBACK: {asked} could not be reached; these figures come from stand-ins."
        heading.append(f"\n{warning}", "bold yellow")
    return heading


def _facts(summary: Summary) -> Table:
    """Two columns, label and text, without lines."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=7)
    grid.add_column(overflow="fold")
    for label, told in _fact_texts(summary):
        text = Text(told)
        text.highlight_words(["FALLBACK"], "bold black on yellow")
        grid.add_row(label, text)
    return grid


def _label_counts(labels: Mapping[str, Mapping[str, int]]) -> str:
    """Each label with its examples in every split, such as ``no 512 / 430, yes 488 / 442 (train / validation)``."""
    names = list(next(iter(labels.values())))
    each = (f"{name} " + " / ".join(f"{counts[name]:,}" for counts in labels.values()) for name in names[:_MOST_LABELS])
    more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    return f"{', '.join(each)}{more} ({' / '.join(labels)})"


def _fact_texts(summary: Summary) -> Iterator[tuple[str, str]]:
    settings, result = summary.settings, summary.result
    train, optim = settings.train, settings.optim
    sizes = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in summary.labels.items())
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary.dropped.items() if count)
    yield "model", summary.model.describe()
    yield "data", summary.data.describe()
    yield "examples", sizes + (f"; left out: {dropped}" if dropped else "")
    yield "labels", _label_counts(summary.labels)
    if summary.shared:
        yield "in both", f"{counted(summary.shared, 'text')} of train, among those reported on"
    trained, total = result.trainable_parameters / 1e6, result.total_parameters / 1e6
    share = f"; {trained:.1f} M of {total:.1f} M parameters trained" if total else ""
    yield "frozen", frozen_part(settings) + share
    rates = f"{optim.name}, lr {optim.lr:g}, weight decay {optim.weight_decay:g}"
    yield "schedule", f"{_schedule(settings.scheduler)}, {rates}"
    precision = result.precision or train.precision
    parts = f" ({result.micro_batch_size} at once)" if result.micro_batch_size else ""
    seen = result.history[-1].epoch if train.patience and result.history else train.epochs
    ended = f", ended after {seen:g} by patience" if seen < train.epochs else ""
    yield (
        "training",
        f"{counted(train.epochs, 'epoch')}{ended}, batch {train.batch_size}{parts}, cut at {train.max_length} tokens, "
        f"{precision}, seed {settings.seed}, engine {settings.engine.name}",
    )
    if result.report is not None:
        yield "result", _result(result, result.report)
        if summary.predictions is not None:
            yield "floor", _floor(summary.predictions, settings.seed)
            if slices := by_slice(summary.predictions):
                yield "slices", slices
        yield "time", _time(result)
    if result.error:
        yield "error", result.error


_FROZEN_BY = {
    "head": "all but the head",
    "bias": "all but biases and the head",
    "gradual": "all but the head at first, then a layer less from the top after each evaluation",
    "scheduled": "nothing at first, then more from the bottom after each evaluation",
    "auto": "nothing at first, then from the bottom what the gradients leave",
}


def frozen_part(settings: TrialSettings) -> str:
    """Return what stays as it was, in words: ``nothing``, ``embeddings and layers 0-2``."""
    freeze, adapter = settings.freeze, settings.adapter
    if adapter.name != "none":
        return f"all but {adapter.name}{f' of rank {adapter.rank}' if adapter.rank else ''} and the head"
    if freeze.policy != "depth":
        return _FROZEN_BY[freeze.policy]
    layers = {0: "", 1: "layer 0"}.get(freeze.layers, f"layers 0-{freeze.layers - 1}")
    parts = [part for part in ("embeddings" if freeze.freezes_embeddings else "", layers) if part]
    return " and ".join(parts) + ("" if freeze.dropout else ", without dropout") if parts else "nothing"


def _schedule(scheduler: SchedulerSettings) -> str:
    if scheduler.warmup_steps:
        return f"{scheduler.name} after {counted(scheduler.warmup_steps, 'warm-up step')}"
    return scheduler.name + (f" after warm-up ratio {scheduler.warmup_ratio:g}" if scheduler.warmup_ratio else "")


def _result(result: TrialResult, report: Evaluation) -> str:
    figures = f"accuracy {percent(report.accuracy)}, loss {report.loss:.4f}, F1 {report.f1:.4f}, MCC {report.mcc:.4f}"
    picked = "which also picked the epoch" if result.selection is report else "which did not pick the epoch"
    return f"{figures}\nepoch {report.epoch:g}, on the split {report.split}, {picked}"


def _floor(predictions: Predictions, seed: int) -> str:
    """Return the accuracy of the most frequent label alone, and whether the trial is shown to be above it."""
    learned = "above it" if has_learned({seed: predictions}) else "not shown to be above it: this trial HAS NOT LEARNED"
    return f"{percent(floor_of(predictions.labels))} by the most frequent label alone; {learned}"


def _time(result: TrialResult) -> str:
    peak = f", peak memory {memory(result.peak_memory_bytes)}" if result.peak_memory_bytes else ""
    return (
        f"{duration(result.train_seconds)} training, {duration(result.setup_seconds)} set-up on {result.device}\n"
        f"{result.examples_per_second:,.0f} examples/s, {result.tokens_per_second:,.0f} tokens/s{peak}"
    )


def trial_line(name: str, result: TrialResult, comparison: Comparison | None) -> str:
    """Tell a trial of a batch on one line: how it ended, figures, difference to its baseline, time."""
    parts = [f"{name} {result.status}"]
    if result.report is not None:
        parts.append(f"accuracy {percent(result.report.accuracy)}, loss {result.report.loss:.4f}")
    base = comparison.baseline.trials[0] if comparison else None
    if comparison and base and comparison.row.trials[0].run_id != base.run_id:
        found = comparison.row.difference
        test = f" (McNemar p {p_value(found.p)})" if found else ""
        parts.append(f"{points(comparison.row.points or 0.0)} points against {base.name}{test}")
    if result.error is not None:
        parts.append(result.error)
    return "; ".join([*parts, _batch_time(result)])


def _batch_time(result: TrialResult) -> str:
    if result.alone:
        return f"{duration(result.train_seconds)} training"
    estimate = result.solo_seconds_estimate
    solo = f", one alone about {duration(estimate)} (estimate)" if estimate is not None else ""
    others = counted(result.num_trials_in_batch - 1, "other")
    return f"{duration(result.train_seconds)} training at once with {others}{solo}"


def _comparison_lines(summary: Summary, width: int) -> Iterator[Table | Text]:
    comparison = summary.comparison
    if comparison is not None:
        yield rich_table([comparison.row, comparison.baseline], _COLUMNS, width)
        yield Text(sentence(comparison), "bold")
        yield from (Text(f"{note}.") for note in _notes(comparison))
        if comparison.slices:
            yield rich_table(comparison.slices, SLICES, width)
            yield Text(SLICES_NOTE)
    elif summary.baseline_command:
        yield Text(
            "\nNot compared: there is no finished baseline of this protocol yet. The next line trains one.", "bold"
        )
    elif summary.result.report is not None:
        yield Text("\nThis is a baseline: what other trials of its protocol are compared with.", "bold")
    yield Text()

"""The summary printed at a trial's end: what was trained, on which data, with what result, and how it compares."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.cli import pluralize
from distilbench.report.columns import rich_table
from distilbench.report.comparison import has_learned, majority_accuracy
from distilbench.report.formats import duration, memory, millions, percent
from distilbench.report.slices import COLUMNS as SLICES
from distilbench.report.slices import NOTE as SLICES_NOTE
from distilbench.report.trial import COLUMNS, notes_of, sentence
from distilbench.results import Evaluation, Predictions, Status, TrialResult
from distilbench.settings import SchedulerSettings, TrialSettings
from distilbench.trials.prepared import prepared_trial
from distilbench.trials.run import Trial

_WIDTH = 100
"""Maximum width of a summary, in characters."""
_MOST_LABELS = 8
"""Maximum number of labels whose examples are counted."""


def print_outcome(trial: Trial, console: Console | None = None) -> None:
    """Print the summary of one trial; also readable without a terminal."""
    console, job, store = console or Console(), trial.job, trial.store
    width = min(console.width, _WIDTH)
    console.print()
    console.print(_heading(trial), width=width)
    console.print(_facts(trial), width=width)
    for line in _comparison_lines(trial, width):
        console.print(line, width=width)
    lines = {
        "baseline": None if job.is_baseline or trial.comparison else job.baseline_command(),
        "output": trial.settings.output.dir,
        "start": store.address.ui_command if store else None,
        "open": store.runs_url() if store else None,
    }
    for label, text in lines.items():
        if text:  # never wrapped, so that it can be clicked or copied
            console.print(Text.assemble((f"{label:<10}", "dim"), text), soft_wrap=True)


def _heading(trial: Trial) -> Text:
    status = trial.result.status
    heading = Text.assemble(
        (trial.name, "bold"), "  ", (status.value, "bold green" if status is Status.FINISHED else "bold red")
    )
    used = (trial.prepared.model.used, trial.prepared.text.used)
    if asked := " and ".join(source.fallback_for for source in used if source.fallback_for):
        warning = f"FALLBACK: {asked} could not be reached; these figures come from stand-ins."
        heading.append(f"\n{warning}", "bold yellow")
    return heading


def _facts(trial: Trial) -> Table:
    """Return two columns, label and text, without borders."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="dim", no_wrap=True, min_width=7)
    grid.add_column(overflow="fold")
    for label, told in _fact_texts(trial):
        text = Text(told)
        text.highlight_words(["FALLBACK"], "bold black on yellow")
        grid.add_row(label, text)
    return grid


def _fact_texts(trial: Trial) -> Iterator[tuple[str, str]]:
    settings, result = prepared_trial(trial.settings, trial.prepared), trial.result
    yield "model", trial.prepared.model.used.describe()
    yield from _facts_of_text(trial)
    trained, total = millions(result.trainable_parameters), millions(result.total_parameters)
    share = f"; {trained} of {total} parameters trained" if result.total_parameters else ""
    yield "frozen", frozen_part(settings) + share
    optim = settings.optim
    rates = f"{optim.name}, lr {optim.lr:g}, weight decay {optim.weight_decay:g}"
    yield "schedule", f"{_schedule(settings.scheduler)}, {rates}"
    yield "training", _training(settings, result)
    if result.report is not None:
        yield "result", _result(result, result.report)
        if trial.predictions is not None:
            yield "floor", _floor(trial.predictions, settings.seed)
        yield "time", _time(result)
    if result.error:
        yield "error", result.error


def _facts_of_text(trial: Trial) -> Iterator[tuple[str, str]]:
    text = trial.prepared.text
    used = {"train": text.train, "validation": text.report}
    if text.selection is not text.report:
        used["selection"] = text.selection
    labels = {name: text.label_counts(split) for name, split in used.items()}
    sizes = ", ".join(f"{split} {sum(counts.values()):,}" for split, counts in labels.items())
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in text.dropped.items() if count)
    yield "data", text.used.describe()
    yield "examples", sizes + (f"; left out: {dropped}" if dropped else "")
    names = list(labels["train"])
    each = [f"{name} " + " / ".join(f"{counts[name]:,}" for counts in labels.values()) for name in names[:_MOST_LABELS]]
    more = f" and {len(names) - _MOST_LABELS} more" if len(names) > _MOST_LABELS else ""
    yield "labels", f"{', '.join(each)}{more} ({' / '.join(labels)})"
    if text.shared:
        yield "in both", f"{pluralize(text.shared, 'text')} of train, among those reported on"


def _training(settings: TrialSettings, result: TrialResult) -> str:
    train = settings.train
    parts = f" ({result.micro_batch_size} at once)" if result.micro_batch_size else ""
    seen = result.history[-1].epoch if train.patience and result.history else train.epochs
    ended = f", ended after {seen:g} by patience" if seen < train.epochs else ""
    return (
        f"{pluralize(train.epochs, 'epoch')}{ended}, batch {train.batch_size}{parts}, cut at {train.max_length} "
        f"tokens, {result.precision or train.precision}, seed {settings.seed}, engine {settings.engine.name}"
    )


_FROZEN_BY = {
    "head": "all but the head",
    "bias": "all but biases and the head",
    "gradual": "all but the head at first, then a layer less from the top after each evaluation",
    "scheduled": "nothing at first, then more from the bottom after each evaluation",
    "auto": "nothing at first, then from the bottom what the gradients leave",
}


def frozen_part(settings: TrialSettings) -> str:
    """Return what is frozen, in words: ``nothing``, ``embeddings and layers 0-2``."""
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
        return f"{scheduler.name} after {pluralize(scheduler.warmup_steps, 'warm-up step')}"
    return scheduler.name + (f" after warm-up ratio {scheduler.warmup_ratio:g}" if scheduler.warmup_ratio else "")


def _result(result: TrialResult, report: Evaluation) -> str:
    figures = f"accuracy {percent(report.accuracy)}, loss {report.loss:.4f}, F1 {report.f1:.4f}, MCC {report.mcc:.4f}"
    picked = "which also picked the epoch" if result.selection is report else "which did not pick the epoch"
    return f"{figures}\nepoch {report.epoch:g}, on the split {report.split}, {picked}"


def _floor(predictions: Predictions, seed: int) -> str:
    """Return the accuracy of always predicting the most frequent label, and whether the trial is shown to beat it."""
    learned = (
        "this trial is above it"
        if has_learned({seed: predictions})
        else "this trial is not shown to be above it: it HAS NOT LEARNED"
    )
    return f"{percent(majority_accuracy(predictions.labels))} for always predicting the most frequent label; {learned}"


def _time(result: TrialResult) -> str:
    peak = f", peak memory {memory(result.peak_memory_bytes)}" if result.peak_memory_bytes else ""
    return (
        f"{duration(result.train_seconds)} training, {duration(result.setup_seconds)} set-up on {result.device}\n"
        f"{result.examples_per_second:,.0f} examples/s, {result.tokens_per_second:,.0f} tokens/s{peak}"
    )


def _comparison_lines(trial: Trial, width: int) -> Iterator[Table | Text]:
    comparison = trial.comparison
    if comparison is not None:
        yield rich_table([comparison.row, comparison.baseline], COLUMNS, width)
        yield Text(sentence(comparison), "bold")
        yield from (Text(f"{note}.") for note in notes_of(comparison))
        if comparison.slices:
            yield rich_table(comparison.slices, SLICES, width)
            yield Text(SLICES_NOTE)
    elif not trial.job.is_baseline:
        told = "Not compared: there is no finished baseline of this protocol yet. The next line trains one."
        yield Text(f"\n{told}", "bold")
    elif trial.result.report is not None:
        yield Text("\nThis is a baseline: other trials of its protocol are compared with it.", "bold")
    yield Text()

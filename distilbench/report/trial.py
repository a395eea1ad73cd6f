"""A trial against its baseline, and the summary of a trial: what people read. Sees settings and results only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from distilbench.identity import SourceUsed
from distilbench.report.formats import (
    counted,
    duration,
    markdown,
    markdown_row,
    p_value,
    percent,
    points,
    signed,
    time_gain,
)
from distilbench.report.statistics import discordant, mcnemar_exact, paired_accuracy_interval, verdict
from distilbench.results import Evaluation, Status, StoredTrial, TrialResult
from distilbench.settings import FreezeSettings, SchedulerSettings, SettingsError, TrialSettings

_WIDTH = 100
"""Columns that a summary takes at most, where the terminal is wider."""


@dataclass(frozen=True)
class PairedTest:
    """Two trials on the same ``examples``: the 95 % interval in points, and what the exact McNemar test counts.

    ``only_trial`` and ``only_baseline`` are the examples that one classified correctly and the other did not.
    """

    low_points: float
    high_points: float
    p: float
    only_trial: int
    only_baseline: int
    examples: int


@dataclass(frozen=True)
class Comparison:
    """A trial beside its baseline: differences are trial - baseline, points are per cent of accuracy.

    ``test`` is None without per-example predictions. ``time_gain_percent`` is the share of the baseline's training
    time saved (negative: more time taken), None where times cannot be compared, for the reason in ``time_note``.
    ``sentence`` says what may be claimed.
    """

    trial: StoredTrial
    baseline: StoredTrial
    difference_points: float
    difference_loss: float
    test: PairedTest | None
    time_gain_percent: float | None
    time_note: str
    sentence: str


def compare(trial: StoredTrial, baseline: StoredTrial) -> Comparison:
    """Compare one trial with its baseline; raises :class:`SettingsError` where they are of different protocols."""
    if trial.protocol_id != baseline.protocol_id:
        raise SettingsError(
            f"trials to compare must be of one protocol, got {trial.protocol_id} ({trial.name}) and "
            f"{baseline.protocol_id} ({baseline.name}); train a baseline with this trial's model, data and metric"
        )
    test = _paired_test(trial, baseline)
    gain, reason = time_saved([trial], [baseline])
    difference = 100 * (trial.accuracy - baseline.accuracy)
    return Comparison(
        trial=trial,
        baseline=baseline,
        difference_points=difference,
        difference_loss=trial.loss - baseline.loss,
        test=test,
        time_gain_percent=gain,
        time_note=f"times not compared: {reason}" if reason else "",
        sentence=_sentence(trial, baseline, difference, test),
    )


def _paired_test(trial: StoredTrial, baseline: StoredTrial) -> PairedTest | None:
    if trial.predictions is None or baseline.predictions is None:
        return None
    ours, theirs = trial.predictions, baseline.predictions
    if ours.labels.tolist() != theirs.labels.tolist():
        raise SettingsError(
            f"predictions to compare must be of the same examples, got {len(ours.labels)} ({trial.name}) and "
            f"{len(theirs.labels)} ({baseline.name}) that do not match; train the baseline again"
        )
    examples = len(ours.labels)
    only_trial, only_baseline = discordant(ours.correct, theirs.correct)
    _, low, high = paired_accuracy_interval(only_trial, only_baseline, examples)
    p = mcnemar_exact(only_trial, only_baseline)
    return PairedTest(100 * low, 100 * high, p, only_trial, only_baseline, examples)


def time_saved(trials: Sequence[StoredTrial], baselines: Sequence[StoredTrial]) -> tuple[float | None, str]:
    """Per cent of the baselines' mean training time that the trials' mean saves, or None and why it is not stated."""
    everyone = (*trials, *baselines)
    if not trials or not baselines:
        return None, "none recorded"
    if not all(trial.alone for trial in everyone):
        return None, "trained in a batch with other trials"
    if len({trial.measured_on for trial in everyone}) > 1:
        return None, "measured on different devices, engines, precisions or library versions"
    if not all(trial.train_seconds > 0 for trial in everyone):
        return None, "none recorded"
    ours, theirs = (sum(trial.train_seconds for trial in side) / len(side) for side in (trials, baselines))
    return 100 * (1 - ours / theirs), ""


def _sentence(trial: StoredTrial, baseline: StoredTrial, difference: float, test: PairedTest | None) -> str:
    """What may be claimed, and what may not, in a few short sentences."""
    if trial.run_id and trial.run_id == baseline.run_id:
        return "This trial is the baseline."
    if test is None:
        return f"{points(difference)} points against the baseline, not tested: predictions of the examples are missing."
    word = verdict(test.low_points, test.high_points, test.p, n=1)
    outcome = {
        "better": f"Better than the baseline on these {test.examples:,} examples.",
        "worse": f"Worse than the baseline on these {test.examples:,} examples.",
    }.get(word, f"{word[0].upper()}{word[1:]}: one example of {test.examples:,} is {100 / test.examples:.2f} points.")
    return f"{outcome} {_scope(trial, baseline)}"


def _scope(trial: StoredTrial, baseline: StoredTrial) -> str:
    """What one seed each can speak of."""
    same_seed = trial.seed == baseline.seed
    if trial.treatment == baseline.treatment:
        if same_seed:
            return "Settings and seed are the baseline's: this repeats it."
        return f"Only the seed differs ({trial.seed}, baseline {baseline.seed}): this shows what a seed can do."
    seeds = f"One seed each ({trial.seed})" if same_seed else f"One seed each ({trial.seed}, baseline {baseline.seed})"
    return f"{seeds}: this speaks of two trained models, not yet of their settings."


@dataclass(frozen=True)
class Summary:
    """What is shown at a trial's end.

    ``settings`` are those trained with, ``sizes`` examples by split, ``dropped`` examples left out by reason.
    ``baseline_command`` makes the baseline that is missing; both it and ``comparison`` are None for a baseline.
    """

    name: str
    settings: TrialSettings
    model: SourceUsed
    data: SourceUsed
    sizes: Mapping[str, int]
    dropped: Mapping[str, int]
    result: TrialResult
    comparison: Comparison | None = None
    baseline_command: str | None = None
    run_url: str | None = None
    output_dir: str | None = None


def print_summary(console: Console, summary: Summary) -> None:
    """Print what was trained, on what, with what result, and how it compares; readable without a terminal too."""
    width = min(console.width, _WIDTH)
    console.print()
    console.print(_heading(summary), width=width)
    console.print(_facts(summary), width=width)
    for line in _comparison_lines(summary):
        console.print(line, width=width)
    places = {"baseline": summary.baseline_command, "runs": summary.run_url, "output": summary.output_dir}
    for label, place in places.items():
        if place:  # never wrapped, so that it can be clicked or copied
            console.print(Text.assemble((f"{label:<10}", "dim"), place), soft_wrap=True)


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
    grid.add_row("model", _source(summary.model))
    grid.add_row("data", _source(summary.data))
    for label, text in _fact_texts(summary):
        grid.add_row(label, Text(text))
    return grid


def _source(source: SourceUsed) -> Text:
    text = Text(source.describe())
    text.highlight_words(["FALLBACK"], "bold black on yellow")
    return text


def _fact_texts(summary: Summary) -> Iterator[tuple[str, str]]:
    settings, result = summary.settings, summary.result
    train, optim = settings.train, settings.optim
    sizes = ", ".join(f"{split} {count:,}" for split, count in summary.sizes.items())
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in summary.dropped.items() if count)
    yield "examples", sizes + (f"; left out: {dropped}" if dropped else "")
    trained, total = result.trainable_parameters / 1e6, result.total_parameters / 1e6
    share = f"; {trained:.1f} M of {total:.1f} M parameters trained" if total else ""
    yield "frozen", frozen_part(settings.freeze) + share
    rates = f"{optim.name}, lr {optim.lr:g}, weight decay {optim.weight_decay:g}"
    yield "schedule", f"{_schedule(settings.scheduler)}, {rates}"
    precision = result.precision or train.precision
    parts = f" ({result.micro_batch_size} at once)" if result.micro_batch_size else ""
    yield (
        "training",
        f"{counted(train.epochs, 'epoch')}, batch {train.batch_size}{parts}, cut at {train.max_length} tokens, "
        f"{precision}, seed {settings.seed}, engine {settings.engine.name}",
    )
    if result.report is not None:
        yield "result", _result(result, result.report)
        yield "time", _time(result)
    if result.error:
        yield "error", result.error


def frozen_part(freeze: FreezeSettings) -> str:
    """What stays as it was, in words: ``nothing``, ``embeddings and layers 0-2``."""
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


def _time(result: TrialResult) -> str:
    memory = f", peak memory {result.peak_memory_bytes / 2**30:.1f} GiB" if result.peak_memory_bytes else ""
    return (
        f"{duration(result.train_seconds)} training, {duration(result.setup_seconds)} set-up on {result.device}\n"
        f"{result.examples_per_second:,.0f} examples/s, {result.tokens_per_second:,.0f} tokens/s{memory}"
    )


def trial_line(name: str, result: TrialResult, comparison: Comparison | None) -> str:
    """A trial of a batch on one line: how it ended, its figures, the difference to its baseline, and its time."""
    parts = [f"{name} {result.status}"]
    if result.report is not None:
        parts.append(f"accuracy {percent(result.report.accuracy)}, loss {result.report.loss:.4f}")
    if comparison is not None and comparison.trial.run_id != comparison.baseline.run_id:
        test = f" (McNemar p {p_value(comparison.test.p)})" if comparison.test else ""
        parts.append(f"{points(comparison.difference_points)} points against {comparison.baseline.name}{test}")
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


def _comparison_lines(summary: Summary) -> Iterator[Table | Text]:
    comparison = summary.comparison
    if comparison is not None:
        yield comparison_table(comparison)
        yield Text(comparison.sentence, "bold")
        yield from (Text(f"{note}.") for note in _notes(comparison))
    elif summary.baseline_command:
        yield Text(
            "\nNot compared: there is no finished baseline of this protocol yet. The next line trains one.", "bold"
        )
    elif summary.result.report is not None:
        yield Text("\nThis is a baseline: what other trials of its protocol are compared with.", "bold")
    yield Text()


def comparison_table(comparison: Comparison) -> Table:
    """Accuracy, loss and training time of both, and their differences, as a rich table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    first, *others, last = _rows(comparison)
    table.add_column(first[0])
    for title in first[1:]:
        table.add_column(title, justify="right", no_wrap=True)
    for row in others:
        table.add_row(*(Text(cell) for cell in row))
    table.add_row(*(Text(cell, "bold") for cell in last))
    return table


def comparison_markdown(comparison: Comparison) -> str:
    """The same table and notes as Markdown; names are escaped."""
    header, *rows = _rows(comparison)
    lines = [markdown_row(header), "| --- | ---: | ---: | ---: |", *(markdown_row(row) for row in rows), ""]
    names = f"This trial: {markdown(comparison.trial.name)}. Baseline: {markdown(comparison.baseline.name)}."
    notes = " ".join(f"{note}." for note in _notes(comparison))
    return "\n".join([*lines, f"**{comparison.sentence}**", "", notes, "", names, ""])


def comparison_metrics(comparison: Comparison) -> dict[str, float]:
    """The comparison's figures by name, those that there are: points, the interval's ends, p, per cent of time."""
    test, gain = comparison.test, comparison.time_gain_percent
    figures = {"difference_points": comparison.difference_points}
    if test is not None:
        figures |= {"difference_low_points": test.low_points, "difference_high_points": test.high_points}
        figures["mcnemar_p"] = test.p
    return figures | ({} if gain is None else {"time_gain_percent": gain})


def _rows(comparison: Comparison) -> list[tuple[str, str, str, str]]:
    rows = [("", "accuracy", "loss", "training time")]
    for label, trial in (("this trial", comparison.trial), ("baseline", comparison.baseline)):
        rows.append((label, percent(trial.accuracy), f"{trial.loss:.4f}", duration(trial.train_seconds)))
    gain = time_gain(comparison.time_gain_percent)
    change = (f"{points(comparison.difference_points)} points", signed(comparison.difference_loss, 4), gain)
    return [*rows, ("difference", *change)]


def _notes(comparison: Comparison) -> Iterator[str]:
    test = comparison.test
    if test is not None:
        yield (
            f"95 % interval {points(test.low_points)} to {points(test.high_points)} points, "
            f"exact McNemar p {p_value(test.p)}"
        )
        yield (
            f"Right only in this trial: {test.only_trial:,}, only in the baseline: {test.only_baseline:,}, "
            f"of {test.examples:,} examples"
        )
    if comparison.time_note:
        yield comparison.time_note[0].upper() + comparison.time_note[1:]

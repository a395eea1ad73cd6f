"""Open runs: what is written about a trial while it runs and when it ends, files included, and about parent runs."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distilbench.results import (
    MEASURES,
    PREDICTIONS,
    Evaluation,
    Owner,
    Predictions,
    Status,
    StepRecord,
    TrialResult,
    replace_file,
)
from distilbench.tracking import undelivered
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import Connection, reason_of, store_errors
from distilbench.tracking.start import LONGEST_TAG, RunContent, process_tags
from distilbench.tracking.undelivered import NOTE, Undelivered, metric_points

log = logging.getLogger(__name__)

SHARE_OF_TIME = 0.01
"""Share of a trial's time that sending metrics may take; a batch takes 10-40 ms (SQLite, server) when idle."""
SHORTEST_WAIT, LONGEST_WAIT = 5.0, 300.0
"""Minimum and maximum seconds that metrics wait in memory; a locked SQLite file blocks each attempt."""


def write_predictions(predictions: Predictions, path: Path) -> None:
    """Write Parquet with a row per example: ``index``, ``label``, ``prediction``, ``logit_0`` ... (float32), ``slice``.

    ``slice`` is present only if results are reported by slice. After an error, nothing of the file remains.
    """
    import pyarrow
    import pyarrow.parquet

    columns = {
        "index": np.arange(len(predictions.labels)),
        "label": predictions.labels,
        "prediction": predictions.logits.argmax(axis=1),
        **{f"logit_{i}": column.astype(np.float32) for i, column in enumerate(predictions.logits.T)},
    }
    if predictions.slices is not None:
        columns["slice"] = predictions.slices
    with replace_file(path) as partial:
        pyarrow.parquet.write_table(pyarrow.table(columns), partial)


def read_predictions(path: Path) -> Predictions:
    """Read what :func:`write_predictions` wrote; raises OSError, KeyError or ValueError (pyarrow's) for other files."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    logits = [name for name in table.column_names if name.startswith("logit_")]
    return Predictions(
        labels=table["label"].to_numpy(),
        logits=np.stack([table[name].to_numpy() for name in logits], axis=1),
        slices=table["slice"].to_numpy() if "slice" in table.column_names else None,
    )


def confusion_figure(predictions: Predictions, label_names: Sequence[str]) -> Any:
    """Return a confusion matrix as a matplotlib Figure; up to twenty labels, its cells show the counts."""
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    size = len(label_names)
    side = 0.4 * min(size, 40)  # inches
    figure = Figure(figsize=(4 + side, 3.2 + side), layout="constrained")
    axes = figure.subplots()
    ConfusionMatrixDisplay.from_predictions(
        predictions.labels, predictions.logits.argmax(axis=1), labels=range(size), display_labels=label_names,
        include_values=size <= 20, values_format=",", xticks_rotation=45 if size > 4 else 0, cmap="Blues",
        colorbar=False, ax=axes,
    )  # fmt: skip
    axes.set_title(f"accuracy {predictions.correct.mean():.2%}")
    if size > 40:  # drawing the names of 150 labels took 5 s
        named = range(0, size, -(-size // 40))
        axes.set_xticks(named, label_names[:: named.step], rotation=45)
        axes.set_yticks(named, label_names[:: named.step])
    return figure


def curve_figure(losses: list[tuple[int, float]], result: TrialResult) -> Any:
    """Return loss and accuracy over steps as a matplotlib Figure, with the kept epoch marked."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4))
    loss_axes, accuracy_axes = figure.subplots(1, 2, gridspec_kw={"bottom": 0.15})
    loss_axes.plot([step for step, _ in losses], [loss for _, loss in losses], color="0.6", linewidth=1, label="train")
    for axes, name in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        axes.plot(
            [e.step for e in result.history], [e.metric(name) for e in result.history], "o-", label="at evaluations"
        )
        if result.selection is not None:
            axes.axvline(result.selection.step, color="tab:green", linestyle=":", label="kept")
        axes.set(xlabel="step", title=name)
        axes.legend(loc="upper right" if name == "loss" else "lower right")
    return figure


class MlflowRun:
    """One open run; metrics are buffered until the next evaluation, or until enough time has passed.

    Errors of the store do not end a trial: what could not be sent is kept in the trial's directory, until this process
    or another delivers it.
    """

    def __init__(self, connection: Connection, content: RunContent) -> None:
        self._connection, self._label_names = connection, content.label_names
        self._directory, tags = Path(content.directory), content.tags
        is_same = tags["distilbench.selection_split"] == tags["distilbench.report_split"]
        self._split = "validation" if is_same else "selection"
        kept = undelivered.read(self._directory)
        metrics = kept.metrics if kept and kept.run_id == content.run_id else []
        whole = replace(content, tags={**process_tags(), **tags})
        self._pending = Undelivered(content.run_id, whole, metrics)
        self._losses: list[tuple[int, float]] = []
        self._due = time.monotonic() + SHORTEST_WAIT

    @property
    def run_id(self) -> str | None:
        """The run's id; None until the store has created it."""
        return self._pending.run_id

    def open(self) -> None:
        """Create, complete or reopen the run; raises the store's errors."""
        self._pending.make(self._connection)

    def keep(self) -> Path:
        """Write what the run lacks into the trial's directory; returns the folder for files that it lacks."""
        return self._pending.write(self._directory)

    def on_step(self, record: StepRecord) -> None:
        """Log an optimisation step."""
        self._losses.append((record.step, record.loss))
        names = ("loss", "learning_rate", "gradient_norm", "examples_per_second")
        self._pending.metrics += metric_points({f"train/{name}": getattr(record, name) for name in names}, record.step)
        if time.monotonic() >= self._due:
            self._flush()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation on the selection split, and all buffered metrics."""
        values = {f"{self._split}/{name}": evaluation.metric(name) for name in MEASURES}
        self._pending.metrics += metric_points(values | {"epoch": evaluation.epoch}, evaluation.step)
        if not self._connection.is_unreachable or time.monotonic() >= self._due:
            self._flush()

    def finish(self, result: TrialResult, predictions: Predictions | None = None) -> None:
        """Log final metrics, predictions and figures, then the status."""
        self._pending.metrics += metric_points(final_metrics(result), result.steps)
        self._pending.status, self._pending.error = result.status, result.error
        with tempfile.TemporaryDirectory() as folder:
            files = self._write_files(Path(folder), result, predictions)
            if self._connection.attempt("the end of the run", lambda: self._send(files)):
                return
            kept = self.keep()
            for file in files:
                if not (self._directory / file.name).exists():
                    shutil.copy(file, kept)

    def _write_files(self, folder: Path, result: TrialResult, predictions: Predictions | None) -> list[Path]:
        """Write predictions and figures into ``folder``; a file that can't be written costs a warning only."""
        files: dict[str, Callable[[Path], object]] = {}
        if predictions is not None:
            files[PREDICTIONS] = partial(write_predictions, predictions)
            files["confusion_matrix.png"] = lambda to: confusion_figure(predictions, self._label_names).savefig(to)
        if result.history:
            files["learning_curve.png"] = lambda to: curve_figure(self._all_losses(), result).savefig(to)
        for name, write in files.items():
            try:
                write(folder / name)
            except Exception as error:  # any error: a trained model outweighs its figures
                log.warning("MLflow does not get %s: %s: %s", name, type(error).__name__, reason_of(error))
        return [folder / name for name in files if (folder / name).is_file()]

    def _all_losses(self) -> list[tuple[int, float]]:
        """Return steps and losses, with those from before the trial was continued if the store answers."""
        before: dict[int, float] = {}
        if self._pending.held and not self._connection.is_unreachable:
            with contextlib.suppress(*store_errors()):
                stored = self._connection.client.get_metric_history(self.run_id, "train/loss")
                before = {point.step: point.value for point in stored}
        return sorted((before | dict(self._losses)).items())

    def _flush(self) -> None:
        """Send buffered metrics, or write them to disk; the next wait is a hundred times as long as this took."""
        began = time.monotonic()
        if not self._connection.attempt("metrics", self._send):
            with contextlib.suppress(OSError):  # disk full: they wait in memory only
                self.keep()
        ended = time.monotonic()
        self._due = ended + min(max(SHORTEST_WAIT, (ended - began) / SHARE_OF_TIME), LONGEST_WAIT)

    def _send(self, files: Sequence[Path] = ()) -> None:
        self._pending.deliver(self._connection, files)
        undelivered.discard(self._directory)


def final_metrics(result: TrialResult) -> dict[str, float]:
    """Return a trial's final metrics: seconds, MiB, counts, and the kept epoch's measures on the report split."""
    names = ("steps", "train_seconds", "train_cpu_seconds", "train_flops", "setup_seconds", "examples_per_second",
             "tokens_per_second", "trainable_parameters", "total_parameters", "micro_batch_size")  # fmt: skip
    known = {name: getattr(result, name) for name in names} | {"peak_memory_mb": result.peak_memory_bytes / 2**20}
    values: dict[str, float] = {name: value for name, value in known.items() if value is not None}
    if result.num_trials_in_batch > 1:
        values |= {"num_trials_in_batch": result.num_trials_in_batch, "batch_seconds": result.batch_seconds}
        if result.solo_seconds_estimate is not None:
            values["solo_seconds_estimate"] = result.solo_seconds_estimate
    if result.selection is not None:
        values["best_epoch"] = result.selection.epoch
    if result.selection is not None and result.selection is not result.report:
        values |= {f"selection_{name}": result.selection.metric(name) for name in MEASURES}
    if result.report is not None:
        values |= {name: result.report.metric(name) for name in MEASURES}
    return values


class ParentRun:
    """An open parent run; ``sweep`` is the tag ``distilbench.sweep`` of this run and its children.

    Without arguments, it does nothing (no tracking). ``directory`` holds the records of all its trials.
    """

    def __init__(self, connection: Connection | None = None, run_id: str | None = None, sweep: str = "",
                 directory: Path | None = None) -> None:  # fmt: skip
        self._connection, self.run_id, self._sweep = connection or Connection(), run_id, sweep
        self._directory, self._pending = directory or Path(), Undelivered(run_id)

    def update(self, metrics: Mapping[str, float], note: str | None = None) -> None:
        """Log metrics, and replace the Markdown description that MLflow's page shows."""
        self._pending.metrics = metric_points(metrics)
        self._pending.tags = {} if note is None else {NOTE: redact(note)[:LONGEST_TAG]}
        self._deliver("how the sweep stands")

    def finish(self, status: Status, error: str | None = None) -> None:
        """End the run; a reopened run may be ended again."""
        self._pending.status, self._pending.error = status, error
        if not self._deliver("the end of the sweep"):
            with contextlib.suppress(OSError):  # disk full: the next call of the sweep ends it
                self._pending.write(self._directory)

    def _deliver(self, what: str) -> bool:
        return self._connection.attempt(what, partial(self._pending.deliver, self._connection))

    def restore_ends(self, ends: Mapping[str, tuple[Status, str | None]]) -> None:
        """Restore the given ends of runs, by run id, where a process that had lost their trials wrote others."""
        for run_id, (status, error) in ends.items():
            write = partial(undelivered.restore_ends, self._connection.client, run_id, status, error)
            self._connection.attempt("the end of a trial", write, is_kept=False, is_write=False)

    def has_pending(self, directory: Path) -> bool:
        """Return whether the store is unreachable, or trials in ``directory`` keep something for it."""
        return self._connection.is_unreachable or (self._connection.client and undelivered.is_any_below(directory))

    def catch_up(self, is_over: Callable[[Owner], bool], patience_seconds: float = 0.0) -> None:
        """End and deliver runs whose process ``is_over``; waits up to ``patience_seconds`` for an unreachable store."""
        for wait in (0.0, patience_seconds):
            if not wait or (self.has_pending(self._directory) and self._connection.wait(wait)):
                undelivered.end_left_runs(self._connection, is_over, self._sweep, self.run_id)
                undelivered.deliver_below(self._connection, self._directory, is_over)

"""One open run: what is written of a trial while it runs and when it ends."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.results import MEASURES, PREDICTIONS, Evaluation, Predictions, Status, StepRecord, TrialResult
from distilbench.tracking.artifacts import confusion_figure, curve_figure, write_predictions
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import reason_of, retry_or_warn, store_errors
from distilbench.tracking.tags import LONGEST_TAG, RunStart

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)

SHARE_OF_TIME = 0.01
"""What sending metrics may take of a trial's time; a batch costs 10-40 ms (SQLite, server) on an idle machine."""
SHORTEST_WAIT, LONGEST_WAIT = 5.0, 300.0
"""Seconds that metrics wait in memory, at least and at most; a locked database blocks each attempt for 20 s."""
METRICS_PER_BATCH = 1000
"""MLflow's own limit (mlflow.utils.validation)."""

NOTE = "mlflow.note.content"
"""Tag that MLflow shows as a run's description."""

TERMINAL = {Status.FINISHED: "FINISHED", Status.INTERRUPTED: "KILLED", Status.PRUNED: "KILLED"}


class MlflowRun:
    """One open run. Metrics wait in memory until sending them is worth its time, or until the next evaluation.

    No trouble of the store ends a trial: it is retried, then told in one line.
    """

    def __init__(self, client: MlflowClient, run_id: str, start: RunStart) -> None:
        self._client = client
        self.run_id = run_id
        self._start = start
        same = start.protocol.selection_split == start.protocol.report_split
        self._split = "validation" if same else "selection"
        self._waiting: list[tuple[str, float, int, int]] = []
        self._losses: list[tuple[int, float]] = []
        self._due = time.monotonic() + SHORTEST_WAIT
        self._failures = 0
        self._warned = False

    def on_step(self, record: StepRecord) -> None:
        """Log an optimisation step."""
        self._losses.append((record.step, record.loss))
        names = ("loss", "learning_rate", "gradient_norm", "examples_per_second")
        self._wait({f"train/{name}": getattr(record, name) for name in names}, record.step)
        if time.monotonic() >= self._due:
            self._flush()

    def on_evaluation(self, evaluation: Evaluation) -> None:
        """Log an evaluation on the selection split, and everything that waits."""
        values = {f"{self._split}/{name}": evaluation.metric(name) for name in MEASURES}
        self._wait(values | {"epoch": evaluation.epoch}, evaluation.step)
        if not self._failures or time.monotonic() >= self._due:
            self._flush()

    def finish(self, result: TrialResult, predictions: Predictions | None = None) -> None:
        """Write final metrics, predictions and figures, then the true status: a FINISHED run is a whole one."""
        self._wait(final_metrics(result), result.steps)
        writes: list[tuple[str, Callable[[], None]]] = [("the last metrics", self._send)]
        if predictions is not None:
            writes.append(("the predictions", lambda: self._log_predictions(predictions)))
            writes.append(("the confusion matrix", lambda: self._log_confusion(predictions)))
        if result.history:
            writes.append(("the learning curve", lambda: self._log_curve(result)))
        all(retry_or_warn(what, write) for what, write in writes)  # a store that is gone is not waited for once more
        retry_or_warn("the end of the run", lambda: end_run(self._client, self.run_id, result.status, result.error))

    def _wait(self, values: Mapping[str, float], step: int) -> None:
        self._waiting += points(values, step)

    def _flush(self) -> None:
        """Send what waits, and wait a hundred times as long as that took; warn once, at the second failure in a row."""
        began = time.monotonic()
        try:
            self._send()
            self._failures = 0
        except store_errors() as error:
            self._failures += 1
            if self._failures == 2 and not self._warned:
                self._warned = True
                log.warning("MLflow takes no metrics now (%s); training goes on, they wait", reason_of(error))
        ended = time.monotonic()
        self._due = ended + min(max(SHORTEST_WAIT, (ended - began) / SHARE_OF_TIME), LONGEST_WAIT)

    def _send(self) -> None:
        while self._waiting:
            log_metrics(self._client, self.run_id, self._waiting[:METRICS_PER_BATCH])
            del self._waiting[:METRICS_PER_BATCH]

    def _log_predictions(self, predictions: Predictions) -> None:
        with tempfile.TemporaryDirectory() as folder:
            write_predictions(predictions, Path(folder) / PREDICTIONS)
            self._client.log_artifact(self.run_id, str(Path(folder) / PREDICTIONS))

    def _log_confusion(self, predictions: Predictions) -> None:
        figure = confusion_figure(predictions, self._start.label_names)
        self._client.log_figure(self.run_id, figure, "confusion_matrix.png")

    def _log_curve(self, result: TrialResult) -> None:
        self._client.log_figure(self.run_id, curve_figure(self._losses, result), "learning_curve.png")


def points(values: Mapping[str, float], step: int = 0) -> list[tuple[str, float, int, int]]:
    """Return (name, value, milliseconds since 1970, step) of each value, measured now."""
    at = int(time.time() * 1000)
    return [(name, float(value), at, step) for name, value in values.items()]


def log_metrics(client: MlflowClient, run_id: str, values: list[tuple[str, float, int, int]]) -> None:
    """One batch of (name, value, milliseconds, step); sent twice, MLflow keeps it once."""
    from mlflow.entities import Metric

    if values:
        client.log_batch(run_id, metrics=[Metric(*value) for value in values], synchronous=True)


def end_run(client: MlflowClient, run_id: str, status: Status, error: str | None) -> None:
    """Tag a run with its status and error, then end it in MLflow's own terms."""
    from mlflow.entities import RunTag

    tags = [RunTag("distilbench.status", status.value)]
    if error:
        tags.append(RunTag("distilbench.error", redact(" ".join(error.split()))[:LONGEST_TAG]))
    client.log_batch(run_id, tags=tags, synchronous=True)
    if error:
        reason = " ".join(error.split()).replace("`", "'")
        describe_first(client, run_id, f"**{status.value}** `{reason}`")
    client.set_terminated(run_id, TERMINAL.get(status, "FAILED"))


def describe_first(client: MlflowClient, run_id: str, sentence: str) -> None:
    """Have a run's description begin with what matters most, a sentence in Markdown."""
    known = client.get_run(run_id).data.tags.get(NOTE, "")
    head = redact(sentence) + "\n\n"
    if not known.startswith(head):
        client.set_tag(run_id, NOTE, (head + known)[:LONGEST_TAG])


def final_metrics(result: TrialResult) -> dict[str, float]:
    """What a trial amounts to; seconds, bytes / 2**20, counts, and the kept epoch's measures on the report split."""
    values: dict[str, float] = {
        "steps": result.steps,
        "train_seconds": result.train_seconds,
        "train_flops": result.train_flops,
        "setup_seconds": result.setup_seconds,
        "examples_per_second": result.examples_per_second,
        "tokens_per_second": result.tokens_per_second,
        "peak_memory_mb": result.peak_memory_bytes / 2**20,
        "trainable_parameters": result.trainable_parameters,
        "total_parameters": result.total_parameters,
    }
    if result.train_cpu_seconds is not None:
        values["train_cpu_seconds"] = result.train_cpu_seconds
    if result.train_flops_counted:
        values["train_flops_counted"] = 1
    if result.micro_batch_size is not None:
        values["micro_batch_size"] = result.micro_batch_size
    if not result.alone:
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

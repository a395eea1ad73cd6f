"""Runs that hold other runs (a sweep's, a trial's with several seeds), and runs whose process is gone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.results import Owner, Record, Status
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import retry_or_warn
from distilbench.tracking.run import end_run, log_metrics, points
from distilbench.tracking.tags import LONGEST_TAG

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000

TRIAL = "distilbench.trial"
"""The tag of a trial's directory below its sweep's."""


class NullParentRun:
    """The parent of runs that are not tracked."""

    run_id = None

    def update(self, metrics: Mapping[str, float], note: str | None = None) -> None:
        """Do nothing."""

    def finish(self, status: Status, error: str | None = None) -> None:
        """Do nothing."""

    def unfinished(self, is_over: Callable[[Owner], bool]) -> dict[str, str]:
        """Return nothing: no run is kept."""
        return {}

    def settle(self, run_id: str, record: Record, predictions: Path) -> None:
        """Do nothing."""


class MlflowParentRun:
    """An open run that others name as their parent; ``sweep`` is in its and their tag ``distilbench.sweep``."""

    def __init__(self, client: MlflowClient, experiment_id: str, run_id: str, sweep: str) -> None:
        self._client, self._experiment_id, self.run_id, self._sweep = client, experiment_id, run_id, sweep
        self._note = ""

    def update(self, metrics: Mapping[str, float], note: str | None = None) -> None:
        """Log metrics, and replace the description that MLflow's page shows (Markdown)."""
        values = points(metrics)
        retry_or_warn("the sweep's metrics", lambda: log_metrics(self._client, self.run_id, values))
        if note is not None and note != self._note:
            self._note = note
            tag = self.run_id, "mlflow.note.content", redact(note)[:LONGEST_TAG]
            retry_or_warn("the description", lambda: self._client.set_tag(*tag))

    def finish(self, status: Status, error: str | None = None) -> None:
        """Give the run its true end; one that was opened again may be ended again."""
        retry_or_warn("the end of the run", lambda: end_run(self._client, self.run_id, status, error))

    def unfinished(self, is_over: Callable[[Owner], bool]) -> dict[str, str]:
        """Return the other runs of the sweep that are RUNNING in a process that ``is_over``, with each one's trial."""
        found: list[Run] = []
        retry_or_warn("a question for unfinished trials", lambda: found.extend(self._running()))
        return {run.info.run_id: run.data.tags.get(TRIAL, "") for run in found if _is_of(run, is_over)}

    def _running(self) -> list[Run]:
        query = f"attributes.status = 'RUNNING' and tags.`distilbench.sweep` = '{self._sweep}'"
        running = self._client.search_runs([self._experiment_id], query, max_results=PAGE)
        return [run for run in running if run.info.run_id != self.run_id]

    def settle(self, run_id: str, record: Record, predictions: Path) -> None:
        """End a run whose process could not, with what its trial's directory says; leaves ended ones alone."""
        retry_or_warn("the end of a trial", lambda: self._settle(run_id, record, predictions))

    def _settle(self, run_id: str, record: Record, predictions: Path) -> None:
        if self._client.get_run(run_id).info.status != "RUNNING":
            return
        log_metrics(self._client, run_id, points(record.figures))
        if predictions.is_file():
            self._client.log_artifact(run_id, str(predictions))
        end_run(self._client, run_id, record.status, record.error)


def _is_of(run: Run, is_over: Callable[[Owner], bool]) -> bool:
    tags = run.data.tags
    try:
        owner = Owner(
            tags["distilbench.host"], int(tags["distilbench.pid"]), float(tags["distilbench.process_started"])
        )
    except (KeyError, ValueError):  # not one of ours, or its tags were edited
        return False
    return is_over(owner)


ParentRun = NullParentRun | MlflowParentRun
"""A run that holds other runs."""

"""The MLflow store: write trials to it and find them again."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import pluralize
from distilbench.identity import short_hash
from distilbench.results import PREDICTIONS, Owner, Predictions, Status, StoredTrial
from distilbench.tracking import undelivered
from distilbench.tracking.mlflow_tables import search_database
from distilbench.tracking.model import log_once, register_model
from distilbench.tracking.redaction import redact
from distilbench.tracking.retries import Connection, as_settings_error, retry_outage
from distilbench.tracking.run import MlflowRun, ParentRun, read_predictions
from distilbench.tracking.search import (
    CONFIRMS_TAG,
    MARGIN_TAG,
    PARENT_TAG,
    SWEEP_TAG,
    TREATMENT_TAG,
    SweepRun,
    search_runs,
    trained_beside_others,
    trial_of,
)
from distilbench.tracking.start import DIRECTORY, LONGEST_TAG, RunContent, claim_run, log_batch, process_tags
from distilbench.tracking.undelivered import NOTE, Undelivered, metric_points
from distilbench.tracking.uri import StoreAddress, local_folder

if TYPE_CHECKING:
    from mlflow.entities import Experiment, LoggedModel, Run

log = logging.getLogger(__name__)

VIEW_COLUMNS = [
    *(f"metrics.`{name}`" for name in ("accuracy", "difference_points", "train_seconds", "train_flops")),
    "params.`freeze.layers`",
    "tags.`distilbench.trial`",
]
"""Columns of the runs table that links open, as MLflow's page names them."""


class MlflowStore:
    """Trials as MLflow runs of one experiment; an unreachable store is waited for up to ``patience_seconds``."""

    def __init__(self, address: StoreAddress, experiment: Experiment, patience_seconds: float) -> None:
        from mlflow import MlflowClient

        self.address, self._patience = address, patience_seconds
        self._experiment = experiment.name
        self._experiment_id = str(experiment.experiment_id)
        self._client = MlflowClient(address.uri)
        self._connection = Connection(self._client, self._experiment_id)
        self._artifacts: dict[str, str] = {}

    def begin(self, content: RunContent) -> MlflowRun:
        """Create (or reopen) the run with its tags, parameters, data sets and configuration.

        If a server is unreachable, a trial of a sweep begins without a run, which is created later; any other waits.
        """
        run = MlflowRun(self._connection, content)
        if (
            SWEEP_TAG in content.tags
            and self.address.file is None
            and not self._connection.attempt("a new run", run.open)
        ):
            run.keep()
            return run
        with self.address.errors_as_settings_error():
            try:
                retry_outage(self._patience, run.open)
            except BaseException:
                if run.run_id:
                    failed = run.run_id, Status.FAILED, "the store did not take its start"
                    self._connection.attempt("the end of the run", partial(undelivered.end_run, self._client, *failed))
                raise
        return run

    def end_left_runs(self) -> None:
        """End runs of the experiment whose process on this host is gone, as their records say, and log which."""
        if ended := undelivered.end_left_runs(self._connection, Owner.is_dead):
            log.info("closed %s whose process is gone: %s", pluralize(len(ended), "run"), ", ".join(ended))

    def catch_up(self, directory: Path) -> None:
        """Deliver what trials in ``directory`` kept during an outage of the store, after waiting for its end."""
        if undelivered.is_any_below(directory) and self._connection.wait(self._patience):
            undelivered.deliver_below(self._connection, directory, lambda owner: owner == Owner.of())
        if undelivered.is_any_below(directory):
            log.warning("MLflow does not answer: the next command that trains or compares tells it of %s", directory)

    def newest_baseline(self, protocol_id: str, treatment: Mapping[str, object], seed: int) -> StoredTrial | None:
        """Return the newest finished trial of this protocol and treatment, preferably of the same seed."""
        wanted = {"status": Status.FINISHED.value, "protocol": protocol_id, "treatment": short_hash(dict(treatment))}
        found = self.search({f"distilbench.{name}": value for name, value in wanted.items()})
        best = max(found, key=lambda trial: (trial.seed == seed, trial.started_ms), default=None)
        return best and replace(best, predictions=self.predictions(best.run_id))

    def add_comparison(self, run_id: str, text: str, metrics: Mapping[str, float], sentence: str) -> None:
        """Attach ``comparison.md`` and metrics to a run, which may have ended; ``sentence`` begins its description."""

        def send() -> None:
            self._client.log_text(run_id, redact(text), "comparison.md")
            note = undelivered.begin_note(self._client.get_run(run_id).data.tags, sentence)
            log_batch(self._client, run_id, metric_points(metrics), note)

        self._connection.attempt("the comparison", send, is_kept=False)

    def search(self, tags: Mapping[str, str], run_ids: Sequence[str] = ()) -> list[StoredTrial]:
        """Return the trials with all of these tags, oldest first, without predictions; only of ``run_ids`` if given.

        Sweeps' own runs and runs of other programs are skipped, but raise :class:`SettingsError` if ``run_ids`` names
        them. The seeds of a trial that was pruned after some of them are PRUNED, as the trial is.
        """
        found = self._search(tags, run_ids)
        kept = [run for run in found if TREATMENT_TAG in run.data.tags or run_ids]
        self._artifacts |= {run.info.run_id: run.info.artifact_uri for run in kept}
        trials = [
            trial_of(run.info.run_id, run.info.run_name or "", run.data.tags, run.data.metrics,
                     url=self.address.run_url(self._experiment_id, run.info.run_id),
                     started_ms=run.info.start_time or 0)
            for run in kept
        ]  # fmt: skip
        shared = trained_beside_others(kept)
        pruned = {run.info.run_id for run in found if run.data.tags.get("distilbench.status") == Status.PRUNED.value}
        of_pruned = {run.info.run_id for run in kept if run.data.tags.get(PARENT_TAG) in pruned}
        return [
            replace(one, alone=one.alone and one.run_id not in shared,
                    status=Status.PRUNED if one.run_id in of_pruned else one.status)
            for one in trials
        ]  # fmt: skip

    def sweep_run(self, sweep: str) -> SweepRun | None:
        """Return the newest parent run of this sweep; None if there is none."""
        return next(reversed(self._sweeps({SWEEP_TAG: sweep})), None)

    def confirmations(self, sweep: str) -> list[SweepRun]:
        """Return the parent runs of this sweep's confirmations, oldest first."""
        return self._sweeps({CONFIRMS_TAG: sweep})

    def sweep_names(self) -> list[str]:
        """Return the names of all sweeps, newest first."""
        return list(dict.fromkeys(run.name for run in reversed(self._sweeps({}))))

    def _sweeps(self, wanted: Mapping[str, str]) -> list[SweepRun]:
        """Return the runs, oldest first, that have a sweep's tag, are no trials, and have no parent."""
        found = []
        for run in self._search(wanted):
            tags = run.data.tags
            if SWEEP_TAG in tags and TREATMENT_TAG not in tags and PARENT_TAG not in tags:
                margin = float(tags[MARGIN_TAG]) if MARGIN_TAG in tags else None
                found.append(SweepRun(run.info.run_id, tags[SWEEP_TAG], tags.get(CONFIRMS_TAG), margin))
        return found

    def _search(self, tags: Mapping[str, str], run_ids: Sequence[str] = ()) -> list[Run]:
        with self.address.errors_as_settings_error():
            if self.address.artifacts is None:
                return search_runs(self._client, self._experiment_id, tags, run_ids)
            return search_database(self.address.uri, self._experiment_id, tags, run_ids)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """Return ``(step, value)`` pairs of a metric, sorted by step; empty if it was never logged."""
        with self.address.errors_as_settings_error():
            return sorted((m.step, m.value) for m in self._client.get_metric_history(run_id, metric))

    def config(self, run_id: str) -> str:
        """Return a run's resolved configuration as YAML; raises :class:`SettingsError` if the run has none."""
        with (
            as_settings_error(
                f"run must be a trial's, with config.yaml, got {run_id!r}", "check its id, or train it again"
            ),
            tempfile.TemporaryDirectory() as folder,
        ):
            return Path(self._client.download_artifacts(run_id, "config.yaml", folder)).read_text(encoding="utf-8")

    def attach(self, run_id: str, files: Sequence[Path], note: str) -> None:
        """Attach files and a Markdown description to a run, which may have ended; errors of the store are logged."""
        described = Undelivered(run_id, tags={NOTE: redact(note)[:LONGEST_TAG]})
        self._connection.attempt("the report", partial(described.deliver, self._connection, files), is_kept=False)

    def log_model(self, run_id: str, directory: Path, register: str | None) -> None:
        """Log a saved model to a run, which may have ended, and register it; errors of the store are logged."""
        made: list[LoggedModel | None] = []
        self._connection.attempt(
            "the model", lambda: made.append(log_once(self._client, run_id, directory)), is_kept=False
        )
        if register and made and made[0]:
            put = partial(register_model, self._client, run_id, made[0], register)
            self._connection.attempt("the registered model", put, is_kept=False)

    def open_parent_run(
        self, name: str, tags: Mapping[str, str], directory: Path, run_id: str | None = None
    ) -> ParentRun:
        """Create a parent run, or reopen that of ``run_id``; ``tags`` name the sweep.

        ``directory`` holds the records of its trials.
        """
        fresh = {"distilbench.status": Status.RUNNING.value, "distilbench.error": "", DIRECTORY: str(directory)}
        content = RunContent(redact(name), {**fresh, **process_tags(), **tags})
        with self.address.errors_as_settings_error():
            run = retry_outage(self._patience, partial(claim_run, self._client, self._experiment_id, content, run_id))
        undelivered.discard(directory)
        return ParentRun(self._connection, run.info.run_id, tags[SWEEP_TAG], directory)

    def runs_url(self, sweep: str | None = None) -> str:
        """Return a link to the table of all runs, or of a sweep's, best first, with the most informative columns.

        MLflow stores such a view in a tag of the experiment, as its *Share* button does.
        """
        state = {"orderByKey": "metrics.`accuracy`", "orderByAsc": False, "selectedColumns": VIEW_COLUMNS}
        state |= {"searchFilter": f"tags.`{SWEEP_TAG}` = '{sweep}'"} if sweep else {}
        views: list[str] = []

        def share() -> None:
            tag = f"mlflow.sharedViewState.{short_hash(state)}"
            self._client.set_experiment_tag(self._experiment_id, tag, json.dumps(state))
            views.append(short_hash(state))

        self._connection.attempt("a view of the runs", share, is_kept=False)
        return self.address.runs_url(self._experiment_id, *views)

    def describe(self) -> str:
        """Return in one line where the runs are and how to see them."""
        place, command = self.address.file or redact(self.address.uri), self.address.ui_command
        return f"experiment {self._experiment} in {place}" + (f" ({command})" if command else "")

    def run_ids(self, sweep: str) -> set[str]:
        """Return the ids of a sweep's runs that were not deleted."""
        return {run.info.run_id for run in self._search({SWEEP_TAG: sweep})}

    def predictions(self, run_id: str) -> Predictions | None:
        """Return the run's predictions; None if they were never written or can't be read."""
        from mlflow.exceptions import MlflowException

        seen = local_folder(self._artifacts.get(run_id, ""))  # set by search; a download takes 40 ms
        with tempfile.TemporaryDirectory() as folder:
            try:
                return read_predictions(
                    seen / PREDICTIONS if seen else Path(self._client.download_artifacts(run_id, PREDICTIONS, folder))
                )
            except (MlflowException, OSError, ValueError, KeyError):
                return None

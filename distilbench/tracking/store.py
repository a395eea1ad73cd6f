"""Where trials are kept and found again."""

from __future__ import annotations

import contextlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

from distilbench.identity import SourceUsed, short_hash
from distilbench.results import PREDICTIONS, Predictions, Status, StoredTrial
from distilbench.settings import SettingsError, TrialSettings
from distilbench.tracking.artifacts import read_predictions
from distilbench.tracking.mlflow_tables import search_database
from distilbench.tracking.parent_run import MlflowParentRun
from distilbench.tracking.redaction import redact
from distilbench.tracking.relocation import foreign_folder
from distilbench.tracking.retries import as_settings_error, retry_or_warn
from distilbench.tracking.run import MlflowRun, describe_first, end_run, log_metrics, points
from distilbench.tracking.search import RawRun, RunFilter, search_server
from distilbench.tracking.tags import LONGEST_TAG, DatasetUsed, RunStart, params_of, process_tags, tags_of
from distilbench.tracking.uri import StoreAddress, local_folder

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Experiment, Run

log = logging.getLogger(__name__)

SWEEP = "distilbench.sweep"
"""The tag that a sweep's own run and all of its trials carry: its name."""

CONFIRMS = "distilbench.confirms"
"""Tag of a sweep's run that trains another sweep's best again: that sweep's name."""

MARGIN = "distilbench.margin"
"""Tag of a sweep's run: the margin in points that its report holds settings to."""

PARAMS_PER_BATCH = 100
LONGEST_NAME = 500
"""MLflow's own limits (mlflow.utils.validation): parameters a call, characters of a data set's name."""


class MlflowStore:
    """Trials as MLflow runs of one experiment."""

    def __init__(self, address: StoreAddress, experiment: Experiment) -> None:
        from mlflow import MlflowClient

        self._address = address
        self._experiment = experiment.name
        self._experiment_id = str(experiment.experiment_id)
        self.foreign_folder = foreign_folder(address, experiment)
        """Says in one line where this experiment's files are, if that is not beside the store; None if it is."""
        self._client = MlflowClient(address.uri)
        self._artifacts: dict[str, str] = {}

    def require_own_folder(self) -> None:
        """Raise :class:`SettingsError` if what is written here would go to the folder of another store."""
        if self.foreign_folder:
            raise SettingsError(self.foreign_folder)

    def begin(self, start: RunStart) -> MlflowRun:
        """Make (or reopen) the run with its tags, parameters, data sets and configuration."""
        self.require_own_folder()
        with self._asking():
            if self._continues(start.run_id):
                run = self._reopened(start.run_id, start)
            else:
                run = self._client.create_run(self._experiment_id, tags=tags_of(start), run_name=redact(start.name))
            run_id = run.info.run_id
            try:
                self._log_params(run_id, start.settings, known=run.data.params)
                self._log_datasets(run_id, start)
                self._client.log_text(run_id, redact(start.config_yaml), "config.yaml")
            except BaseException:
                ending = partial(end_run, self._client, run_id, Status.FAILED, "the store did not take its start")
                retry_or_warn("the end of the run", ending)
                raise
        return MlflowRun(self._client, run_id, start)

    def newest_baseline(self, protocol_id: str, treatment: Mapping[str, object], seed: int) -> StoredTrial | None:
        """The newest finished trial of this protocol and treatment: of the same seed where there is one."""
        wanted = {"status": Status.FINISHED.value, "protocol": protocol_id, "treatment": short_hash(dict(treatment))}
        query = " and ".join([
            "attributes.status = 'FINISHED'",
            *(f"tags.`distilbench.{name}` = '{value}'" for name, value in wanted.items()),
        ])  # fmt: skip
        for narrowed in (f"{query} and tags.`distilbench.seed` = '{seed}'", query):
            with self._asking():
                runs = self._client.search_runs(
                    [self._experiment_id], narrowed, max_results=1, order_by=["attributes.end_time DESC"]
                )
            if runs:
                run = RawRun.of(runs[0])
                return replace(run.trial(self.run_url(run.run_id)), predictions=self.predictions(run.run_id))
        return None

    def add_comparison(
        self, run_id: str, text: str, metrics: Mapping[str, float] | None = None, sentence: str = ""
    ) -> None:
        """Attach ``comparison.md`` and metrics to a run, which may have ended, and begin its description so."""
        if sentence:
            retry_or_warn("the description", lambda: describe_first(self._client, run_id, sentence))
        retry_or_warn("the comparison", lambda: self._client.log_text(run_id, redact(text), "comparison.md"))
        values = points(metrics or {})
        retry_or_warn("the comparison's metrics", lambda: log_metrics(self._client, run_id, values))

    def search(self, wanted: RunFilter) -> list[StoredTrial]:
        """The trials that ``wanted`` means, oldest first, without predictions; raises :class:`SettingsError`.

        Sweeps' own runs and runs of other programs are passed over, unless ``wanted`` names them by id.
        """
        with self._asking():
            found = list(self._search(wanted))
        kept = [run for run in found if run.is_trial or run.run_id in wanted.run_ids]
        self._artifacts |= {run.run_id: run.artifacts for run in kept}
        return [run.trial(self.run_url(run.run_id)) for run in kept]

    def sweep_run(self, sweep: str) -> RawRun | None:
        """The newest run that holds the trials of this sweep, None where there is none."""
        with self._asking():
            found = list(self._search(RunFilter(tags={SWEEP: sweep}, are_trials=False)))
        return max(filter(_is_sweep, found), key=lambda run: run.started_ms, default=None)

    def confirmations(self, sweep: str) -> list[RawRun]:
        """The runs that hold confirmations of this sweep, oldest first."""
        with self._asking():
            found = list(self._search(RunFilter(tags={CONFIRMS: sweep}, are_trials=False)))
        return sorted(filter(_is_sweep, found), key=lambda run: run.started_ms)

    def sweep_names(self) -> list[str]:
        """The names of all sweeps, newest first."""
        with self._asking():
            held = sorted(filter(_is_sweep, self._search(RunFilter(are_trials=False))), key=lambda run: -run.started_ms)
        return list(dict.fromkeys(run.tags[SWEEP] for run in held))

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """``(step, value)`` of a metric in the order of steps; empty where it was never logged."""
        with self._asking():
            return sorted((m.step, m.value) for m in self._client.get_metric_history(run_id, metric))

    def config(self, run_id: str) -> str:
        """The resolved configuration that a run was started with, as YAML; raises :class:`SettingsError`."""
        with (
            as_settings_error(f"run {run_id} must have its config.yaml", "train it again, or choose another run"),
            tempfile.TemporaryDirectory() as folder,
        ):
            return Path(self._client.download_artifacts(run_id, "config.yaml", folder)).read_text(encoding="utf-8")

    def attach(self, run_id: str, files: Sequence[Path], note: str) -> None:
        """Put files and a description (Markdown) on a run, which may have ended; no trouble of the store passes."""
        for file in files:
            retry_or_warn(file.name, partial(self._client.log_artifact, run_id, str(file)))
        text = redact(note)[:LONGEST_TAG]
        retry_or_warn("the description", partial(self._client.set_tag, run_id, "mlflow.note.content", text))

    def run_url(self, run_id: str) -> str:
        """Link to a run's page; for a local store it needs ``mlflow ui``."""
        return self._address.run_url(self._experiment_id, run_id)

    def open_parent_run(self, name: str, tags: Mapping[str, str], parent_run_id: str | None = None,
                   run_id: str | None = None) -> MlflowParentRun:  # fmt: skip
        """Make a run that others name as their parent, or open the one of ``run_id`` again; ``tags`` name the sweep."""
        self.require_own_folder()
        parent = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
        fresh = {"distilbench.status": Status.RUNNING.value, "distilbench.error": ""}
        known = {**fresh, **process_tags(), **parent, **tags}
        with self._asking():
            if self._continues(run_id):
                self._client.update_run(run_id, status="RUNNING")
                for key, value in known.items():
                    self._client.set_tag(run_id, key, value)
            else:
                run_id = self._client.create_run(self._experiment_id, tags=known, run_name=redact(name)).info.run_id
        return MlflowParentRun(self._client, self._experiment_id, run_id, tags["distilbench.sweep"])

    def runs_url(self) -> str:
        """Link to the table of runs, best accuracy first; for a local store it needs ``mlflow ui``."""
        return self._address.runs_url(self._experiment_id)

    def describe(self) -> str:
        """One line: where the runs are and how to see them."""
        return f"experiment {self._experiment} in {self._address.describe()}"

    def _search(self, wanted: RunFilter) -> Iterator[RawRun]:
        if self._address.artifacts is None:
            return search_server(self._client, self._experiment_id, wanted)
        return search_database(self._address, self._experiment_id, wanted)

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        return as_settings_error(self._address.refusal, self._address.remedy)

    def holds(self, run_id: str) -> bool:
        """Return whether there is such a run, and it was not deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False

    def _continues(self, run_id: str | None) -> TypeGuard[str]:
        """Whether there is such a run to continue; one that was deleted since is replaced, which a line tells."""
        if run_id is not None and not self.holds(run_id):
            log.warning("run %s is no longer in the store; the trial continues as a new run", run_id)
            return False
        return run_id is not None

    def _reopened(self, run_id: str, start: RunStart) -> Run:
        """The run to continue, RUNNING again; its tags tell of the process that continues it."""
        from mlflow.entities import RunTag

        self._client.update_run(run_id, status="RUNNING")
        tags = tags_of(start) | {"distilbench.resumed": "true", "distilbench.error": ""}
        self._client.log_batch(run_id, tags=[RunTag(*tag) for tag in tags.items()], synchronous=True)
        return self._client.get_run(run_id)

    def _log_params(self, run_id: str, settings: TrialSettings, known: Mapping[str, str]) -> None:
        """Log what a run does not hold yet: MLflow refuses to change a parameter, as ``train.resume`` would."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in params_of(settings).items() if key not in known]
        for first in range(0, len(params), PARAMS_PER_BATCH):
            self._client.log_batch(run_id, params=params[first : first + PARAMS_PER_BATCH], synchronous=True)

    def _log_datasets(self, run_id: str, start: RunStart) -> None:
        """Record the splits as inputs; MLflow looks for each and adds what it misses, as parallel trials do at once.

        Whoever is second is refused by the database, whole. The other's data set is there then, so that as many
        attempts as there are data sets, and one more, always suffice.
        """
        from mlflow.exceptions import MlflowException

        inputs = [dataset_input(start.protocol.data, used) for used in start.datasets]
        for _ in inputs:
            try:
                self._client.log_inputs(run_id, datasets=inputs)
                return
            except MlflowException as error:
                if error.error_code != "BAD_REQUEST":
                    raise
        if inputs:
            self._client.log_inputs(run_id, datasets=inputs)

    def predictions(self, run_id: str) -> Predictions | None:
        """The run's predictions, or None where they were never written or can't be read any more."""
        from mlflow.exceptions import MlflowException

        with tempfile.TemporaryDirectory() as folder:
            try:
                return read_predictions(self._file_of(run_id, PREDICTIONS, Path(folder)))
            except (MlflowException, OSError, ValueError, KeyError):
                return None

    def _file_of(self, run_id: str, name: str, folder: Path) -> Path:
        """Return a run's file: in place if :meth:`search` saw a local one (a download takes 40 ms), else fetched."""
        seen = local_folder(self._artifacts.get(run_id, ""))
        return seen / name if seen else Path(self._client.download_artifacts(run_id, name, str(folder)))


def _is_sweep(run: RawRun) -> bool:
    """Whether a run holds a sweep: it carries the tag, trains nothing itself, and has no parent."""
    return SWEEP in run.tags and not run.is_trial and "mlflow.parentRunId" not in run.tags


def dataset_input(source: SourceUsed, used: DatasetUsed) -> DatasetInput:
    """A split as MLflow's own record of an input; the digest is the split's, not the whole text's."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    kind, key = ("hugging_face", "path") if source.kind == "hub" else ("local", "uri")
    origin = {key: source.name, "revision": source.revision, "fingerprint": source.fingerprint}
    dataset = Dataset(
        name=redact(source.name)[:LONGEST_NAME],
        digest=short_hash((used.fingerprint, used.context, used.examples)),
        source_type=kind,
        source=redact(json.dumps(origin)),
        profile=json.dumps({"num_rows": used.examples}),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", used.context)])

"""From the moment a trial's run is opened until it is closed: whatever ends it, its record and its run say how."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from distilbench.engines import checkpoints
from distilbench.identity import trial_identity
from distilbench.results import PREDICTIONS, Owner, Predictions, Record, Status, TrialResult, read_record
from distilbench.settings import AppSettings, SettingsError
from distilbench.tracking import MlflowRun, MlflowStore, final_metrics, write_predictions
from distilbench.trials.prepared import Prepared, SweepContext, prepared_trial, run_start, shares_device

log = logging.getLogger(__name__)


@dataclass
class OpenTrial:
    """A trial that has begun; ``result`` is what an engine came to, None until then."""

    settings: AppSettings
    prepared: Prepared
    name: str
    record: Record
    run: MlflowRun | None
    """None where nothing is tracked."""
    alone: bool
    """Whether it has the device to itself, so that its seconds are its own."""
    context: SweepContext
    result: TrialResult | None = None

    @property
    def directory(self) -> Path:
        """Where its record and its predictions are."""
        return Path(self.settings.output.dir)

    @property
    def predictions(self) -> Predictions | None:
        """What the kept epoch said of the report split."""
        report = self.result.report if self.result else None
        if report is None or report.logits is None:
            return None
        slices = self.prepared.text.report.slices
        labels = self.prepared.splits.report.labels
        return Predictions(labels, report.logits, None if slices is None else np.array(slices))


@contextmanager
def open_trials(
    trials: Sequence[AppSettings], prepared: Prepared, store: MlflowStore | None, contexts: Sequence[SweepContext]
) -> Iterator[list[OpenTrial]]:
    """Open a run and a record for each trial; at the end of the block, however it comes, close every one of them.

    A trial that has its result keeps it. Any other ends INTERRUPTED where a signal or an exit ends the block, FAILED
    where an error does; the exception passes through. Nothing is kept of one that another process has taken over.
    Enter and leave it with signals held back.
    """
    trials = [_continued(settings, prepared, context) for settings, context in zip(trials, contexts, strict=True)]
    records = [_begin(settings, prepared) for settings in trials]  # what is refused is refused before any run is open
    opened: list[OpenTrial] = []
    try:
        for settings, record, context in zip(trials, records, contexts, strict=True):
            alone = len(trials) == 1 and not (context.is_quiet and shares_device(settings))
            start = run_start(settings, prepared, record.run_id, context, alone)
            run = store.begin(start) if store else None
            record = replace(record, run_id=run.run_id if run else None)
            opened.append(OpenTrial(settings, prepared, start.name, record, run, alone, context))
            _write_first(record, opened[-1].directory)
        yield opened
    except BaseException as error:
        for trial in opened:
            trial.result = trial.result or _ended_by(error)
        raise
    finally:
        for trial in filter(_is_held, opened):  # in their directories first, which settles them, in milliseconds
            _keep_in_directory(trial)
        for trial in filter(_is_held, opened):
            _keep_in_store(trial)


def _is_held(trial: OpenTrial) -> bool:
    if trial.context.lease is None or trial.context.lease.holds():
        return True
    log.warning("%s was taken over by another process: nothing that came of it here is kept", trial.name)
    return False


def _continued(settings: AppSettings, prepared: Prepared, context: SweepContext) -> AppSettings:
    """Return the settings to continue the interrupted trial that a sweep names, its checkpoints and its record moved.

    A trial of which there is nothing here, or only what another machine's precision or engine left, starts anew.
    """
    record, directory = read_record(context.continues) if context.continues else None, Path(settings.output.dir)
    if context.continues and context.continues != directory and record is None:
        log.info("the interrupted trial starts over: its checkpoints are on another host, not in %s", context.continues)
    if context.continues is None or record is None or record.is_over:
        return settings
    old = context.continues / checkpoints.DIRECTORY
    identity = asdict(trial_identity(prepared.protocol, settings, prepared.precision))
    trial, weights = prepared_trial(settings, prepared), prepared.model.used.fingerprint
    try:
        kept = checkpoints.identity_of(trial, prepared.splits, weights, prepared.precision)
        fits = record.identity == identity and checkpoints.newest(old, kept) is not None
    except SettingsError as error:
        log.info("the interrupted trial is not continued: %s", error)
        return settings
    if not fits:
        return settings
    if context.continues != directory:
        replace(record, owner=Owner.of_this_process()).write(directory)
        checkpoints.remove_all(directory / checkpoints.DIRECTORY)
        os.replace(old, directory / checkpoints.DIRECTORY)
    return replace(settings, train=replace(settings.train, resume=True))


def _begin(settings: AppSettings, prepared: Prepared) -> Record:
    """Start a record, or take up the one of an interrupted trial; refuses a directory of another trial."""
    directory = Path(settings.output.dir)
    identity = asdict(trial_identity(prepared.protocol, settings, prepared.precision))
    found = read_record(directory) if settings.train.resume else None
    if found and found.status is Status.FINISHED:
        raise SettingsError(
            f"train.resume must continue an unfinished trial, got {directory}, which FINISHED with accuracy "
            f"{found.scores['accuracy']:.4f}; drop train.resume=true to train it anew"
        )
    changed = [key for key, value in identity.items() if found and found.identity[key] != value]
    if changed:
        raise SettingsError(
            f"train.resume must continue the trial in {directory}, got another {' and '.join(changed)}; "
            "use the settings it was started with, or another hydra.run.dir"
        )
    return Record(identity, Status.RUNNING, Owner.of_this_process(), found.run_id if found else None)


def _write_first(record: Record, directory: Path) -> None:
    """Write the record of a trial that begins; raises :class:`SettingsError` where its directory takes none."""
    try:
        record.write(directory)
    except OSError as error:
        raise SettingsError(
            f"output.dir must be a directory that can be written, got {directory}: {error.strerror}; "
            "make room there, or name another with hydra.run.dir=... (of a sweep: hydra.sweep.dir=...)"
        ) from error


def _ended_by(error: BaseException) -> TrialResult:
    if isinstance(error, Exception):
        return TrialResult(Status.FAILED, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    return TrialResult(Status.INTERRUPTED, "interrupted; add train.resume=true to continue")


def _keep_in_directory(trial: OpenTrial) -> None:
    """Write predictions and record; what can't be written costs a warning, since the figures outweigh the file."""
    result, predictions = trial.result, trial.predictions
    if result is None:
        return
    if predictions is not None:
        write_or_warn(f"the predictions of {trial.name}",
                       lambda: write_predictions(predictions, trial.directory / PREDICTIONS))  # fmt: skip
    if trial.run:
        trial.record = replace(trial.record, run_id=trial.run.run_id)  # it may have been made since the start
    record = trial.record.with_result(result, final_metrics(result))
    write_or_warn(f"the record of {trial.name}", lambda: record.write(trial.directory))


def _keep_in_store(trial: OpenTrial) -> None:
    run, result = trial.run, trial.result
    if run and result:
        write_or_warn(f"the run of {trial.name}", lambda: run.finish(result, trial.predictions))
        if run.run_id != trial.record.run_id:  # made only now
            _keep_in_directory(trial)


def write_or_warn(what: str, write: Callable[[], object]) -> None:
    """Write something of a trial that has its result; whatever goes wrong costs a warning."""
    try:
        write()
    except Exception as error:  # whatever it is, the rest of the trial is still to be kept
        log.warning("%s could not be written: %s", what, getattr(error, "strerror", None) or error)

"""Train and track trials, from the moment their runs are opened until they are closed, whatever ends them."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from rich.console import Console

from distilbench.engines import checkpoints, engine_for
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.device import resolve_device
from distilbench.report.trial import Comparison
from distilbench.results import (
    ADAPTER,
    MODEL,
    PREDICTIONS,
    Evaluation,
    Owner,
    Predictions,
    Record,
    Status,
    StepRecord,
    StoredTrial,
    TrialResult,
    read_record,
)
from distilbench.settings import AppSettings, SettingsError, require
from distilbench.tracking.run import MlflowRun, final_metrics, write_predictions
from distilbench.tracking.search import trial_of
from distilbench.tracking.start import RunContent
from distilbench.tracking.store import MlflowStore
from distilbench.tracking.undelivered import UNDELIVERED
from distilbench.trials.content import content_of
from distilbench.trials.interruptions import SignalGuard, TrialTakenOver
from distilbench.trials.prepared import Job, Prepared, SweepContext, prepared_trial
from distilbench.trials.progress import ProgressBars

log = logging.getLogger(__name__)


@dataclass
class Trial:
    """A trial from its inputs to its result and its comparison with the baseline."""

    job: Job
    prepared: Prepared
    store: MlflowStore | None
    """None without tracking."""
    content: RunContent | None = None
    """What its run contains before its first step; like the next two, None until the trial has begun."""
    record: Record | None = None
    run: MlflowRun | None = None
    ended: TrialResult | None = None
    """The engine's result; None until the trial has ended."""
    comparison: Comparison | None = None
    """None for a baseline, and if there is no baseline to compare with."""

    @property
    def settings(self) -> AppSettings:
        """The settings that are trained."""
        return self.job.settings

    @cached_property
    def context(self) -> SweepContext:
        """What it gets from its sweep, or its name alone."""
        return self.job.context or SweepContext(self.job.name)

    @property
    def name(self) -> str:
        """The run's name."""
        return self.context.name

    @property
    def result(self) -> TrialResult:
        """The engine's result; only for a trial that has ended."""
        assert self.ended is not None
        return self.ended

    @property
    def directory(self) -> Path:
        """The directory of its record and its predictions."""
        return Path(self.settings.output.dir)

    @property
    def run_id(self) -> str | None:
        """The id of its MLflow run; None without tracking."""
        return self.run.run_id if self.run else None

    @property
    def predictions(self) -> Predictions | None:
        """The kept epoch's predictions on the report split; None without a result."""
        report = self.ended.report if self.ended else None
        if report is None or report.logits is None:
            return None
        slices = self.prepared.text.report.slices
        labels = self.prepared.splits.report.labels
        return Predictions(labels, report.logits, None if slices is None else np.array(slices))

    @property
    def stored(self) -> StoredTrial:
        """The trial as the store would return it; only for one that has a result."""
        assert self.content is not None
        tags, metrics = {**self.content.tags, "distilbench.status": self.result.status}, final_metrics(self.result)
        return trial_of(self.run_id or "", self.name, tags, metrics, predictions=self.predictions)

    def holds_lease(self) -> bool:
        """Return whether the trial is still this process's; logs a warning if not."""
        if self.context.lease is None or self.context.lease.holds():
            return True
        log.warning("%s was taken over by another process: nothing that came of it here is kept", self.name)
        return False

    def keep_in_directory(self) -> None:
        """Write predictions and record; an error costs a warning only, since the result outweighs its files."""
        result, predictions = self.ended, self.predictions
        if result is None or self.record is None:
            return
        if predictions is not None:
            write_or_warn(f"the predictions of {self.name}",
                          partial(write_predictions, predictions, self.directory / PREDICTIONS))  # fmt: skip
        # the run may have been made since the start
        self.record = replace(self.record, run_id=self.run_id).with_result(result, final_metrics(result))
        write_or_warn(f"the record of {self.name}", partial(self.record.write, self.directory))

    def keep_in_store(self) -> None:
        """End the run with the trial's result."""
        run, result = self.run, self.ended
        if run and result:
            write_or_warn(f"the run of {self.name}", lambda: run.finish(result, self.predictions))
            if self.record and run.run_id != self.record.run_id:  # it was created only now
                self.keep_in_directory()


def write_or_warn(what: str, write: Callable[[], object]) -> None:
    """Call ``write``; any exception becomes a warning that names ``what`` could not be written."""
    try:
        write()
    except Exception as error:  # any error: the rest of the trial must still be recorded
        log.warning("%s could not be written: %s", what, getattr(error, "strerror", None) or error)


def run_batch(trials: Sequence[Trial], solo_seconds: float | None = None) -> Sequence[Trial]:
    """Train trials that share model, text and engine in one call; each has its own run, directory and status.

    ``solo_seconds`` estimates what one of them would take alone. Every run and record is closed even after a signal,
    an exit or an error; see :func:`open_trials`.
    """
    with SignalGuard() as guard, open_trials(trials):
        began = time.perf_counter()
        with guard.released_at_steps():
            _train(trials, guard)
        if len(trials) > 1:
            _share_batch(trials, time.perf_counter() - began, solo_seconds)
    return trials


@contextmanager
def open_trials(trials: Sequence[Trial]) -> Iterator[None]:
    """Open a run and a record for each trial; close all of them at the end of the block, whatever ends it.

    A trial that has its result keeps it. Any other ends as INTERRUPTED if a signal or an exit ends the block, and as
    FAILED if an error does; the exception propagates. Nothing is recorded of a trial that another process has taken
    over. Signals must be deferred on entry and exit.
    """
    for trial in trials:
        _continue_interrupted(trial)
    records = [_begin(trial) for trial in trials]  # refuse trials before any run is open
    opened: list[Trial] = []
    try:
        for trial, record in zip(trials, records, strict=True):
            device = trial.settings.engine.device
            shares = trial.context.is_quiet and resolve_device(device).type == "cpu"  # GPUs are handed out
            is_alone = len(trials) == 1 and not shares
            trial.content = content_of(trial.job, trial.prepared, record.run_id, is_alone)
            trial.run = trial.store.begin(trial.content) if trial.store else None
            trial.record = replace(record, run_id=trial.run_id)
            opened.append(trial)
            _write_first(trial, trial.record)
        yield
    except BaseException as error:
        for trial in opened:
            trial.ended = trial.ended or _ended_by(error)
        raise
    finally:
        for trial in filter(Trial.holds_lease, opened):  # directories first: fast, and trial.json decides
            trial.keep_in_directory()
        for trial in filter(Trial.holds_lease, opened):
            trial.keep_in_store()


def _continue_interrupted(trial: Trial) -> None:
    """Let a trial continue the interrupted one that its sweep names, by moving checkpoints and record over.

    A trial starts anew if no checkpoint of it is on this host, or if they are of another precision or engine.
    """
    before, directory, settings, prepared = trial.context.continues, trial.directory, trial.settings, trial.prepared
    if before is None:
        return
    record, old, weights = read_record(before), before / checkpoints.DIRECTORY, prepared.model.used.fingerprint
    if before != directory and not old.exists():  # a host that takes a trial over leaves a record there
        log.info("no checkpoint of the interrupted trial is on this host, in %s: it starts over", before)
    if record is None or record.is_final:
        return
    try:
        asked = prepared_trial(settings, prepared), prepared.splits, weights, prepared.precision
        kept = checkpoints.identity_of(*asked)
        if record.identity != asdict(prepared.identity_of(settings)) or checkpoints.find_latest(old, kept) is None:
            return
    except SettingsError as error:
        log.info("the interrupted trial is not continued: %s", error)
        return
    if before != directory:
        replace(record, owner=Owner.of()).write(directory)
        for name in (UNDELIVERED, checkpoints.DIRECTORY):
            shutil.rmtree(directory / name, ignore_errors=True)
            if (before / name).exists():
                os.replace(before / name, directory / name)
    trial.job = replace(trial.job, settings=replace(settings, train=replace(settings.train, resume=True)))


def _begin(trial: Trial) -> Record:
    """Return a new record, or that of the interrupted trial; raises :class:`SettingsError` if it can't be resumed."""
    directory, identity = trial.directory, asdict(trial.prepared.identity_of(trial.settings))
    before, saves = read_record(directory), trial.settings.output.save_model
    theirs = [name for name in (MODEL, ADAPTER) if saves and not before and (directory / name).exists()]
    require(not theirs, "output.dir", "a trial's own directory, or one without what a trial replaces", str(directory),
            f"its {'/ and '.join(theirs)}/ is no trial's: name another with hydra.run.dir=...")  # fmt: skip
    found = before if trial.settings.train.resume else None
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
    return Record(identity, Status.RUNNING, Owner.of(), found.run_id if found else None)


def _write_first(trial: Trial, record: Record) -> None:
    """Write the record of a trial that begins, in place of an earlier trial's results, which are not its own.

    Raises :class:`SettingsError` if its directory can't be written.
    """
    directory = trial.directory
    try:
        if read_record(directory) and not trial.settings.train.resume:
            source = trial.prepared.model.directory
            for path in (directory / MODEL, directory / ADAPTER):
                if not source or not source.is_relative_to(path.resolve()):  # else this trial starts from there
                    shutil.rmtree(path, ignore_errors=True)
            (directory / PREDICTIONS).unlink(missing_ok=True)
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


def _train(opened: Sequence[Trial], guard: SignalGuard) -> None:
    """Train every trial and set its result."""
    prepared = opened[0].prepared
    console = Console(quiet=any(trial.context.is_quiet for trial in opened))
    engine = engine_for(prepared.engine)
    used = [prepared_trial(trial.settings, prepared) for trial in opened]
    with ProgressBars([trial.name for trial in opened], console) as progress:
        observer = _Observer(opened, progress, guard)
        for index, result in enumerate(engine.train(used, prepared.splits, observer)):
            reason = observer.reasons.get(index) if result.status is Status.PRUNED else None
            error = f"{result.error}: {reason}" if reason else result.error
            seconds = result.setup_seconds + prepared.seconds
            opened[index].ended = replace(result, error=error, setup_seconds=seconds)


def _share_batch(opened: Sequence[Trial], seconds: float, solo_seconds: float | None) -> None:
    """Add the batch's size, its seconds and the solo estimate to each result.

    The estimate is for all steps; a trial that ran out of patience gets its share of it, an unfinished one gets none.
    """
    for trial in opened:
        steps = BatchSchedule.of(trial.settings.train, len(trial.prepared.splits.train)).steps
        is_finished = trial.result.status is Status.FINISHED
        solo = solo_seconds * trial.result.steps / steps if solo_seconds and is_finished else None
        trial.ended = replace(
            trial.result, num_trials_in_batch=len(opened), batch_seconds=seconds, solo_seconds_estimate=solo
        )


class _Observer:
    """Passes what an engine reports to each trial's run, to the progress display, and to the pruning callback."""

    def __init__(self, opened: Sequence[Trial], progress: ProgressBars, guard: SignalGuard) -> None:
        self._opened, self._progress, self._guard = opened, progress, guard
        self.reasons: dict[int, str] = {}
        """Index of a pruned trial -> why it was pruned."""

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Log and show a step."""
        if run := self._opened[trial].run:
            run.on_step(record)
        self._progress.on_step(trial, record)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Log and show an evaluation; return whether the trial is to stop, because it was pruned or taken over."""
        context = self._opened[trial].context
        if context.lease and not context.lease.holds():
            return True
        if run := self._opened[trial].run:
            run.on_evaluation(evaluation)
        self._progress.on_evaluation(trial, evaluation)
        reason = context.pruning_callback(evaluation) if context.pruning_callback else None
        if reason:
            self.reasons[trial] = reason
        return bool(reason)

    def wants_checkpoint(self) -> bool:
        """Return whether a signal waits for one; raises :class:`TrialTakenOver` if all trials here were taken over."""
        leases = [trial.context.lease for trial in self._opened]
        if all(lease and lease.is_lost for lease in leases):
            raise TrialTakenOver("taken over by another process")
        return bool(self._guard.waiting)

    def on_checkpoint(self) -> None:
        """Deliver the waiting signal."""
        self._guard.deliver()

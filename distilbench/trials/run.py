"""Build, train, track, compare: the only place where sources, engines, tracking and reports meet."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from distilbench.engines import engine_for
from distilbench.identity import treatment_of
from distilbench.report.trial import (
    Comparison,
    compare,
    comparison_headline,
    comparison_markdown,
    comparison_metrics,
)
from distilbench.results import (
    MODEL,
    Evaluation,
    Predictions,
    Status,
    StepRecord,
    StoredTrial,
    TrialResult,
)
from distilbench.settings import AppSettings
from distilbench.tracking import MlflowStore
from distilbench.trials.card import write_card
from distilbench.trials.interruptions import SignalGuard, TakenOver
from distilbench.trials.opened import OpenTrial, open_trials, write_or_warn
from distilbench.trials.prepared import Prepared, SweepContext, prepared_trial
from distilbench.trials.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """A trial with its result, the run that keeps it (None without tracking), and how it compares."""

    settings: AppSettings
    prepared: Prepared
    result: TrialResult
    run_id: str | None
    name: str
    """The run's name."""
    predictions: Predictions | None
    """What the kept epoch said of the report split."""
    alone: bool
    """Whether it had the device to itself, so that its seconds are its own."""
    context: SweepContext
    comparison: Comparison | None = None
    """None for a baseline, and where there is none to compare with."""

    @property
    def stored(self) -> StoredTrial:
        """The trial as the store would give it back; only for one that has a result."""
        report, cpu_seconds = self.result.report, self.result.train_cpu_seconds
        assert report is not None
        return StoredTrial(
            run_id=self.run_id or "",
            name=self.name,
            protocol_id=self.prepared.protocol.id,
            treatment=treatment_of(self.settings, self.prepared.precision),
            seed=self.settings.seed,
            status=self.result.status,
            accuracy=report.accuracy,
            loss=report.loss,
            train_seconds=self.result.train_seconds,
            trainable_parameters=self.result.trainable_parameters,
            measured_on=self.prepared.measured_on,
            alone=self.alone,
            predictions=self.predictions,
            train_cpu_seconds=math.nan if cpu_seconds is None else cpu_seconds,
            train_flops=self.result.train_flops,
            solo_seconds_estimate=self.result.solo_seconds_estimate or math.nan,
            peak_memory_bytes=self.result.peak_memory_bytes,
            brier=report.brier,
            ece=report.ece,
            sweep=self.context.tags.get("distilbench.sweep", ""),
            number=self.context.tags.get("distilbench.trial", ""),
        )


def conclude(outcome: Outcome, store: MlflowStore | None, find: Callable[[], StoredTrial | None],
             is_swept: bool) -> Outcome:  # fmt: skip
    """Do what follows training, in no trial's time: compare, write the model's card, log the model if that is asked.

    ``find`` finds the baseline. Of a sweep's trials (``is_swept``), ``tracking.log_model=best`` means none yet.
    """
    outcome = add_comparison(outcome, store, find)
    write_or_warn(f"the card of {outcome.name}", partial(write_card, outcome))
    tracking, directory = outcome.settings.tracking, Path(outcome.settings.output.dir) / MODEL
    is_wanted = tracking.log_model == "always" or (tracking.log_model == "best" and not is_swept)
    if is_wanted and store and outcome.run_id and outcome.result.status is Status.FINISHED and directory.is_dir():
        store.log_model(outcome.run_id, directory, tracking.register)
    return outcome


def add_comparison(outcome: Outcome, store: MlflowStore | None, find: Callable[[], StoredTrial | None]) -> Outcome:
    """Compare a trial with the baseline that ``find`` finds and attach that to its run, where both have a result.

    A comparison that can't be made costs a warning: the trial has ended, and stands without it, a sweep's until the
    sweep's report.
    """
    if outcome.result.status is not Status.FINISHED or outcome.result.report is None:
        return outcome
    try:
        baseline = find()
        if baseline is None:
            return outcome
        protocol = outcome.prepared.protocol
        picked_here = outcome.context.picks and protocol.selection_split == protocol.report_split
        comparison = compare(outcome.stored, baseline, outcome.settings.margin, picked_here)
        if store and outcome.run_id:
            text, figures = comparison_markdown(comparison), comparison_metrics(comparison)
            store.add_comparison(outcome.run_id, text, figures, comparison_headline(comparison))
    except Exception as error:  # the boundary of a trial that has its result
        log.warning("%s could not be compared with its baseline: %s", outcome.name, error)
        return outcome
    return replace(outcome, comparison=comparison)


def run(
    settings: AppSettings, prepared: Prepared, store: MlflowStore | None, context: SweepContext | None = None
) -> Outcome:
    """Train one trial and keep what comes of it, whatever its end."""
    return run_batch([settings], prepared, store, [context or SweepContext()])[0]


def run_batch(
    trials: Sequence[AppSettings],
    prepared: Prepared,
    store: MlflowStore | None,
    contexts: Sequence[SweepContext],
    solo_seconds: float | None = None,
) -> list[Outcome]:
    """Train trials that share model, text and engine in one call; each has its own run, directory and status.

    ``solo_seconds`` is an estimate of what one of them would take alone. Whatever ends this, a signal, an exit or an
    error, every run and record is closed; see :func:`distilbench.trials.opened.open_trials`.
    """
    with SignalGuard() as guard, open_trials(trials, prepared, store, contexts) as opened:
        began = time.perf_counter()
        with guard.released_at_steps():
            _train(opened, prepared, guard)
        if len(opened) > 1:
            _share_batch(opened, time.perf_counter() - began, solo_seconds)
    return [_outcome(trial) for trial in opened]


def _train(opened: Sequence[OpenTrial], prepared: Prepared, guard: SignalGuard) -> None:
    """Give every trial its result."""
    console = Console(quiet=any(trial.context.is_quiet for trial in opened))
    engine = engine_for(prepared.engine)
    used = [prepared_trial(trial.settings, prepared) for trial in opened]
    with Progress([trial.name for trial in opened], console) as progress:
        observer = _Observer(opened, progress, guard)
        for trial, result in enumerate(engine.train(used, prepared.splits, observer)):
            seconds = result.setup_seconds + prepared.seconds
            opened[trial].result = replace(result, error=observer.explain(trial, result), setup_seconds=seconds)


def _share_batch(opened: Sequence[OpenTrial], seconds: float, solo_seconds: float | None) -> None:
    """Say in what company each result came about; the estimate is for trials that took all of their steps."""
    for trial in opened:
        if trial.result:
            solo = solo_seconds if trial.result.status is Status.FINISHED else None
            trial.result = replace(
                trial.result, num_trials_in_batch=len(opened), batch_seconds=seconds, solo_seconds_estimate=solo
            )


def _outcome(trial: OpenTrial) -> Outcome:
    assert trial.result is not None  # else the engine had raised
    run_id = trial.run.run_id if trial.run else None
    return Outcome(trial.settings, trial.prepared, trial.result, run_id, trial.name, trial.predictions, trial.alone,
                   trial.context)  # fmt: skip


class _Observer:
    """Hands what an engine reports to each trial's run, to the progress shown, and to who may stop the trial."""

    def __init__(self, opened: Sequence[OpenTrial], progress: Progress, guard: SignalGuard) -> None:
        self._opened, self._progress, self._guard = opened, progress, guard
        self._reasons: dict[int, str] = {}

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Log and show a step."""
        if run := self._opened[trial].run:
            run.on_step(record)
        self._progress.on_step(trial, record)

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Log and show an evaluation; return whether the trial is to stop, as its pruning callback says."""
        lease = self._opened[trial].context.lease
        if lease and not lease.holds():
            return True
        if run := self._opened[trial].run:
            run.on_evaluation(evaluation)
        self._progress.on_evaluation(trial, evaluation)
        prune = self._opened[trial].context.pruning_callback
        reason = prune(evaluation) if prune else None
        if reason:
            self._reasons[trial] = reason
        return bool(reason)

    def wants_checkpoint(self) -> bool:
        """Return whether a signal waits for one; raises :class:`TakenOver` where every trial here is another's now."""
        leases = [trial.context.lease for trial in self._opened]
        if all(lease and lease.is_lost for lease in leases):
            raise TakenOver("taken over by another process")
        return self._guard.is_waiting

    def on_checkpoint(self) -> None:
        """Let the signal through that waits."""
        self._guard.deliver()

    def explain(self, trial: int, result: TrialResult) -> str | None:
        """Return the result's error, with the callback's reason where that stopped the trial."""
        reason = self._reasons.get(trial) if result.status is Status.PRUNED else None
        return f"{result.error}: {reason}" if reason else result.error

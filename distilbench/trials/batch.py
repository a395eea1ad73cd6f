"""Train jobs in batches: what they share is prepared once, and those that fit one engine call are trained together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TypeVar

from distilbench.engines.batches import BatchSchedule
from distilbench.engines.moving_freeze import require_parts
from distilbench.identity import TrialIdentity, fusion_key, preparation_key, treatment_of
from distilbench.models.resolve import check_trial, resolve_model
from distilbench.report.trial import compare, comparison_headline, comparison_markdown, comparison_metrics
from distilbench.results import MODEL, Status, StoredTrial
from distilbench.settings import AppSettings, SettingsError
from distilbench.tracking.connect import open_store
from distilbench.trials.card import write_card
from distilbench.trials.estimate import estimate_alone
from distilbench.trials.prepared import Job, Prepared, SweepContext, prepare, prepared_trial
from distilbench.trials.run import Trial, run_batch, write_or_warn
from distilbench.trials.summary import print_outcome

log = logging.getLogger(__name__)

Kept = TypeVar("Kept")


def run_and_compare(job: Job) -> Trial:
    """Train one trial, after its baseline if ``baseline.ensure`` is set, and print how they compare."""
    trial = BatchRunner(max_trials=1).train_one(job)
    print_outcome(trial)
    return trial


class BatchRunner:
    """Train batches of jobs; what one batch resolved, opened or measured is reused by the next.

    ``max_trials`` limits how many trials are trained at once, and so how much work a kill can cost.
    """

    def __init__(self, max_trials: int) -> None:
        self._max_trials = max_trials
        self._open_store = cache(open_store)
        self._prepared: dict[Hashable, Prepared] = {}
        self._solo_seconds: dict[Hashable, float | None] = {}
        self._baselines: dict[Hashable, StoredTrial] = {}

    def train_one(self, job: Job) -> Trial:
        """Train one job; raises the exception that prevented its result."""
        (ended,) = self.train([job], lambda trial: trial)
        if isinstance(ended, Exception):
            raise ended
        return ended

    def train(self, jobs: Sequence[Job], keep: Callable[[Trial], Kept]) -> list[Kept | Exception]:
        """Train every job; returns, for each, ``keep(trial)`` or its exception. Trials are freed after each batch.

        A job that can't start raises :class:`SettingsError` before anything is trained; in a sweep, it is returned as
        that job's exception, and the others are trained. An error in a batch becomes the exception of all of its jobs;
        other batches continue. KeyboardInterrupt propagates.
        """
        ready: dict[int, Trial] = {}
        ended: dict[int, Kept | Exception] = {}
        for index, job in enumerate(jobs):
            try:
                store_of = partial(open_store, patiently=True) if job.context else self._open_store
                store, prepared = store_of(job.settings.tracking), self.prepare(job.settings)
                if job.context and job.context.accept:
                    job.context.accept(prepared)
                ready[index] = Trial(job, prepared, store)
            except SettingsError as error:
                if job.context is None:
                    raise
                ended[index] = error
        trained_here = {trial.prepared.identity_of(trial.settings) for trial in ready.values()}
        for batch in self._batches(ready):
            try:
                trials = [ready.pop(index) for index in batch]
                self._train_batch(trials, trained_here)
                ended |= zip(batch, map(keep, trials), strict=True)
                del trials  # free memory before the next batch
            except Exception as error:  # boundary: other batches go on
                ended |= dict.fromkeys(batch, error)
        return [ended[index] for index in range(len(jobs))]

    def prepare(self, settings: AppSettings) -> Prepared:
        """Resolve and encode, once, what trials share; raises :class:`SettingsError` if this one can't be trained."""
        key = preparation_key(settings), resolve_model(settings.model).used  # a local model may change meanwhile
        if key not in self._prepared:
            self._prepared[key] = prepare(settings)
        prepared = self._prepared[key]
        check_trial(prepared.model, settings)
        require_parts(settings.freeze, BatchSchedule.of(settings.train, len(prepared.splits.train)))
        return prepared

    def _batches(self, ready: Mapping[int, Trial]) -> list[list[int]]:
        """Return the indices of each batch, of at most ``max_trials``; batches with baselines come first."""
        together: dict[Hashable, list[int]] = defaultdict(list)
        for index, trial in ready.items():
            is_fused = trial.prepared.engine.name == "fused"
            together[(_kind_of(trial), id(trial.store)) if is_fused else index].append(index)
        size = self._max_trials
        batches = [some[start : start + size] for some in together.values() for start in range(0, len(some), size)]
        return sorted(batches, key=lambda batch: not any(ready[index].job.is_baseline for index in batch))

    def _train_batch(self, trials: Sequence[Trial], trained_here: Container[TrialIdentity]) -> None:
        for trial in trials:
            ensure = trial.settings.baseline.ensure and trial.job.context is None
            if ensure and _baseline_identity(trial) not in trained_here and not self._baseline_of(trial):
                self._train_baseline(trial)
        run_batch(trials, self._estimate_solo(trials[0]) if len(trials) > 1 else None)
        for trial in trials:
            if trial.result.status is Status.FINISHED and trial.job.is_baseline:
                self._baselines[_baseline_identity(trial)] = trial.stored
        for trial in trials:
            if trial.store and not trial.job.context:
                trial.store.catch_up(trial.directory)
            if not trial.job.is_baseline:
                compare_with(partial(self._baseline_of, trial), trial)
            write_card_and_log_model(trial)

    def _estimate_solo(self, trial: Trial) -> float | None:
        """Return the solo estimate for trials of this kind, measured only once; None if it fails."""
        kind = _kind_of(trial)
        if kind not in self._solo_seconds:
            try:
                self._solo_seconds[kind] = estimate_alone(trial.settings, trial.prepared)
            except SettingsError as error:
                log.warning("no estimate of a trial alone: %s", error)
                self._solo_seconds[kind] = None
        return self._solo_seconds[kind]

    def _baseline_of(self, trial: Trial) -> StoredTrial | None:
        """Return the newest finished baseline of a trial, or None."""
        key, baseline, prepared = _baseline_identity(trial), trial.job.baseline, trial.prepared
        if key not in self._baselines and trial.store:
            wanted = treatment_of(baseline, prepared.precision)
            found = trial.store.newest_baseline(prepared.protocol.id, wanted, baseline.seed)
            if found:
                self._baselines[key] = found
        return self._baselines.get(key)

    def _train_baseline(self, trial: Trial) -> None:
        log.info("no finished baseline of this protocol yet: training it first")
        settings, context = trial.job.baseline, SweepContext(f"baseline seed={trial.job.baseline.seed}")
        settings = replace(settings, output=replace(settings.output, dir=str(trial.directory / "baseline")))
        baseline = Trial(replace(trial.job, settings=settings, context=context), trial.prepared, trial.store)
        self._train_batch([baseline], ())
        if baseline.result.status is not Status.FINISHED:
            log.warning("the baseline %s: %s", baseline.result.status.lower(), baseline.result.error)


def _kind_of(trial: Trial) -> Hashable:
    """Return a key, equal for trials that can be trained at once."""
    return id(trial.prepared), fusion_key(prepared_trial(trial.settings, trial.prepared))


def _baseline_identity(trial: Trial) -> TrialIdentity:
    return trial.prepared.identity_of(trial.job.baseline)


def compare_with(find_baseline: Callable[[], StoredTrial | None], trial: Trial) -> None:
    """Compare a trial with its baseline and attach the comparison to its run, if both have a result.

    An error costs a warning only, since the trial has ended; a sweep's report compares its trials again.
    """
    if trial.result.status is not Status.FINISHED or trial.result.report is None:
        return
    try:
        baseline = find_baseline()
        if baseline is None:
            return
        protocol = trial.prepared.protocol
        selected_on_report_split = trial.context.is_selection and protocol.selection_split == protocol.report_split
        comparison = compare(trial.stored, baseline, trial.settings.margin, selected_on_report_split)
        if trial.store and trial.run_id:
            text, figures = comparison_markdown(comparison), comparison_metrics(comparison)
            trial.store.add_comparison(trial.run_id, text, figures, comparison_headline(comparison))
    except Exception as error:  # boundary: the trial has its result
        log.warning("%s could not be compared with its baseline: %s", trial.name, error)
    else:
        trial.comparison = comparison


def write_card_and_log_model(trial: Trial) -> None:
    """Write the model card, and log the model as ``tracking.log_model`` asks; a sweep logs its best one itself."""
    write_or_warn(f"the card of {trial.name}", partial(write_card, trial))
    tracking, directory, store = trial.settings.tracking, trial.directory / MODEL, trial.store
    is_wanted = tracking.log_model == "always" or (tracking.log_model == "best" and trial.job.context is None)
    if is_wanted and store and trial.run_id and trial.result.status is Status.FINISHED and directory.is_dir():
        store.log_model(trial.run_id, directory, tracking.register)

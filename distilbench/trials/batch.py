"""Several trials at once: what they share is prepared once, and those that their engine takes at once go together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distilbench.identity import fusion_key, preparation_key, trial_identity
from distilbench.models.resolve import check_trial
from distilbench.results import Status, StoredTrial
from distilbench.settings import AppSettings, SettingsError, TrackingSettings
from distilbench.tracking import MlflowStore, open_store
from distilbench.trials.prepared import Job, Prepared, SweepContext, prepare, prepared_trial
from distilbench.trials.run import Outcome, conclude, estimate_alone, find_baseline, run_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Ready:
    """A job with all that it needs to start."""

    job: Job
    prepared: Prepared
    store: MlflowStore | None

    @property
    def fusion_key(self) -> Hashable | None:
        """What jobs must share to be trained at once; None for one that is trained by itself."""
        if self.prepared.engine.name != "fused":
            return None
        return fusion_key(prepared_trial(self.job.settings, self.prepared))

    def identity(self, of: AppSettings) -> Hashable:
        """Return what tells a trial with the settings ``of`` from others in everything that a result depends on."""
        return trial_identity(self.prepared.protocol, of, self.prepared.precision)


class BatchRunner:
    """Train batches of jobs; what one batch resolved, opened or measured serves the next.

    ``max_trials`` bounds how many trials are trained at once, and so how much a kill can cost.
    """

    def __init__(self, max_trials: int) -> None:
        self._max_trials = max_trials
        self._stores: dict[TrackingSettings, MlflowStore | None] = {}
        self._prepared: dict[str, Prepared] = {}
        self._solo_seconds: dict[Hashable, float | None] = {}
        self._baselines: dict[Hashable, StoredTrial] = {}
        self._told_apart = False

    def train(self, jobs: Sequence[Job]) -> Iterator[Mapping[int, Outcome | Exception]]:
        """Train every job; yield, batch by batch, what became of each by its index in ``jobs``.

        First come the jobs that can't start (SettingsError), before anything is trained. What goes wrong for a whole
        batch is the exception of each of its jobs; other batches go on. KeyboardInterrupt passes through.
        """
        ready: dict[int, _Ready] = {}
        refused: dict[int, Exception] = {}
        for index, job in enumerate(jobs):
            try:
                ready[index] = self._ready(job)
            except SettingsError as error:
                refused[index] = error
        yield refused
        self._tell_if_apart(ready.values())
        trained_here = {r.identity(r.job.settings) for r in ready.values()}
        for batch in self._batches(ready):
            try:
                outcomes = self._train_batch([ready[index] for index in batch], trained_here)
                yield dict(zip(batch, outcomes, strict=True))
            except Exception as error:  # the jobs' boundary: other batches go on
                yield dict.fromkeys(batch, error)

    def _tell_if_apart(self, ready: Collection[_Ready]) -> None:
        engines = {r.prepared.engine.name for r in ready if r.fusion_key is None}
        if len(ready) > 1 and engines and not self._told_apart:
            self._told_apart = True
            log.warning("engine.name=%s trains one trial after another; engine=fused trains them at once", *engines)

    def _ready(self, job: Job) -> _Ready:
        settings = job.settings
        if settings.tracking not in self._stores:
            self._stores[settings.tracking] = open_store(settings.tracking, patiently=job.context is not None)
        key = preparation_key(settings)
        if key not in self._prepared:
            self._prepared[key] = prepare(settings)
        prepared = self._prepared[key]
        check_trial(prepared.model, settings)
        if job.context and job.context.accept:
            job.context.accept(prepared)
        return _Ready(job, prepared, self._stores[settings.tracking])

    def _batches(self, ready: Mapping[int, _Ready]) -> list[list[int]]:
        """Return indices of jobs to train at once, at most ``max_trials``; baselines first, to compare others with."""
        together: dict[Hashable, list[int]] = defaultdict(list)
        for index, r in ready.items():
            key = r.fusion_key
            alone = key is None
            together[index if alone else (preparation_key(r.job.settings), key, id(r.store))].append(index)
        size = self._max_trials
        batches = [some[start : start + size] for some in together.values() for start in range(0, len(some), size)]
        return sorted(batches, key=lambda batch: not any(ready[index].job.is_baseline for index in batch))

    def _train_batch(self, members: Sequence[_Ready], trained_here: set[Hashable]) -> list[Outcome]:
        for r in members:
            ensure = r.job.settings.baseline.ensure and r.job.context is None
            if ensure and r.identity(r.job.baseline) not in trained_here:
                self._baseline_of(r, ensure=True)
        first = members[0]
        settings = [r.job.settings for r in members]
        solo = self._solo(first) if len(members) > 1 else None
        contexts = [r.job.context or SweepContext() for r in members]
        outcomes = run_batch(settings, first.prepared, first.store, contexts, solo)
        for r, outcome in zip(members, outcomes, strict=True):
            if outcome.result.status is Status.FINISHED and r.job.is_baseline:
                self._baselines[r.identity(r.job.baseline)] = outcome.stored
        return [self._concluded(r, outcome) for r, outcome in zip(members, outcomes, strict=True)]

    def _solo(self, ready: _Ready) -> float | None:
        """Return the estimate for a trial of this kind alone, measured once in a sweep."""
        settings = ready.job.settings
        key = preparation_key(settings), ready.fusion_key
        if key not in self._solo_seconds:
            try:
                self._solo_seconds[key] = estimate_alone(settings, ready.prepared)
            except SettingsError as error:
                log.warning("no estimate of a trial alone: %s", error)
                self._solo_seconds[key] = None
        return self._solo_seconds[key]

    def _concluded(self, ready: _Ready, outcome: Outcome) -> Outcome:
        job = ready.job
        find = (lambda: None) if job.is_baseline else (lambda: self._baseline_of(ready, ensure=False))
        return conclude(outcome, ready.store, find, is_swept=job.context is not None)

    def _baseline_of(self, ready: _Ready, ensure: bool) -> StoredTrial | None:
        key = ready.identity(ready.job.baseline)
        if key not in self._baselines:
            found = find_baseline(ready.job, ready.prepared, ready.store, ensure)
            if found is None:
                return None
            self._baselines[key] = found
        return self._baselines[key]

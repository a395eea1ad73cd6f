"""Jobs trained to their ends: what they share is prepared once, and those that an engine takes at once go together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from distilbench.engines.moving_freeze import require_parts
from distilbench.engines.steps import BatchSchedule
from distilbench.identity import fusion_key, preparation_key, treatment_of, trial_identity
from distilbench.models.resolve import check_trial
from distilbench.results import Status, StoredTrial
from distilbench.settings import AppSettings, SettingsError, TrackingSettings
from distilbench.tracking import MlflowStore, open_store
from distilbench.trials.estimate import estimate_alone
from distilbench.trials.prepared import Job, Prepared, SweepContext, prepare, prepared_trial
from distilbench.trials.run import Outcome, conclude, run, run_batch
from distilbench.trials.summary import print_outcome

log = logging.getLogger(__name__)


def run_and_compare(job: Job) -> Outcome:
    """Train one trial, with its baseline first where ``baseline.ensure`` asks for it, and print how they compare."""
    runner = BatchRunner(max_trials=1)
    outcome = runner.train_one(job)
    print_outcome(job, outcome, runner.store_of(job))
    return outcome


@cache
def sweep_store(settings: TrackingSettings) -> MlflowStore | None:
    """Open a store once in a process, however many trials of sweeps it trains: it may be gone as a later one begins."""
    return open_store(settings, patiently=True)


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

    def train_one(self, job: Job) -> Outcome:
        """Train one job; raises what kept it from its end."""
        ended = [outcome for outcomes in self.train([job]) for outcome in outcomes.values()]
        if isinstance(ended[0], Exception):
            raise ended[0]
        return ended[0]

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
        apart = {r.prepared.engine.name for r in ready.values() if r.fusion_key is None}
        if len(ready) > 1 and apart and not self._told_apart:
            self._told_apart = True
            log.warning("engine.name=%s trains one trial after another; engine=fused trains them at once", *apart)
        trained_here = {r.identity(r.job.settings) for r in ready.values()}
        for batch in self._batches(ready):
            try:
                outcomes = self._train_batch([ready[index] for index in batch], trained_here)
                yield dict(zip(batch, outcomes, strict=True))
            except Exception as error:  # the jobs' boundary: other batches go on
                yield dict.fromkeys(batch, error)

    def store_of(self, job: Job) -> MlflowStore | None:
        """Open the store that a job's settings name, once."""
        if job.context:
            return sweep_store(job.settings.tracking)
        if job.settings.tracking not in self._stores:
            self._stores[job.settings.tracking] = open_store(job.settings.tracking)
        return self._stores[job.settings.tracking]

    def prepare(self, settings: AppSettings) -> Prepared:
        """Resolve and encode what trials of such settings share, once; raises where one of these can't be trained."""
        key = preparation_key(settings)
        if key not in self._prepared:
            self._prepared[key] = prepare(settings)
        prepared, train = self._prepared[key], settings.train
        check_trial(prepared.model, settings)
        require_parts(settings, BatchSchedule(len(prepared.splits.train), train.batch_size, train.epochs))
        return prepared

    def _ready(self, job: Job) -> _Ready:
        store, prepared = self.store_of(job), self.prepare(job.settings)
        if job.context and job.context.accept:
            job.context.accept(prepared)
        return _Ready(job, prepared, store)

    def _batches(self, ready: Mapping[int, _Ready]) -> list[list[int]]:
        """Return indices of jobs to train at once, at most ``max_trials``; baselines first, to compare others with."""
        together: dict[Hashable, list[int]] = defaultdict(list)
        for index, r in ready.items():
            key = r.fusion_key
            together[index if key is None else (preparation_key(r.job.settings), key, id(r.store))].append(index)
        size = self._max_trials
        batches = [some[start : start + size] for some in together.values() for start in range(0, len(some), size)]
        return sorted(batches, key=lambda batch: not any(ready[index].job.is_baseline for index in batch))

    def _train_batch(self, members: Sequence[_Ready], trained_here: set[Hashable]) -> list[Outcome]:
        for r in members:
            ensure = r.job.settings.baseline.ensure and r.job.context is None
            if ensure and r.identity(r.job.baseline) not in trained_here and not self._baseline_of(r):
                self._train_baseline(r)
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
        job, store, directory = ready.job, ready.store, Path(ready.job.settings.output.dir)
        if store and not job.context:
            store.catch_up(directory)
        if job.is_baseline:
            return conclude(outcome, store, lambda: None, is_swept=job.context is not None)
        return conclude(outcome, store, lambda: self._baseline_of(ready), is_swept=job.context is not None)

    def _baseline_of(self, ready: _Ready) -> StoredTrial | None:
        """Find the newest finished baseline of a job."""
        key, job, prepared = ready.identity(ready.job.baseline), ready.job, ready.prepared
        if key not in self._baselines and ready.store:
            wanted = treatment_of(job.baseline, prepared.precision)
            found = ready.store.newest_baseline(prepared.protocol.id, wanted, job.baseline.seed)
            if found:
                self._baselines[key] = found
        return self._baselines.get(key)

    def _train_baseline(self, ready: _Ready) -> None:
        log.info("no finished baseline of this protocol yet: training it first")
        baseline = ready.job.baseline
        directory = Path(ready.job.settings.output.dir) / "baseline"
        settings = replace(baseline, output=replace(baseline.output, dir=str(directory)))
        trained = run(settings, ready.prepared, ready.store)
        outcome = conclude(trained, ready.store, lambda: None, is_swept=True)
        if outcome.result.report is None:
            log.warning("the baseline %s: %s", outcome.result.status.lower(), outcome.result.error)
        else:
            self._baselines[ready.identity(baseline)] = outcome.stored

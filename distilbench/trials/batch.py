"""Several trials at once: what they share is prepared once, and those that their engine takes at once go together."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from distilbench.identity import fusion_key, preparation_key, trial_identity
from distilbench.models.resolve import check_freeze
from distilbench.report import Comparison, trial_line
from distilbench.results import Status, StoredTrial
from distilbench.settings import AppSettings, SettingsError, TrackingSettings
from distilbench.tracking import Store, open_store
from distilbench.trials.run import (
    Job,
    Outcome,
    Prepared,
    SweepContext,
    add_comparison,
    estimate_alone,
    find_baseline,
    prepare,
    prepared_trial,
    run_together,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """A trial that came to an end, with its comparison where there is a baseline."""

    outcome: Outcome
    comparison: Comparison | None

    @property
    def line(self) -> str:
        """The trial on one line."""
        return trial_line(self.outcome.name, self.outcome.result, self.comparison)


@dataclass(frozen=True)
class Entry:
    """A job to train; one that belongs to a sweep leaves its baseline to that."""

    job: Job
    context: SweepContext | None = None


@dataclass(frozen=True)
class _Ready:
    """A job with all that it needs to start."""

    job: Job
    context: SweepContext | None
    prepared: Prepared
    store: Store

    @property
    def fusion_key(self) -> Hashable | None:
        """What jobs must share to be trained at once; None for one that is trained by itself."""
        if self.prepared.engine.name != "fused":
            return None
        return fusion_key(prepared_trial(self.job.settings, self.prepared))

    def identity(self, of: AppSettings) -> Hashable:
        """Tells a trial with the settings ``of`` from others in everything that a result depends on."""
        return trial_identity(self.prepared.protocol, of, self.prepared.precision)


class BatchRunner:
    """Trains batches of jobs; what one batch resolved, opened or measured serves the next.

    ``max_trials`` bounds how many trials are trained at once, and so how much a kill can cost.
    """

    def __init__(self, max_trials: int) -> None:
        self._max_trials = max_trials
        self._stores: dict[TrackingSettings, Store] = {}
        self._prepared: dict[str, Prepared] = {}
        self._solo_seconds: dict[Hashable, float | None] = {}
        self._baselines: dict[Hashable, StoredTrial] = {}
        self._told_apart = False

    def train(self, entries: Sequence[Entry]) -> Iterator[Mapping[int, Trained | Exception]]:
        """Train every job; yields, group by group, what became of each by its place in ``entries``.

        First come the jobs that can't start (SettingsError), before anything is trained. What goes wrong for a whole
        group is the exception of each of its jobs; other groups go on. KeyboardInterrupt passes through.
        """
        ready: dict[int, _Ready] = {}
        refused: dict[int, Exception] = {}
        for index, entry in enumerate(entries):
            try:
                ready[index] = self._ready(entry)
            except SettingsError as error:
                refused[index] = error
        yield refused
        self._tell_if_apart(ready.values())
        trained_here = {r.identity(r.job.settings) for r in ready.values()}
        for group in self._groups(ready):
            members = [ready[index] for index in group]
            try:
                trained = self._train_group(members, trained_here)
                yield dict(zip(group, trained, strict=True))
            except Exception as error:  # the jobs' boundary: other groups go on
                yield dict.fromkeys(group, error)

    def _tell_if_apart(self, ready: Collection[_Ready]) -> None:
        engines = {r.prepared.engine.name for r in ready if r.fusion_key is None}
        if len(ready) > 1 and engines and not self._told_apart:
            self._told_apart = True
            log.warning("engine.name=%s trains one trial after another; engine=fused trains them at once", *engines)

    def _ready(self, entry: Entry) -> _Ready:
        settings = entry.job.settings
        if settings.tracking not in self._stores:
            self._stores[settings.tracking] = open_store(settings.tracking)
        key = preparation_key(settings)
        if key not in self._prepared:
            self._prepared[key] = prepare(settings)
        prepared = self._prepared[key]
        check_freeze(prepared.model, settings.freeze)
        if entry.context and entry.context.accept:
            entry.context.accept(prepared)
        return _Ready(entry.job, entry.context, prepared, self._stores[settings.tracking])

    def _groups(self, ready: Mapping[int, _Ready]) -> list[list[int]]:
        """Places of the jobs that train at once, at most ``max_trials``; baselines first: others are held to them."""
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for index, r in ready.items():
            key = r.fusion_key
            alone = key is None
            groups[index if alone else (preparation_key(r.job.settings), key, id(r.store))].append(index)
        size = self._max_trials
        parts = [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]
        return sorted(parts, key=lambda group: not any(ready[index].job.is_baseline for index in group))

    def _train_group(self, members: Sequence[_Ready], trained_here: set[Hashable]) -> list[Trained]:
        for r in members:
            ensure = r.job.settings.baseline.ensure and r.context is None
            if ensure and r.identity(r.job.baseline) not in trained_here:
                self._baseline_of(r, ensure=True)
        first = members[0]
        settings = [r.job.settings for r in members]
        solo = self._solo(first) if len(members) > 1 else None
        contexts = [r.context or SweepContext() for r in members]
        outcomes = run_together(settings, first.prepared, first.store, contexts, solo)
        for r, outcome in zip(members, outcomes, strict=True):
            if outcome.result.status is Status.FINISHED and r.job.is_baseline:
                self._baselines[r.identity(r.job.baseline)] = outcome.stored
        return [Trained(outcome, self._comparison(r, outcome)) for r, outcome in zip(members, outcomes, strict=True)]

    def _solo(self, ready: _Ready) -> float | None:
        """The estimate for a trial of this kind alone, measured once in a sweep."""
        settings = ready.job.settings
        key = preparation_key(settings), ready.fusion_key
        if key not in self._solo_seconds:
            try:
                self._solo_seconds[key] = estimate_alone(settings, ready.prepared)
            except SettingsError as error:
                log.warning("no estimate of a trial alone: %s", error)
                self._solo_seconds[key] = None
        return self._solo_seconds[key]

    def _comparison(self, ready: _Ready, outcome: Outcome) -> Comparison | None:
        if ready.job.is_baseline:
            return None
        return add_comparison(outcome, self._baseline_of(ready, ensure=False), ready.store)

    def _baseline_of(self, ready: _Ready, ensure: bool) -> StoredTrial | None:
        key = ready.identity(ready.job.baseline)
        if key not in self._baselines:
            found = find_baseline(ready.job, ready.prepared, ready.store, ensure)
            if found is None:
                return None
            self._baselines[key] = found
        return self._baselines[key]

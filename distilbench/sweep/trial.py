"""One trial in its sweep: who may prune it, which sources it takes, and the mean over its seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import counted
from distilbench.results import MEASURES, Evaluation, Owner, Record, Status, read_record
from distilbench.settings import AppSettings, TrackingSettings
from distilbench.sweep.devices import claim_gpu
from distilbench.sweep.heartbeat import Lease
from distilbench.sweep.job import NOBODY, SweepJob
from distilbench.sweep.pruning import judged_by, pruning_callback
from distilbench.sweep.sources import pin_sources

if TYPE_CHECKING:
    from distilbench.results import StoredTrial
    from distilbench.tracking import MlflowStore, ParentRun
    from distilbench.trials.prepared import Job, Prepared, SweepContext
    from distilbench.trials.run import Outcome


def run_in_sweep(job: Job, sweep_job: SweepJob) -> tuple[float, ...]:
    """Train one trial of a sweep; returns its objectives, NaN where it has none: ``trial.json`` says why."""
    from distilbench.trials.prepared import prepare

    store = _store_of(job.settings.tracking)
    lease = Lease(sweep_job)
    train = _train_seeds if job.settings.sweep.seeds else _train_one
    with lease.beating():
        claim_gpu(job.settings.engine.device)
        prepared = prepare(job.settings)
        pin_sources(prepared, job.settings, sweep_job)
        train(job, sweep_job, prepared, store, lease)
    return sweep_job.reached()


@cache
def _store_of(settings: TrackingSettings) -> MlflowStore | None:
    """Open a store once in a process, however many trials it trains: it may be gone as a later one begins."""
    from distilbench.tracking import open_store

    return open_store(settings, patiently=True)


def context_of(sweep_job: SweepJob, settings: AppSettings, lease: Lease) -> SweepContext:
    """Return what a trial has from its sweep: name, parent, tags, who may prune it, which sources it takes."""
    from distilbench.trials.prepared import SweepContext

    prune, judged = pruning_callback(sweep_job, settings.sweep), judged_by(sweep_job.objectives)

    def after_evaluation(evaluation: Evaluation) -> str | None:
        every = settings.train.eval_steps  # else once an epoch; a continued trial has had some of them before
        count = math.ceil(evaluation.step / every if every else evaluation.epoch)
        return prune(evaluation.metric(judged), count) if prune and judged else None

    return SweepContext(
        name=sweep_job.run_name,
        parent_run_id=sweep_job.parent_run_id,
        tags=sweep_job.tags,
        pruning_callback=after_evaluation,
        is_quiet=sweep_job.is_quiet,
        accept=lambda prepared: pin_sources(prepared, settings, sweep_job),
        lease=lease,
        continues=sweep_job.continues or sweep_job.directory,
        picks=sweep_job.picks,
    )


def _train_one(job: Job, sweep_job: SweepJob, prepared: Prepared, store: MlflowStore | None, lease: Lease) -> None:
    from distilbench.trials.run import run

    _conclude(job, run(job.settings, prepared, store, context_of(sweep_job, job.settings, lease)), store)


def _train_seeds(job: Job, sweep_job: SweepJob, prepared: Prepared, store: MlflowStore | None, lease: Lease) -> None:
    """Train the trial once for each seed, one after another, for as long as its pruner lets it."""
    from distilbench.trials.run import run

    prune, judged = pruning_callback(sweep_job, job.settings.sweep), judged_by(sweep_job.objectives)
    seeds = Seeds(job, sweep_job, store, lease)
    records: list[Record] = []
    reason = None
    with seeds.closing():
        for count, seeded in enumerate(seeds.jobs, start=1):
            _conclude(seeded, run(seeded.settings, prepared, store, seeded.context), store)
            records.append(seeds.record_of(seeded))
            if records[-1].status is not Status.FINISHED:
                break
            if prune and judged and count < len(seeds.jobs):
                reason = prune(statistics.fmean(record.objective(judged) for record in records), count)
            if reason:
                break
        seeds.finish(records, reason)


class Seeds:
    """A trial of a sweep that is trained once for each seed: a run above theirs, and what they come to together.

    ``jobs`` are the seeds', each in a run and a directory of its own.
    """

    def __init__(self, job: Job, sweep_job: SweepJob, store: MlflowStore | None, lease: Lease) -> None:
        """Open the trial's run and say in ``trial.json`` that it is under way."""
        self._sweep_job, self._lease = sweep_job, lease
        self._parent = _open_parent_run(sweep_job, store)
        self._begun = Record(NOBODY, Status.RUNNING, Owner.of_this_process(), self._parent.run_id)
        self._begun.write(sweep_job.directory)
        self.jobs = [self._with_seed(job, seed) for seed in job.settings.sweep.seeds or []]

    def _with_seed(self, job: Job, seed: int) -> Job:
        directory = self._sweep_job.directory / f"seed-{seed}"
        output = replace(job.settings.output, dir=str(directory))
        seed_job = replace(self._sweep_job, prunes=False)  # seeds are pruned as a whole
        context = context_of(seed_job, job.settings, self._lease)
        name = f"{self._sweep_job.run_name} seed={seed}"
        return replace(
            job,
            settings=replace(job.settings, seed=seed, output=output),
            baseline=replace(job.baseline, seed=seed),
            context=replace(
                context,
                name=name,
                parent_run_id=self._parent.run_id,
                continues=context.continues and context.continues / directory.name,
            ),
        )

    @staticmethod
    def record_of(seeded: Job) -> Record:
        """Return what the directory of one of ``jobs`` tells of it, once it has been trained."""
        record = read_record(Path(seeded.settings.output.dir))
        assert record is not None
        return record

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the trial as INTERRUPTED if a signal ends what is inside before there is a result."""
        try:
            yield
        except KeyboardInterrupt:
            record = read_record(self._sweep_job.directory)
            if (record and record.is_over) or not self._lease.holds():
                raise
            stopped = replace(self._begun, status=Status.INTERRUPTED, error="interrupted")
            stopped.write(self._sweep_job.directory)
            self._parent.finish(stopped.status, stopped.error)
            raise

    def finish(self, records: Sequence[Record], reason: str | None) -> None:
        """Keep the seeds' means, and the spread of each objective; ``reason`` is why the pruner stopped them.

        A seed that did not finish gives the trial its status; it stands last.
        """
        if not self._lease.holds():
            return
        last = records[-1]
        done = [record for record in records if record.status is Status.FINISHED]
        figures = _means([record.figures for record in done]) | {"seeds": float(len(done))}
        for name in self._sweep_job.objectives if len(done) > 1 else ():
            figures[f"{name}_std"] = statistics.stdev(record.objective(name) for record in done)
        record = replace(
            self._begun,
            identity={**last.identity, "seed": None},
            status=Status.PRUNED if reason else last.status,
            error=f"pruned after {counted(len(done), 'seed')}: {reason}" if reason else last.error,
            scores=_means([record.scores for record in done]),
            selection=_means([record.selection for record in done]),
            figures=figures,
        )
        record.write(self._sweep_job.directory)
        self._parent.update({**record.figures, **{k: v for k, v in record.scores.items() if k in MEASURES}})
        self._parent.finish(record.status, record.error)


def _open_parent_run(sweep_job: SweepJob, store: MlflowStore | None) -> ParentRun:
    from distilbench.tracking import ParentRun

    if store is None:
        return ParentRun()
    return store.open_parent_run(sweep_job.run_name, sweep_job.tags, sweep_job.directory, sweep_job.parent_run_id)


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {name: statistics.fmean(part[name] for part in parts) for name in shared}


def _conclude(job: Job, outcome: Outcome, store: MlflowStore | None) -> None:
    """Compare a trial that is not a baseline itself with the sweep's, or an earlier one, and see to its model."""
    from distilbench.trials.run import conclude, find_baseline

    def find() -> StoredTrial | None:
        return None if job.is_baseline else find_baseline(job, outcome.prepared, store, ensure=False)

    conclude(outcome, store, find, is_swept=True)

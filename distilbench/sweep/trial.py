"""One trial in its sweep: pruning, pinned sources, the choice of a GPU, and the mean over seeds."""

from __future__ import annotations

import logging
import math
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from distilbench.cli import pluralize
from distilbench.identity import short_hash
from distilbench.results import MEASURES, Evaluation, Owner, Record, Status, read_record
from distilbench.settings import METRICS, AppSettings, SettingsError, SweepSettings
from distilbench.sweep.job import UNRESOLVED_IDENTITY, Lease, SweepJob, send_heartbeats

if TYPE_CHECKING:
    import optuna

    from distilbench.trials.batch import BatchRunner
    from distilbench.trials.prepared import Job, Prepared, SweepContext

log = logging.getLogger(__name__)


def run_in_sweep(job: Job, sweep_job: SweepJob) -> tuple[float, ...]:
    """Train one trial of a sweep; returns its objectives, or NaN where it has none (``trial.json`` says why)."""
    from distilbench.trials.batch import BatchRunner

    lease, runner = Lease(sweep_job), BatchRunner(max_trials=1)
    with send_heartbeats(lease.holds, sweep_job.grace_seconds):
        claim_gpu(job.settings.engine.device)
        if job.settings.sweep.seeds:
            SeededTrial(job, sweep_job, lease, runner).train()
        else:
            runner.train_one(replace(job, context=context_of(sweep_job, job.settings, lease)))
    exit_if_orphaned(sweep_job)
    return sweep_job.final_objectives()


def exit_if_orphaned(job: SweepJob) -> None:
    """End a worker of joblib whose sweep was killed: it would wait for more work for good, and keep its memory."""
    if job.is_quiet and job.owner.is_dead():
        os._exit(0)  # nobody waits for its result, and its trial is recorded


def context_of(sweep_job: SweepJob, settings: AppSettings, lease: Lease) -> SweepContext:
    """Return what a sweep gives its trial: name, parent run, tags, pruning callback, and check of the sources."""
    from distilbench.trials.prepared import SweepContext

    prune, objective = pruning_callback(sweep_job, settings.sweep), pruning_objective(sweep_job.objectives)

    def after_evaluation(evaluation: Evaluation) -> str | None:
        every = settings.train.eval_steps  # else once per epoch; a resumed trial had some before
        count = math.ceil(evaluation.step / every if every else evaluation.epoch)
        return prune(evaluation.metric(objective), count) if prune and objective else None

    return SweepContext(
        name=sweep_job.run_name,
        tags=sweep_job.tags,
        pruning_callback=after_evaluation,
        is_quiet=sweep_job.is_quiet,
        accept=lambda prepared: pin_sources(prepared, settings, sweep_job),
        lease=lease,
        continues=sweep_job.continues or sweep_job.directory,
        is_selection=sweep_job.is_selection,
    )


class SeededTrial:
    """A trial of a sweep that is trained once per seed: its parent run, and the mean over the seeds.

    ``jobs`` has one job per seed, each with its own run and directory. ``remaining`` are those still to train: the
    others had finished before the trial was interrupted, and their records are kept.
    """

    def __init__(self, job: Job, sweep_job: SweepJob, lease: Lease, runner: BatchRunner) -> None:
        """Open the trial's run, or reopen an earlier one, and write to ``trial.json`` that the trial is RUNNING."""
        from distilbench.tracking.connect import open_store
        from distilbench.tracking.run import ParentRun

        prepared = runner.prepare(job.settings)  # refuse invalid settings before a run exists
        self._sweep_job, self._lease, self._runner = sweep_job, lease, runner
        self._prune = pruning_callback(sweep_job, job.settings.sweep)
        before = sweep_job.continues or sweep_job.directory
        store, record = open_store(job.settings.tracking, patiently=True), read_record(before)
        run_id = record.run_id if record else None
        given = sweep_job.run_name, sweep_job.tags, sweep_job.directory
        self._parent = store.open_parent_run(*given, run_id=run_id) if store else ParentRun()
        self._begun = Record(UNRESOLVED_IDENTITY, Status.RUNNING, Owner.of(), self._parent.run_id)
        self._begun.write(sweep_job.directory)
        self.jobs, self.remaining = [], []
        for seed in job.settings.sweep.seeds or []:
            seeded = self._job_with_seed(job, seed, before / f"seed-{seed}")
            self.jobs.append(seeded)
            earlier = read_record(before / f"seed-{seed}")
            identity = asdict(prepared.identity_of(seeded.settings))
            if earlier and earlier.status is Status.FINISHED and earlier.identity == identity:
                earlier.write(Path(seeded.settings.output.dir))
            else:
                self.remaining.append(seeded)

    def _job_with_seed(self, job: Job, seed: int, before: Path) -> Job:
        output = replace(job.settings.output, dir=str(self._sweep_job.directory / before.name))
        name, parent = f"{self._sweep_job.name} seed={seed}", self._parent.run_id
        # the trial is pruned as a whole
        seed_job = replace(self._sweep_job, name=name, parent_run_id=parent, continues=before, prunes=False)
        context = context_of(seed_job, job.settings, self._lease)
        settings = replace(job.settings, seed=seed, output=output)
        return replace(job, settings=settings, baseline=replace(job.baseline, seed=seed), context=context)

    def records(self, first: int | None = None) -> list[Record]:
        """Return the records of the ``first`` seeds, by default of all that have begun; unfinished ones come last.

        In a job that a scheduler requeued, seeds that are still to come can have records from its earlier start.
        """
        found = (read_record(Path(seeded.settings.output.dir)) for seeded in self.jobs[:first])
        return sorted(filter(None, found), key=lambda record: record.status is not Status.FINISHED)

    def train(self) -> None:
        """Train one seed after another, until one does not finish or the pruner stops the trial."""
        objective, reason = pruning_objective(self._sweep_job.objectives), None
        with self.closing():
            for count, seeded in enumerate(self.jobs, start=1):
                if seeded in self.remaining:
                    self._runner.train_one(seeded)
                records = self.records(count)
                if records[-1].status is not Status.FINISHED:
                    break
                if self._prune and objective and count < len(self.jobs):
                    reason = self._prune(statistics.fmean(record.objective(objective) for record in records), count)
                if reason:
                    break
            self.finish(reason)

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the trial as INTERRUPTED if a signal ends the block before there is a result."""
        try:
            yield
        except KeyboardInterrupt:
            record = read_record(self._sweep_job.directory)
            if not (record and record.is_final) and self._lease.holds():
                stopped = replace(self._begun, status=Status.INTERRUPTED, error="interrupted")
                stopped.write(self._sweep_job.directory)
                self._parent.finish(stopped.status, stopped.error)
            raise

    def finish(self, reason: str | None = None) -> None:
        """Record the means over seeds, and the standard deviation of each objective.

        With a pruner's ``reason``, the trial is PRUNED; otherwise, a seed that did not finish determines its status.
        """
        if not self._lease.holds():
            return
        records = self.records()
        last = records[-1]
        done = [record for record in records if record.status is Status.FINISHED]
        figures = _means([record.figures for record in done]) | {"seeds": float(len(done))}
        for name in self._sweep_job.objectives if len(done) > 1 else ():
            figures[f"{name}_std"] = statistics.stdev(record.objective(name) for record in done)
        record = replace(
            self._begun,
            identity={**last.identity, "seed": None},
            status=Status.PRUNED if reason else last.status,
            error=f"pruned after {pluralize(len(done), 'seed')}: {reason}" if reason else last.error,
            scores=_means([record.scores for record in done]),
            selection=_means([record.selection for record in done]),
            figures=figures,
        )
        record.write(self._sweep_job.directory)
        self._parent.update({**record.figures, **{k: v for k, v in record.scores.items() if k in MEASURES}})
        self._parent.finish(record.status, record.error)


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    shared = [name for name in parts[0] if all(name in part for part in parts)] if parts else []
    return {name: statistics.fmean(part[name] for part in parts) for name in shared}


SOURCES_ATTRIBUTE = "sources"
"""Attribute of a sweep's study: the model and the text that trials first used, by a hash of their settings."""


def pin_sources(prepared: Prepared, settings: AppSettings, job: SweepJob) -> None:
    """Record which model and text this trial really uses, so that all later trials of its sweep use the same.

    Raises :class:`SettingsError` if an earlier trial with the same settings used others. Does nothing if the study
    does not answer, of which the trial's lease warns.
    """
    from omegaconf.errors import OmegaConfBaseException

    from distilbench.sweep.storage import STORAGE_ERRORS, Storage, storage_of

    used = {"model": (settings.model, prepared.model.used), "data": (settings.data, prepared.text.used)}
    found = {f"{kind} {short_hash(asked)}": {"fingerprint": it.fingerprint, "is": it.describe()}
             for kind, (asked, it) in used.items()}  # fmt: skip
    try:
        storage = storage_of(job.storage, job.grace_seconds)
        with Storage(storage.url, job.storage).lock():
            study = storage.get_study_id_from_name(job.sweep)
            known: dict[str, Any] = storage.get_study_user_attrs(study).get(SOURCES_ATTRIBUTE, {})
            if not found.keys() <= known.keys():
                storage.set_study_user_attr(study, SOURCES_ATTRIBUTE, {**found, **known})
    except (*STORAGE_ERRORS, OmegaConfBaseException, KeyError):  # KeyError: the study was deleted
        return
    for key, now in found.items():
        kept = known.get(key, now)
        if kept["fingerprint"] != now["fingerprint"]:
            got = "other contents under that name" if kept["is"] == now["is"] else now["is"]
            raise SettingsError(
                f"{key.partition(' ')[0]} must be what the sweep {job.sweep!r} began with, {kept['is']} "
                f"({kept['fingerprint'][:12]}), got {got} ({now['fingerprint'][:12]}); make the first available again, "
                "or take another sweep.name"
            )


_held: list[FileLock] = []
"""Locks that are held for the life of the process; the operating system releases them when it dies."""


def claim_gpu(device: str) -> None:
    """Reserve one GPU for this process, before CUDA starts, if ``engine.device`` names none and several are visible."""
    from distilbench.engines.device import visible_gpus

    gpus = visible_gpus() if device in ("auto", "cuda") else []
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = claim_free(gpus, Path(tempfile.gettempdir()))


def claim_free(gpus: Sequence[str], folder: Path) -> str:
    """Lock the first free GPU by a file in ``folder`` and return it; warn and return the first GPU if none is free."""
    for gpu in gpus:
        lock = FileLock(folder / f"distilbench-{os.getuid()}-gpu-{gpu}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        _held.append(lock)
        return gpu
    log.warning("all of %d GPUs have a worker: this one shares GPU %s", len(gpus), gpus[0])
    return gpus[0]


PruningCallback = Callable[[float, int], str | None]
"""Takes an objective's current value and how often it was measured; returns why the trial is to stop, or None."""


def pruner_of(settings: SweepSettings) -> optuna.pruners.BasePruner:
    """Return the pruner of ``sweep.pruner``; raises :class:`SettingsError` for options that it does not accept."""
    import optuna

    if settings.pruner == "none":
        return optuna.pruners.NopPruner()  # a search may still set options for its own pruner
    options = {name: value for name, value in settings.pruner_options.items() if value is not None}
    within = {"wrapped_pruner": None} if settings.pruner == "patient" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the user chose it
            kind = getattr(optuna.pruners, f"{settings.pruner.title().replace('_', '')}Pruner")
            made: optuna.pruners.BasePruner = kind(**within, **options)
            return made
    except (TypeError, ValueError) as error:
        said = str(error).partition("__init__() ")[2] or str(error)
        raise SettingsError(
            f"sweep.pruner_options must be what Optuna's {settings.pruner} pruner takes, got {options}: {said}"
        ) from None


def pruning_objective(objectives: Sequence[str]) -> str | None:
    """Return the objective by which trials are pruned, the first one measured during training; None without one."""
    return next((name for name in objectives if name in METRICS), None)


def check_pruning(settings: SweepSettings, objectives: Sequence[str]) -> None:
    """Raise :class:`SettingsError` for a pruner that does not suit these objectives, or its options."""
    pruner_of(settings)
    if settings.pruner == "none":
        return
    if pruning_objective(objectives) is None:
        raise SettingsError(
            f"sweep.pruner must be none for sweep.objectives={list(objectives)}, got {settings.pruner!r}; "
            f"pruning takes an objective that is measured on the way: {', '.join(METRICS)}"
        )
    if settings.pruner == "wilcoxon" and len(objectives) > 1:
        raise SettingsError(
            f"sweep.pruner must be another than wilcoxon for sweep.objectives={list(objectives)}, which have no best "
            "trial to compare with; take median or percentile"
        )


def pruning_callback(job: SweepJob, settings: SweepSettings) -> PruningCallback | None:
    """Return a callback that reports to the study and asks its pruner; the sweep itself records how a trial ends.

    Optuna prunes only with one objective. With several, the pruner sees the one that :func:`pruning_objective` names.
    """
    name = pruning_objective(job.objectives)
    if not job.prunes or name is None:
        return None
    import optuna

    from distilbench.sweep.storage import STORAGE_ERRORS, storage_of

    storage = storage_of(job.storage, settings.grace_seconds)
    study = optuna.load_study(study_name=job.sweep, storage=storage, pruner=pruner_of(settings))
    study._directions = [study.directions[job.objectives.index(name)]]  # in this process only: the storage has all
    trial = optuna.trial.Trial(study, job.trial_id)

    def report(value: float, count: int) -> str | None:
        if not math.isfinite(value):
            return None  # the engine ends such a trial as DIVERGED
        try:
            trial.report(value, count)
            is_worse = not job.is_baseline and trial.should_prune()
        except (*STORAGE_ERRORS, KeyError):  # trains on, as without a pruner; its lease warns
            return None
        return f"{name} {value:.4f} at evaluation {count} ({settings.pruner})" if is_worse else None

    return report

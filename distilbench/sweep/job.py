"""A sweep's side of one trial: what the sweep tells its job, pruning, and the mean over seeds.

The sweep's process writes ``job.json`` into the trial's directory and names it in the job's environment, which every
launcher carries over; the job answers through ``trial.json``. Nothing else passes between the two.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from distilbench.identity import short_hash
from distilbench.results import MEASURES, Evaluation, Owner, Record, Status
from distilbench.settings import AppSettings, SettingsError, SweepSettings

if TYPE_CHECKING:
    from distilbench.tracking import MlflowStore, ParentRun
    from distilbench.trials.prepared import Job, Prepared, SweepContext
    from distilbench.trials.run import Outcome
from distilbench.sweep.pruning import pruner_of, storage_of

ENVIRONMENT = "DISTILBENCH_SWEEP_JOB"
"""Names the ``job.json`` of the trial that a job is to train."""

JOB = "job.json"

SOURCES = "sources.json"
"""In a sweep's directory: the model and the text that its first trials really used, by their settings."""

_GOES_UP = ("accuracy", "f1", "mcc")

_NOBODY: dict[str, object] = {"protocol": None, "treatment": None, "seed": None}


class Orphaned(RuntimeError):
    """The sweep that launched this job is gone, and another process may have taken its trial over."""


@dataclass(frozen=True)
class SweepJob:
    """One trial as its sweep sees it."""

    sweep: str
    trial: str
    """Its place in the sweep: the number of its directory."""
    name: str
    """What its run is called: what varies in the sweep."""
    is_baseline: bool
    parent_run_id: str | None
    owner: Owner
    """The process that runs the sweep."""
    directory: Path
    objectives: tuple[str, ...]
    is_quiet: bool = False
    """Whether the job shows nothing of its own, since others run beside it."""
    storage: str | None = None
    """Optuna's storage where the trial may be pruned, with study and trial in it; None where it may not. Interpolations
    such as ``${oc.env:NAME}`` stand in it unresolved, since a password would be written to disk."""
    study: str = ""
    trial_id: int = 0

    @property
    def sweep_directory(self) -> Path:
        """The directory of the whole sweep."""
        return self.directory.parents[len(Path(self.trial).parts) - 1]

    @property
    def tags(self) -> dict[str, str]:
        """What each run of this trial is found by."""
        kind = {"distilbench.role": "baseline"} if self.is_baseline else {}
        return {"distilbench.sweep": self.sweep, "distilbench.trial": self.trial} | kind

    def write(self) -> Path:
        """Write ``job.json`` into the trial's directory; returns its path."""
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / JOB
        path.write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")
        return path

    @classmethod
    def from_environment(cls) -> SweepJob | None:
        """The trial that this job was launched for; None outside of our sweeps."""
        path = os.environ.get(ENVIRONMENT)
        return cls.read(Path(path)) if path else None

    @classmethod
    def read(cls, path: Path) -> SweepJob:
        """Read the ``job.json`` that :meth:`write` wrote."""
        content = json.loads(path.read_text())
        known = {"owner": Owner(**content["owner"]), "directory": Path(content["directory"])}
        return cls(**content | known | {"objectives": tuple(content["objectives"])})

    def announce(self) -> None:
        """Say in ``trial.json`` that this process works on the trial; raises :class:`Orphaned` if its sweep is dead."""
        if self.owner.is_dead():
            raise Orphaned(f"the sweep {self.sweep} was killed before trial {self.trial} began; run it again")
        Record(_NOBODY, Status.RUNNING, Owner.of_this_process()).write(self.directory)


def directions_of(objectives: Sequence[str]) -> list[str]:
    """``maximize`` or ``minimize`` for each objective."""
    return ["maximize" if name in _GOES_UP else "minimize" for name in objectives]


def objectives_of(settings: AppSettings) -> tuple[str, ...]:
    """What a sweep with these settings optimises."""
    return tuple(settings.sweep.objectives or [settings.train.metric])


def run_in_sweep(job: Job, place: SweepJob) -> tuple[float, ...]:
    """Train one trial of a sweep; returns its objectives, NaN where it has none: ``trial.json`` says why."""
    from distilbench.tracking import open_store
    from distilbench.trials.prepared import prepare

    store = open_store(job.settings.tracking)
    prepared = prepare(job.settings)
    pin_sources(prepared, job.settings, place)
    train = _train_seeds if job.settings.sweep.seeds else _train_one
    train(job, place, prepared, store)
    return objectives_at(place)


def pin_sources(prepared: Prepared, settings: AppSettings, place: SweepJob) -> None:
    """Keep what this trial's model and text really are, for all of its sweep's later trials to be the same.

    Raises :class:`SettingsError` where an earlier trial, of this call or another, had others under the same settings.
    """
    from distilbench.models.resolve import used_now

    found = {"model": (settings.model, used_now(prepared.model)), "data": (settings.data, prepared.text.used)}
    path = place.sweep_directory / SOURCES
    with FileLock(path.with_name(f".{SOURCES}.lock")):
        known: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
        for group, (asked, used) in found.items():
            now = {"fingerprint": used.fingerprint, "is": used.describe()}
            kept = known.setdefault(f"{group} {short_hash(asked)}", now)
            if kept["fingerprint"] != now["fingerprint"]:
                raise SettingsError(_other_source(group, kept, now, place.sweep))
        partial = path.with_name(f".{SOURCES}.partial")
        partial.write_text(json.dumps(known, indent=2) + "\n")
        os.replace(partial, path)


def _other_source(group: str, kept: Mapping[str, str], now: Mapping[str, str], sweep: str) -> str:
    same_name = kept["is"] == now["is"]
    got = "other contents under that name" if same_name else now["is"]
    remedy = "put the first contents back" if same_name else "make the first available again"
    return (
        f"{group} must be what the sweep {sweep!r} began with, {kept['is']} ({kept['fingerprint'][:12]}), got {got} "
        f"({now['fingerprint'][:12]}); {remedy}, or take another sweep.name"
    )


def objectives_at(place: SweepJob) -> tuple[float, ...]:
    """What ``trial.json`` says of a trial that has ended: its objectives, NaN where it has none."""
    from distilbench.results import read_record

    record = read_record(place.directory)
    assert record is not None  # written by whatever trained the trial
    return tuple(record.objective(name) for name in place.objectives)


PruningCallback = Callable[[float, int], str | None]
"""Given the objective so far and how often it was measured: why the trial is to stop, or None."""


def context_of(place: SweepJob, settings: AppSettings) -> SweepContext:
    """What a trial with one seed has from its sweep: name, parent, tags, who may prune it, which sources it takes."""
    from distilbench.trials.prepared import SweepContext

    prune = _pruning_callback(place, settings.sweep)
    count = 0

    def after_evaluation(evaluation: Evaluation) -> str | None:
        nonlocal count
        count += 1
        return prune(evaluation.metric(place.objectives[0]), count) if prune else None

    accept = _accepting(settings, place)
    return SweepContext(place.name, place.parent_run_id, place.tags, after_evaluation, place.is_quiet, accept)


def _accepting(settings: AppSettings, place: SweepJob) -> Callable[[Prepared], None]:
    return lambda prepared: pin_sources(prepared, settings, place)


def _train_one(job: Job, place: SweepJob, prepared: Prepared, store: MlflowStore | None) -> None:
    from distilbench.trials.run import run

    context = context_of(place, job.settings)
    _compare(job, run(job.settings, prepared, store, context), store)


def _train_seeds(job: Job, place: SweepJob, prepared: Prepared, store: MlflowStore | None) -> None:
    """Train the trial once for each seed, one after another, for as long as its pruner lets it."""
    from distilbench.trials.run import run

    prune = _pruning_callback(place, job.settings.sweep)
    seeds = Seeds(job, place, store)
    records: list[Record] = []
    reason = None
    with seeds.closing():
        for count, seeded in enumerate(seeds.jobs, start=1):
            _compare(seeded, run(seeded.settings, prepared, store, seeded.context), store)
            records.append(seeds.record_of(seeded))
            if records[-1].status is not Status.FINISHED:
                break
            mean = statistics.fmean(record.objective(place.objectives[0]) for record in records)
            reason = prune(mean, count) if prune and count < len(seeds.jobs) else None
            if reason:
                break
        seeds.finish(records, reason)


class Seeds:
    """A trial of a sweep that is trained once for each seed: a run above theirs, and what they come to together.

    ``jobs`` are the seeds', each in a run and a directory of its own.
    """

    def __init__(self, job: Job, place: SweepJob, store: MlflowStore | None) -> None:
        """Open the trial's run and say in ``trial.json`` that it is under way."""
        from distilbench.tracking import NullParentRun
        from distilbench.trials.prepared import SweepContext

        self._place = place
        self._group: ParentRun = (
            store.open_parent_run(place.name, place.tags, place.parent_run_id) if store else NullParentRun()
        )
        self._begun = Record(_NOBODY, Status.RUNNING, Owner.of_this_process(), self._group.run_id)
        self._begun.write(place.directory)
        self._is_finished = False
        self.jobs = [
            _with_seed(
                job,
                seed,
                place.directory / f"seed-{seed}",
                SweepContext(
                    f"{place.name} seed={seed}",
                    self._group.run_id,
                    place.tags,
                    is_quiet=place.is_quiet,
                    accept=_accepting(job.settings, place),
                ),
            )
            for seed in job.settings.sweep.seeds or []
        ]

    @staticmethod
    def record_of(seeded: Job) -> Record:
        """What the directory of one of ``jobs`` tells of it, once it has been trained."""
        from distilbench.results import read_record

        record = read_record(Path(seeded.settings.output.dir))
        assert record is not None
        return record

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close the trial as INTERRUPTED where a signal ends what is inside before it is finished."""
        try:
            yield
        except KeyboardInterrupt:
            if self._is_finished:
                raise
            stopped = replace(self._begun, status=Status.INTERRUPTED, error="interrupted")
            stopped.write(self._place.directory)
            self._group.finish(stopped.status, stopped.error)
            raise

    def finish(self, records: Sequence[Record], reason: str | None) -> None:
        """Keep the seeds' means, and the spread of each objective; ``reason`` is why the pruner stopped them.

        A seed that did not finish gives the trial its status; it stands last.
        """
        last = records[-1]
        done = [record for record in records if record.status is Status.FINISHED]
        figures = _means([record.figures for record in done]) | {"seeds": float(len(done))}
        for name in self._place.objectives if len(done) > 1 else ():
            figures[f"{name}_std"] = statistics.stdev(record.objective(name) for record in done)
        record = replace(
            self._begun,
            identity={**last.identity, "seed": None},
            status=Status.PRUNED if reason else last.status,
            error=f"pruned after {len(done)} seeds: {reason}" if reason else last.error,
            scores=_means([record.scores for record in done]),
            selection=_means([record.selection for record in done]),
            figures=figures,
        )
        record.write(self._place.directory)
        self._group.update({**record.figures, **{k: v for k, v in record.scores.items() if k in MEASURES}})
        self._group.finish(record.status, record.error)
        self._is_finished = True


def _with_seed(job: Job, seed: int, directory: Path, context: SweepContext) -> Job:
    output = replace(job.settings.output, dir=str(directory))
    settings = replace(job.settings, seed=seed, output=output)
    return replace(job, settings=settings, baseline=replace(job.baseline, seed=seed), context=context)


def _means(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the means of what all of ``parts`` have."""
    common = [name for name in (parts[0] if parts else ()) if all(name in part for part in parts)]
    return {name: statistics.fmean(part[name] for part in parts) for name in common}


def _compare(job: Job, outcome: Outcome, store: MlflowStore | None) -> None:
    """Attach the comparison with the sweep's baseline, or an earlier one, to a trial that is not one itself."""
    from distilbench.trials.run import add_comparison, find_baseline

    if not job.is_baseline:
        add_comparison(outcome, store, lambda: find_baseline(job, outcome.prepared, store, ensure=False))


def _pruning_callback(place: SweepJob, settings: SweepSettings) -> PruningCallback | None:
    """Report to the study and ask its pruner; the trial's end is left to the sweep to tell."""
    if place.storage is None:
        return None
    import optuna

    study = optuna.load_study(study_name=place.study, storage=storage_of(place.storage), pruner=pruner_of(settings))
    trial = optuna.trial.Trial(study, place.trial_id)

    def report(value: float, count: int) -> str | None:
        if not math.isfinite(value):
            return None  # the engine ends such a trial as DIVERGED
        trial.report(value, count)
        is_worse = not place.is_baseline and trial.should_prune()
        return f"{place.objectives[0]} {value:.4f} at evaluation {count} ({settings.pruner})" if is_worse else None

    return report

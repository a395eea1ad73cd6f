"""The confirm command: trains a sweep's best settings and its baseline again, with fresh seeds, one trial at a time.

A confirmation is a sweep of its own, whose points are settings of the first sweep with fresh seeds. Exit status: 0 all
was trained, 1 a trial failed, 2 a setting is invalid, 128 + n interrupted by signal n; the same command continues.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import count, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distilbench.cli import CommandFailed, errors_in_one_line, pluralize, raise_on_signal, run_command
from distilbench.composition import default_margin, default_treatment
from distilbench.identity import short_hash
from distilbench.results import Status
from distilbench.settings import CONF, AppSettings, ConfirmSettings, SettingsError, register_schema, root, settings_from

if TYPE_CHECKING:
    from distilbench.report.findings import Report
    from distilbench.report.rows import Row
    from distilbench.sweep.executors import JobError
    from distilbench.sweep.job import SweepJob
    from distilbench.sweep.plan import SweepPlan
    from distilbench.sweep.space import Point
    from distilbench.tracking.search import SweepRun
    from distilbench.tracking.store import MlflowStore

register_schema()


@hydra.main(config_path=str(CONF), config_name="confirm")
def main(config: DictConfig) -> None:
    """Train the missing trials of the confirmation, then report it."""
    with errors_in_one_line():
        if failure := confirm(settings_from(config, ConfirmSettings)):
            raise CommandFailed(failure)


def confirm(settings: ConfirmSettings) -> str | None:
    """Run the confirmation; return one line about failures, or None. Raises :class:`SettingsError` before training."""
    from distilbench.report.findings import by_score
    from distilbench.report.from_store import report_sweep
    from distilbench.sweep.executors import Executor
    from distilbench.sweep.runner import run_plan
    from distilbench.sweep.space import Point
    from distilbench.sweep.storage import storage_at
    from distilbench.tracking.connect import find_store
    from distilbench.tracking.search import CONFIRMS_TAG, SWEEP_TAG

    assert settings.sweep is not None  # ConfirmSettings requires it
    store = find_store(settings.tracking)
    name = settings.name or f"{settings.sweep}-confirm"
    own = store.sweep_run(name)
    if own and own.confirms != settings.sweep:
        raise SettingsError(f"name must be free or that of a confirmation of {settings.sweep}, got {name!r}; "
                            "choose another name=...")  # fmt: skip
    searched, report = _find_report(store, settings)
    assert report.baseline is not None
    rows = {short_hash(row.treatment): row for row in (report.baseline, *by_score(report.candidates)[: settings.top])}
    settings_by_treatment = {key: _settings_of(row, store, settings, report.margin) for key, row in rows.items()}
    number = settings.seeds if isinstance(settings.seeds, int) else _seeds_needed(store, report, [*rows.values()])
    used = {trial.seed for row in report.rows for trial in row.all_trials}
    # seed by seed, so that an interruption leaves every setting with the same seeds
    seeds = islice((seed for seed in count(1) if seed not in used), number)
    points = [Point({}, (key, f"seed={seed}"), row.is_baseline) for seed in seeds for key, row in rows.items()]
    done = {(short_hash(trial.treatment), f"seed={trial.seed}")
            for trial in store.search({SWEEP_TAG: name}) if trial.status is Status.FINISHED}  # fmt: skip
    missing = [point for point in points if point.extra not in done]
    _print_plan(settings.sweep, rows, missing)
    if settings.dry_run:
        return None
    raise_on_signal()
    directory = Path(settings.output or root() / "outputs" / "sweeps" / name).absolute()
    if not (directory / "study.db").exists():  # any finished trials were trained on another host
        points = missing
    if not points:
        report_sweep(store, name, directory, default_treatment(), report.margin)
        return None
    plan = _plan(name, directory, settings.sweep, rows, next(iter(settings_by_treatment.values())), points)
    _check_protocol(plan.settings, report.sample.protocol_id)
    executor = Executor(lambda jobs: [_train(job, settings_by_treatment, rows) for job in jobs], at_once=1)
    tags = {CONFIRMS_TAG: settings.sweep, f"{CONFIRMS_TAG}_run": searched.run_id}
    return run_plan(plan, storage_at(None, None, directory), executor, tags)


def _find_report(store: MlflowStore, settings: ConfirmSettings) -> tuple[SweepRun, Report]:
    """Return the sweep and its report; raises :class:`SettingsError` without a candidate or a baseline."""
    from distilbench.report.from_store import find_sweep, report_of_sweep

    searched = find_sweep(store, settings.sweep or "")
    if searched.confirms:
        raise SettingsError(f"sweep must be a search, got {searched.name!r}, itself a confirmation of "
                            f"{searched.confirms}; for more seeds: sweep={searched.confirms} seeds=...")  # fmt: skip
    margin = settings.margin or searched.margin or default_margin()
    report = report_of_sweep(store, searched, default_treatment(), margin)
    if report is None or report.baseline is None:
        raise SettingsError(f"sweep must have a baseline, got {searched.name!r} without one; run it again to add one")
    if not report.candidates:
        others = Counter(trial.status.value for row in report.rows if not row.is_baseline for trial in row.other_trials)
        ended = ", ".join(f"{number} {status}" for status, number in others.items()) or "no other"
        raise SettingsError(
            f"sweep must have a finished setting beside its baseline, got {searched.name!r} with {ended}; run it again "
            "with sweep.retry_failed=true (DIVERGED trials would diverge again), or sweep other settings"
        )
    return searched, report


def _seeds_needed(store: MlflowStore, report: Report, rows: Sequence[Row]) -> int:
    """Return how many fresh seeds are needed; raises :class:`SettingsError` with the reason if no number will do."""
    from distilbench.report.comparison import needed_to_confirm
    from distilbench.report.from_store import with_predictions
    from distilbench.report.words import what_decides

    base, *best = (with_predictions(store, row) for row in rows)  # the report loads them only for the rows it tests
    is_chosen_here = report.sample.selection_split == report.sample.report_split
    needed = needed_to_confirm(best, base, report.margin, report.num_settings if is_chosen_here else len(best))
    if needed and needed.seeds:
        return needed.seeds
    why = what_decides(needed, base.examples) if needed else "predictions to tell it by are missing"
    raise SettingsError(
        f"seeds must be a number where auto finds none for a margin of {pluralize(report.margin, 'point')}, got auto: "
        f"{why}; add seeds=5, or a wider margin=..."
    )


def _plan(name: str, directory: Path, sweep: str, rows: Mapping[str, Row], settings: AppSettings,
          points: Sequence[Point]) -> SweepPlan:  # fmt: skip
    from distilbench.sweep.job import directions_of
    from distilbench.sweep.plan import SweepPlan
    from distilbench.sweep.space import Space

    objectives = (settings.train.metric,)
    return SweepPlan(
        settings=settings,
        space=Space({}, []),
        points=points,
        outside_baselines=[],
        total=len(points),
        is_grid=True,
        objectives=objectives,
        directions=directions_of(objectives),
        name=name,
        directory=directory,
        fixed={"confirms": sweep},
        result_key=lambda point: point.key,
        name_of=lambda point: f"{rows[point.extra[0]].label} {point.extra[1]}",
        requires_all=True,
    )


def _train(job: SweepJob, settings_by_treatment: Mapping[str, AppSettings], rows: Mapping[str, Row]) -> JobError:
    """Train the trial of one point in this process; return the error that ended it, or None."""
    from distilbench.sweep.job import Lease
    from distilbench.sweep.trial import run_in_sweep
    from distilbench.trials.prepared import Job

    key, seed = job.overrides[0], int(job.overrides[1].removeprefix("seed="))
    settings, baseline = (
        replace(one, seed=seed) for one in (settings_by_treatment[key], next(iter(settings_by_treatment.values())))
    )
    settings = replace(settings, output=replace(settings.output, dir=str(job.directory)))
    Lease(job).announce()
    try:
        run_in_sweep(Job(settings, baseline, baseline_command=str, choices=rows[key].choices), job)
    except Exception as error:  # the trial's boundary
        return error
    return None


def _check_protocol(settings: AppSettings, protocol_id: str) -> None:
    """Raise :class:`SettingsError` if model or text differ from what the sweep used."""
    from distilbench.trials.prepared import prepare

    found = prepare(settings).protocol
    if found.id != protocol_id:
        raise SettingsError(
            f"the sweep's protocol must be what trains now, got {found.id} instead of {protocol_id} "
            f"({found.model.describe()} on {found.data.describe()}); make the same model and data available"
        )


def _settings_of(row: Row, store: MlflowStore, asked: ConfirmSettings, margin: float) -> AppSettings:
    """Return the settings of a row's first trial, from its run, adapted for training it again on its own."""
    run_id = row.first_trial.run_id
    try:
        recorded = settings_from(OmegaConf.create(store.config(run_id)))
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"run {run_id} must have the settings of this version of distilbench, got a config.yaml that has not "
            f"({type(error).__name__}); run the sweep again"
        ) from None
    alone = replace(recorded.sweep, seeds=None, pruner="none", pruner_options={}, max_failures=None,
                    timeout_minutes=None, retry_failed=True, retry_lost=True, on_change="extend")  # fmt: skip
    train, output = replace(recorded.train, resume=False), replace(recorded.output, save_model=False)
    return replace(recorded, sweep=alone, train=train, output=output, tracking=asked.tracking, margin=margin)


def _print_plan(sweep: str, rows: Mapping[str, Row], missing: Sequence[Point]) -> None:
    """Print what is about to be trained and about how long it takes."""
    from distilbench.report.formats import duration, one_line

    each = [rows[point.extra[0]].cost.seconds for point in missing]
    seconds = sum(one for one in each if one == one)  # NaN where none was recorded
    pace = f", about {duration(seconds)} at the sweep's pace" if seconds else ""
    print(f"confirming sweep {sweep}: {pluralize(len(missing), 'trial')} to train{pace}")
    for key, row in rows.items():
        seeds = [int(point.extra[1].removeprefix("seed=")) for point in missing if point.extra[0] == key]
        runs = [[seed for _, seed in run] for _, run in groupby(enumerate(seeds), lambda one: one[1] - one[0])]
        if seeds:
            told = ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else f"{run[0]}" for run in runs)
            print(f"  {one_line(row.name)}: seeds {told}")


if __name__ == "__main__":
    run_command(main)

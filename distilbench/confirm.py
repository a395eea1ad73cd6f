"""Does a sweep's winner still win? Its best settings and the baseline again, with fresh seeds, one trial at a time.

A confirmation is a sweep of its own that names the first. Exit status: 0 all was trained, 1 a trial failed, 2 something
to mend, 130 and 143 interrupted: the same command continues.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from distilbench.cli import cli as run_command_line
from distilbench.cli import end_cleanly
from distilbench.composition import default_treatment
from distilbench.identity import preparation_key, short_hash
from distilbench.results import BASELINE_ROLE, Status, StoredTrial
from distilbench.settings import CONF, AppSettings, ConfirmSettings, SettingsError, register_schema, settings_from

if TYPE_CHECKING:
    from distilbench.report.findings import Report
    from distilbench.report.rows import Row
    from distilbench.tracking import MlflowStore, ParentRun
    from distilbench.trials.prepared import Prepared

register_schema()


@dataclass(frozen=True)
class Cell:
    """One trial to train: a setting with one fresh seed, and the seconds that the sweep's own trials took."""

    label: str
    settings: AppSettings
    treatment: str
    is_baseline: bool
    seconds: float


@hydra.main(config_path=str(CONF), config_name="confirm")
def main(config: DictConfig) -> None:
    """Train what is missing of the confirmation, then report it."""
    try:
        failed = confirm(settings_from(config, ConfirmSettings))
    except SettingsError as error:
        print(f"distilbench: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    if failed:
        print(f"distilbench: {failed} trials did not finish; the same command trains them again", file=sys.stderr)
        sys.exit(1)


def confirm(settings: ConfirmSettings) -> int:
    """Run the confirmation; returns how many of its trials failed. Raises :class:`SettingsError` before the first."""
    from distilbench.report.from_store import CONFIRMS, report_sweep
    from distilbench.tracking import SWEEP, RunFilter, find_store

    assert settings.sweep is not None  # ConfirmSettings requires it
    store = find_store(settings.tracking)
    name = settings.name or f"{settings.sweep}-confirm"
    directory = Path(settings.output or Path("outputs") / "sweeps" / name)
    report = _first_report(store, settings.sweep)
    own = store.sweep_run(name)
    if own is not None and own.tags.get(CONFIRMS) != settings.sweep:
        raise SettingsError(f"name must be free or that of a confirmation of {settings.sweep}, got {name!r}; "
                            "choose another name=...")  # fmt: skip
    known = store.search(RunFilter(tags={SWEEP: name}))
    cells = list(_missing(store, settings, report, known))
    _announce(settings, cells)
    if settings.dry_run:
        return 0
    end_cleanly()
    group = store.open_parent_run(name, _tags(store, settings.sweep, name), run_id=own.run_id if own else None)
    group.close_dead(lambda owner: owner.is_dead())
    try:
        failed = _train(cells, store, group, directory, report.sample.protocol_id, name)
    except KeyboardInterrupt:
        group.finish(Status.INTERRUPTED, "interrupted; the same command continues")
        raise
    report_sweep(store, name, directory, default_treatment())
    group.finish(Status.FAILED if failed else Status.FINISHED)
    return failed


def _first_report(store: MlflowStore, sweep: str) -> Report:
    """The sweep's own report; refuses one that has nothing to confirm, or nothing to compare it with."""
    from distilbench.report.from_store import CONFIRMS, ReportRequest, check_protocol, find_sweep, make_report
    from distilbench.tracking import SWEEP, RunFilter

    parent = find_sweep(store, sweep)
    if CONFIRMS in parent.tags:
        raise SettingsError(f"sweep must be a search, got {sweep!r}, itself a confirmation of {parent.tags[CONFIRMS]}; "
                            f"for more seeds: sweep={parent.tags[CONFIRMS]} seeds=...")  # fmt: skip
    trials = store.search(RunFilter(tags={SWEEP: sweep}))
    if not trials:
        raise SettingsError(f"sweep must have trials, got {sweep!r}, which has none; run it first")
    check_protocol(trials)
    report = make_report(store, trials, ReportRequest(f"Sweep {sweep}", default_treatment(), sweep=parent))
    if report.baseline is None or not report.candidates:
        lacking = "baseline" if report.baseline is None else "finished setting beside its baseline"
        raise SettingsError(f"sweep must have a {lacking}, got {sweep!r} without one; run it again to add one")
    return report


def _missing(
    store: MlflowStore, settings: ConfirmSettings, report: Report, known: Sequence[StoredTrial]
) -> Iterator[Cell]:
    """What is left to train, seed by seed, so that an interruption leaves every setting with the same seeds."""
    from distilbench.report.findings import by_score

    assert report.baseline is not None
    rows = [report.baseline, *by_score(report.candidates)[: settings.top]]
    started = {short_hash(row.treatment): _settings_of(store, row) for row in rows}
    done = {(short_hash(t.treatment), t.seed) for t in known if t.status is Status.FINISHED}
    for seed in fresh_seeds(report, settings.seeds):
        for row in rows:
            key = short_hash(row.treatment)
            if (key, seed) not in done:
                chosen = replace(started[key], seed=seed, tracking=settings.tracking)
                yield Cell(row.label, chosen, key, row.is_baseline, row.cost.seconds)


def fresh_seeds(report: Report, number: int) -> list[int]:
    """The first ``number`` seeds from 1 on that no trial of the sweep had; the same ones whenever it is asked."""
    used = {trial.seed for row in report.rows for trial in row.all_trials}
    return list(islice((seed for seed in count(1) if seed not in used), number))


def _settings_of(store: MlflowStore, row: Row) -> AppSettings:
    """The settings that a row's first trial was started with, from its run."""
    run_id = row.all_trials[0].run_id
    try:
        return settings_from(OmegaConf.create(store.config(run_id)))
    except (OmegaConfBaseException, KeyError, TypeError, AttributeError) as error:
        raise SettingsError(
            f"run {run_id} must have the settings of this version of distilbench, got a config.yaml that has not "
            f"({type(error).__name__}); run the sweep again"
        ) from None


def _announce(settings: ConfirmSettings, cells: Sequence[Cell]) -> None:
    """Say what is about to be trained and about how long that takes."""
    from distilbench.report import duration
    from distilbench.report.formats import one_line

    seconds = sum(cell.seconds for cell in cells if cell.seconds == cell.seconds)  # NaN where none was recorded
    pace = f"about {duration(seconds)} at the sweep's pace"
    print(f"confirming sweep {settings.sweep}: {len(cells)} trials to train, {pace}")
    for label in dict.fromkeys(cell.label for cell in cells):
        seeds = ", ".join(str(cell.settings.seed) for cell in cells if cell.label == label)
        print(f"  {one_line(label)}: seeds {seeds}")


def _tags(store: MlflowStore, sweep: str, name: str) -> dict[str, str]:
    from distilbench.report.from_store import CONFIRMS
    from distilbench.tracking import SWEEP

    first = store.sweep_run(sweep)
    return {SWEEP: name, CONFIRMS: sweep, f"{CONFIRMS}_run": first.run_id if first else ""}


def _train(
    cells: Sequence[Cell], store: MlflowStore, group: ParentRun, directory: Path, protocol_id: str, name: str
) -> int:
    """Train the cells in turn, each in the next free directory; returns how many did not finish."""
    from distilbench.tracking import SWEEP
    from distilbench.trials.prepared import SweepContext
    from distilbench.trials.run import run

    prepared: dict[str, Prepared] = {}
    numbers = (n for n in count(_next_number(directory)) if not (directory / str(n)).exists())
    failed = 0
    for cell, number in zip(cells, numbers, strict=False):
        ready = _prepared(cell.settings, prepared, protocol_id)
        output = replace(cell.settings.output, dir=str((directory / str(number)).absolute()), save_model=False)
        chosen = replace(cell.settings, output=output, train=replace(cell.settings.train, resume=False))
        tags = {SWEEP: name, "distilbench.trial": str(number)}
        tags |= {"distilbench.role": BASELINE_ROLE} if cell.is_baseline else {}
        outcome = run(chosen, ready, store, SweepContext(f"{cell.label} seed={chosen.seed}", group.run_id, tags))
        failed += outcome.result.status is not Status.FINISHED
    return failed


def _next_number(directory: Path) -> int:
    numbers = [int(path.name) for path in directory.glob("*") if path.name.isdigit()]
    return max(numbers, default=-1) + 1


def _prepared(settings: AppSettings, ready: dict[str, Prepared], protocol_id: str) -> Prepared:
    """Sources and splits for these settings, read once; refuses those that are no longer what the sweep used."""
    from distilbench.trials.prepared import prepare

    key = preparation_key(settings)
    if key not in ready:
        ready[key] = prepare(settings)
    found = ready[key].protocol
    if found.id != protocol_id:
        raise SettingsError(
            f"the sweep's protocol must be what trains now, got {found.id} instead of {protocol_id} "
            f"({found.model.describe()} on {found.data.describe()}); make the same model and data available"
        )
    return ready[key]


def cli() -> None:
    """Run :func:`main` as the command line does."""
    run_command_line(main)


if __name__ == "__main__":
    cli()

"""The report command: compares stored trials with their baseline in accuracy and cost.

Exit status: 0 a report was made, 2 a setting is invalid.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from distilbench.cli import errors_in_one_line, pluralize, run_command
from distilbench.composition import default_margin, default_treatment
from distilbench.identity import has_choices_of, short_hash, value_of
from distilbench.results import StoredTrial
from distilbench.settings import CONF, CompareSettings, SettingsError, register_schema, require, root, settings_from

if TYPE_CHECKING:
    from distilbench.report.findings import Report
    from distilbench.tracking.store import MlflowStore

register_schema()


@hydra.main(config_path=str(CONF), config_name="compare")
def main(config: DictConfig) -> None:
    """Print the report and write its files."""
    with errors_in_one_line():
        compare_stored(settings_from(config, CompareSettings))


def compare_stored(settings: CompareSettings) -> None:
    """Print the report and write its files; raises :class:`SettingsError` before anything is written."""
    from rich.console import Console

    from distilbench.report.from_store import write_report
    from distilbench.report.tables import print_report

    report = report_of(settings)
    console = Console()
    print_report(console, report, settings.layout)
    for path in write_report(report, _directory(settings), settings.layout):
        console.print(f"report  {path}", markup=False, highlight=False, soft_wrap=True)


def report_of(settings: CompareSettings) -> Report:
    """Find the trials and report on them; needs an initialised Hydra."""
    known = sorted(GlobalHydra.instance().config_loader().get_group_options("experiment"))
    for name in settings.experiments:
        require(name in known, "experiment", f"one of {', '.join(known)}", name)
    from distilbench.report.from_store import ReportRequest, check_protocol, check_tested, make_report
    from distilbench.tracking.connect import find_store

    store = find_store(settings.tracking)
    store.end_left_runs()
    trials, names = _select_trials(store, settings)
    check_protocol(trials)
    parent = store.sweep_run(settings.sweep) if settings.sweep else None
    margin = settings.margin or (parent and parent.margin) or default_margin()
    title = f"Experiments {', '.join(settings.experiments)}" if settings.experiments else None
    title = f"Sweep {settings.sweep}" if settings.sweep else title or pluralize(len(settings.runs), "run")
    whole = None if settings.runs or settings.experiments else parent
    request = ReportRequest(title, default_treatment(), margin, settings.baseline, settings.rows, names, whole)
    report = make_report(store, trials, request)
    if report.baseline is None and settings.baseline != "none":
        sample = trials[0]
        raise SettingsError(
            f"a baseline must be there to compare with, got none of protocol {sample.protocol_id} ({sample.model} on "
            f"{sample.data}); train one with the same model, data and metric, name a run with baseline=ID, or go "
            "without: baseline=none"
        )
    if settings.untested == "refuse":
        check_tested(report)
    return report


def _select_trials(store: MlflowStore, settings: CompareSettings) -> tuple[list[StoredTrial], dict[str, str]]:
    """Return the trials that match all given criteria, and the experiments' names by treatment hash.

    Raises :class:`SettingsError` if no trial matches, or if a run does not exist.
    """
    from distilbench.report.from_store import DELETED_STORE_HINT, find_sweep
    from distilbench.tracking.search import SWEEP_TAG

    trials = store.search({SWEEP_TAG: settings.sweep} if settings.sweep else {}, settings.runs)
    if settings.sweep and not trials:
        find_sweep(store, settings.sweep)
    missing = sorted(set(settings.runs) - {trial.run_id for trial in trials})
    if missing:
        raise SettingsError(f"runs must be ids of trials in {store.describe()}, got {missing[0]!r}; check the id")
    names: dict[str, str] = {}
    if settings.experiments:
        names = _experiments_of(trials, settings.experiments)
        trials = [trial for trial in trials if short_hash(trial.treatment) in names]
    if not trials:
        given = {"sweep": settings.sweep, "runs": ",".join(settings.runs), "experiment": ",".join(settings.experiments)}
        asked = " ".join(f"{key}={value}" for key, value in given.items() if value)
        lost = f". {DELETED_STORE_HINT}" if settings.sweep else ""
        raise SettingsError(f"what to compare must hold a trial, got none for {asked}; train some first{lost}")
    if settings.protocol:
        known = {trial.protocol_id for trial in trials}
        require(
            settings.protocol in known, "protocol", f"that of a trial, {' or '.join(sorted(known))}", settings.protocol
        )
        trials = [trial for trial in trials if trial.protocol_id == settings.protocol]
    return trials, names


def _experiments_of(trials: Sequence[StoredTrial], experiments: Sequence[str]) -> dict[str, str]:
    """Return the hashes of treatments that have the settings of an experiment, with the name of the first such one."""
    names: dict[str, str] = {}
    plain = default_treatment()
    for name in experiments:
        wanted = default_treatment((f"experiment={name}",))
        changed = {key: value for key, value in wanted.items() if value_of(plain, key) != value}
        for treatment in (trial.treatment for trial in trials):
            is_same = all(value_of(treatment, key) == value for key, value in changed.items())
            if is_same and has_choices_of(treatment, wanted):
                names.setdefault(short_hash(treatment), name)
    return names


def _directory(settings: CompareSettings) -> Path:
    asked = settings.sweep or "-".join(settings.experiments) or short_hash(sorted(settings.runs))
    return Path(settings.output or root() / "outputs" / "reports" / re.sub(r"[^\w.-]+", "_", asked).strip("."))


def to_hydra_argument(argument: str) -> str:
    """Return ``experiment=a,b``, which Hydra takes for a sweep, as ``experiments=[a,b]``, and ``runs=a,b`` likewise."""
    key, equals, value = argument.partition("=")
    if not equals or key not in ("experiment", "experiments", "runs"):
        return argument
    return f"{key.removesuffix('s')}s={value if value.startswith('[') or value == 'null' else f'[{value}]'}"


if __name__ == "__main__":
    run_command(main, to_hydra_argument)

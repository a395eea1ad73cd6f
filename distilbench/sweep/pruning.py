"""Optuna's pruners as a trial's own process uses them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from distilbench.settings import METRICS, SettingsError, SweepSettings
from distilbench.sweep.job import SweepJob

if TYPE_CHECKING:
    import optuna


PruningCallback = Callable[[float, int], str | None]
"""Given the objective so far and how often it was measured: why the trial is to stop, or None."""


def pruner_of(settings: SweepSettings) -> optuna.pruners.BasePruner:
    """Return Optuna's pruner of that name; raises :class:`SettingsError` for options that it does not take."""
    import optuna

    if settings.pruner == "none":
        return optuna.pruners.NopPruner()  # options of a search's own pruner may be left
    options = {name: value for name, value in settings.pruner_options.items() if value is not None}
    within = {"wrapped_pruner": None} if settings.pruner == "patient" else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # asked for by name
            kind = getattr(optuna.pruners, f"{settings.pruner.title().replace('_', '')}Pruner")
            made: optuna.pruners.BasePruner = kind(**within, **options)
            return made
    except (TypeError, ValueError) as error:
        said = str(error).partition("__init__() ")[2] or str(error)
        raise SettingsError(
            f"sweep.pruner_options must be what Optuna's {settings.pruner} pruner takes, got {options}: {said}"
        ) from None


def judged_by(objectives: Sequence[str]) -> str | None:
    """Return the objective by which trials are pruned, the first that is measured on the way; None without one."""
    return next((name for name in objectives if name in METRICS), None)


def check_pruning(settings: SweepSettings, objectives: Sequence[str]) -> None:
    """Raise :class:`SettingsError` for a pruner that these objectives leave without anything to judge."""
    pruner_of(settings)
    if settings.pruner == "none":
        return
    if judged_by(objectives) is None:
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
    """Make what reports to the study and asks its pruner; a trial's end is left to the sweep to tell.

    Optuna prunes studies of one objective alone. Of several, the pruner here sees the one that :func:`judged_by` names.
    """
    name = judged_by(job.objectives)
    if not job.prunes or name is None:
        return None
    import optuna

    from distilbench.sweep.storage import storage_of

    storage = storage_of(job.storage, settings.grace_seconds)
    study = optuna.load_study(study_name=job.sweep, storage=storage, pruner=pruner_of(settings))
    study._directions = [study.directions[job.objectives.index(name)]]  # in this process: the storage keeps them all
    trial = optuna.trial.Trial(study, job.trial_id)

    def report(value: float, count: int) -> str | None:
        if not math.isfinite(value):
            return None  # the engine ends such a trial as DIVERGED
        trial.report(value, count)
        is_worse = not job.is_baseline and trial.should_prune()
        return f"{name} {value:.4f} at evaluation {count} ({settings.pruner})" if is_worse else None

    return report

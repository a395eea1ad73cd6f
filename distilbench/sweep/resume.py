"""Making a sweep's studies, or taking them up again: what must not have changed in between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility, json_to_distribution
from optuna.trial import FrozenTrial

from distilbench.identity import ADDED
from distilbench.results import RECORD, Owner, Status
from distilbench.settings import SettingsError
from distilbench.sweep.plan import SweepPlan, sampler_of
from distilbench.sweep.pruning import pruner_of
from distilbench.sweep.space import Space, describe
from distilbench.sweep.storage import Storage, open_study
from distilbench.sweep.study import BESIDE, Study
from distilbench.sweep.trial import PINNED
from distilbench.sweep.warm_start import find_warm_trials

_LONGEST_SHOWN = 6

MARKER = "sweep.json"
"""In a sweep's directory: the sweep's name."""


@dataclass(frozen=True)
class SweepStudies:
    """The sweep's own study, and the one of baselines beside its space (None without any)."""

    storage: Storage
    main: Study
    beside: Study | None

    @property
    def all(self) -> list[Study]:
        """Both, in the order in which they are worked on."""
        return [study for study in (self.beside, self.main) if study]


def open_studies(
    plan: SweepPlan, storage: Storage, holds: Callable[[str], bool] | None
) -> tuple[SweepPlan, SweepStudies]:
    """Make or load the studies; returns them with the plan, its choices in the order that the study knows.

    ``holds`` tells whether the store has a run; None without tracking. Raises :class:`SettingsError` for a plan that
    does not continue what is there.
    """
    _refuse_others(plan, has_study=not storage.is_missing)
    warm, sources = ([], None) if is_begun(plan) else find_warm_trials(plan, storage)
    plan.directory.mkdir(parents=True, exist_ok=True)
    owner, grace = Owner.of_this_process(), plan.settings.sweep.grace_seconds
    with storage.lock():
        main = open_study(storage, plan.name, plan.directions, pruner_of(plan.settings.sweep), grace)
        kept = main.user_attrs.get("identity")
        if kept is not None and kept != plan.identity:
            check_unchanged(kept, plan.identity, plan.name, plan.settings.sweep.on_change == "extend")
        trials = main.get_trials(deepcopy=False)
        plan = replace(plan, space=_as_known(plan.space, trials))
        _refuse_others(plan, has_study=kept is not None)
        if not is_begun(plan):
            (plan.directory / MARKER).write_text(json.dumps({"sweep": plan.name}) + "\n")
        if kept is None:
            main.add_trials(warm)
        if kept is None and sources:
            main.set_user_attr(PINNED, sources)
        if kept != plan.identity:
            main.set_user_attr("identity", plan.identity)
        main.sampler = sampler_of(plan.sampler, len(trials)) or main.sampler
        beside = open_study(storage, f"{plan.name}.{BESIDE}", plan.directions, None, grace) if plan.beside else None
    return plan, SweepStudies(
        storage,
        Study(main, plan, owner, retry=_to_retry(plan, main, holds)),
        Study(beside, plan, owner, True, _to_retry(plan, beside, holds)) if beside else None,
    )


def is_begun(plan: SweepPlan) -> bool:
    """Return whether an earlier call has begun a sweep in this directory."""
    return (plan.directory / MARKER).exists()


def _refuse_others(plan: SweepPlan, has_study: bool) -> None:
    """Raise :class:`SettingsError` for a directory of another sweep, or with trials of which there is no study.

    Trials are known by their numbers, which another study would give again.
    """
    try:
        other = json.loads((plan.directory / MARKER).read_text())["sweep"]
    except (OSError, ValueError):  # not there, or cut short by a kill
        other = plan.name
    records = (any(plan.directory.glob(pattern)) for pattern in (f"*/{RECORD}", f"{BESIDE}/*/{RECORD}"))
    if other != plan.name or (not has_study and any(records)):
        raise SettingsError(
            f"hydra.sweep.dir must be a new directory, or this sweep's own, got {plan.directory}, which holds trials "
            f"of sweep {other!r}{' whose study is gone' if other == plan.name else ''}; take another sweep.name or "
            "hydra.sweep.dir"
        )


def _to_retry(plan: SweepPlan, study: optuna.Study, holds: Callable[[str], bool] | None) -> list[int]:
    """Numbers of trials to train again: failed ones (one that diverged would again), and those whose runs are gone."""
    sweep = plan.settings.sweep
    again = (Status.FAILED, Status.OUT_OF_MEMORY) if sweep.retry_failed else ()

    def is_lost(run_id: str | None) -> bool:
        return sweep.retry_lost and holds is not None and run_id is not None and not holds(run_id)

    return [
        trial.number
        for trial in study.get_trials(deepcopy=False)
        if trial.user_attrs.get("status") in again or is_lost(trial.user_attrs.get("run_id"))
    ]


def check_unchanged(kept: Mapping[str, Any], now: Mapping[str, Any], name: str, extend: bool) -> None:
    """Raise :class:`SettingsError` where a sweep is continued as another: its difference, and what to do.

    With ``extend`` the space may change, what it is laid over may not.
    """
    earlier = {key: value if isinstance(value, str) else json.dumps(value) for key, value in ADDED.items()}
    parts = [{**earlier, **one["fixed"], "objectives": one["objectives"], "directions": one["directions"],
              **{key: describe(json_to_distribution(text)) for key, text in one["space"].items()}}
             for one in (kept, now)]  # fmt: skip
    had, has = ({key: value for key, value in part.items() if value != "null"} for part in parts)  # unset: older ones
    dimensions = {*kept["space"], *now["space"]}
    changed = [key for key in {**had, **has} if had.get(key) != has.get(key)]
    # of a group that varied in one of the two alone, the other holds the single values
    fixed = [key for key in changed if not any(f"{key}.".startswith(f"{group}.") for group in dimensions)]
    if fixed or (changed and not extend):
        told = [f"{key} {had.get(key, 'unset')} (now {has.get(key, 'unset')})"
                for key in [*fixed, *(key for key in changed if key in dimensions)]]  # fmt: skip
        more = f" and {len(told) - _LONGEST_SHOWN} more" if len(told) > _LONGEST_SHOWN else ""
        raise SettingsError(
            f"sweep.name must be another one for another sweep, got {name!r}, which had "
            f"{'; '.join(told[:_LONGEST_SHOWN])}{more}; take another name"
            f"{'' if fixed else ' or add sweep.on_change=extend'}"
        )


def _as_known(space: Space, trials: Sequence[FrozenTrial]) -> Space:
    """Return the space with lists of choices in the study's own order: Optuna keeps a choice by its place in the list.

    Raises :class:`SettingsError` for what Optuna fixes: the choices, whether a parameter is whole, continuous or a
    choice, and whether it is logarithmic.
    """
    dimensions = dict(space.dimensions)
    for key, now in space.dimensions.items():
        known = next((trial.distributions[key] for trial in trials if key in trial.distributions), now)
        if describe(known) == describe(now):
            dimensions[key] = known
        try:
            check_distribution_compatibility(known, dimensions[key])
        except ValueError:
            raise SettingsError(
                f"{key} must stay what it was in this sweep, {describe(known)}, but for the ends of a range, got "
                f"{describe(now)}; put it back, or take another sweep.name"
            ) from None
    return replace(space, dimensions=dimensions)

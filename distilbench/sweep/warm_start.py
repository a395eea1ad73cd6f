"""Finished trials of an earlier sweep put into a new study, for Optuna to begin with what they showed."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from distilbench.cli import counted
from distilbench.identity import METRIC, SOURCES
from distilbench.results import Status
from distilbench.settings import SettingsError, require
from distilbench.sweep.plan import SweepPlan
from distilbench.sweep.space import Point
from distilbench.sweep.storage import Storage, storage_at, storage_of
from distilbench.sweep.study import RESULT
from distilbench.sweep.trial import PINNED

log = logging.getLogger(__name__)


def find_warm_trials(plan: SweepPlan, storage: Storage) -> tuple[list[FrozenTrial], Any]:
    """Return the finished trials of ``sweep.warm_start`` whose points lie in the plan's space, as those of a new study.

    With them comes what their sources were, which the new study's are held to. They have the status REUSED and so do
    not count towards the sweep's total. The others are counted, and that is said.
    Raises :class:`SettingsError` where there is no such sweep, or one of another protocol or other objectives.
    """
    name = plan.settings.sweep.warm_start
    if name is None:
        return [], None
    require(not plan.is_grid, "sweep.warm_start", "null in a grid", name, "add hydra/sweeper=optuna")
    earlier = _study(plan, storage, name)
    identity = earlier.user_attrs.get("identity", {})
    _check_same(plan, identity, name)
    own = [t for t in earlier.get_trials(deepcopy=False) if t.user_attrs.get("status") == Status.FINISHED.value
           and not t.user_attrs.get("baseline")]  # fmt: skip
    found = [_as_own(trial, params, plan, identity["objectives"], name)
             for trial in own if (params := _params_in(plan, trial, identity["fixed"])) is not None]  # fmt: skip
    log.warning("warm start: of %s of %s in this space: %d", counted(len(own), "finished trial"), name, len(found))
    return found, earlier.user_attrs.get(PINNED) if found else None


def _study(plan: SweepPlan, storage: Storage, name: str) -> optuna.Study:
    own_file = storage == storage_at(None, None, plan.directory)
    other = storage_at(None, None, plan.directory.parent / name) if own_file else storage
    try:
        if not other.is_missing and name != plan.name:
            return optuna.load_study(
                study_name=name, storage=storage_of(other.url, plan.settings.sweep.grace_seconds)
            )  # fmt: skip
    except KeyError:
        pass
    raise SettingsError(
        f"sweep.warm_start must be the name of an earlier sweep, got {name!r}; none is in {other.shown}"
    )


def _check_same(plan: SweepPlan, identity: Mapping[str, Any], name: str) -> None:
    had = identity.get("fixed", {})
    for key in (*SOURCES, *METRIC):
        if had.get(key) != plan.fixed.get(key):
            raise SettingsError(
                f"sweep.warm_start must be a sweep of the same protocol, got {name!r}, which had {key}={had.get(key)} "
                f"(now {plan.fixed.get(key)})"
            )
    measured = set(identity["objectives"])
    require(set(plan.objectives) <= measured, "sweep.warm_start", f"a sweep that measured {', '.join(plan.objectives)}",
            name)  # fmt: skip


def _params_in(plan: SweepPlan, trial: FrozenTrial, fixed: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the trial's point in the plan's space; None outside of it, or of what the plan holds fixed."""
    had = {**fixed, **{key: _spelled(value) for key, value in trial.params.items()}}
    params: dict[str, Any] = {}
    for key, distribution in plan.space.dimensions.items():
        if key not in had:
            return None
        params[key] = trial.params[key] if key in trial.params else _typed(had[key], distribution)
    beside = {key: value for key, value in trial.params.items() if key not in params and key not in plan.fixed}
    same = all(had.get(key) == value for key, value in plan.fixed.items()) and (plan.space.custom or not beside)
    return {**params, **beside} if same and plan.space.contains(params) else None


def _spelled(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _typed(text: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return next((choice for choice in distribution.choices if _spelled(choice) == text), text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _as_own(
    trial: FrozenTrial, params: dict[str, Any], plan: SweepPlan, objectives: Sequence[str], name: str
) -> FrozenTrial:
    """Return the trial as one of the plan's study, whose numbers and directories it has no part in."""
    point = Point(params)
    told = {key: trial.user_attrs.get(key) for key in RESULT}
    return optuna.trial.create_trial(
        state=TrialState.COMPLETE,
        params=params,
        distributions={key: value for key, value in {**trial.distributions, **plan.space.dimensions}.items()
                       if key in params},
        values=[trial.values[objectives.index(objective)] for objective in plan.objectives],
        intermediate_values=trial.intermediate_values,
        user_attrs={**told, "status": Status.REUSED.value, "reused_from": f"{name}/{trial.number}",
                    "name": plan.name_of(point), "point": point.key},
    )  # fmt: skip

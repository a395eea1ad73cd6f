"""Create a sweep's studies, or load them to continue it after a check that nothing fixed has changed."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    check_distribution_compatibility,
    json_to_distribution,
)
from optuna.trial import FrozenTrial, TrialState

from distilbench.cli import pluralize
from distilbench.identity import METRIC, OLD_DEFAULTS, SOURCES
from distilbench.results import RECORD, Owner, Status
from distilbench.settings import SettingsError, require
from distilbench.sweep.plan import SweepPlan, sampler_of
from distilbench.sweep.space import Point, Space, describe
from distilbench.sweep.storage import Storage, open_study, storage_at, storage_of
from distilbench.sweep.study import BASELINE_STUDY, RESULT, SweepStudy
from distilbench.sweep.trial import SOURCES_ATTRIBUTE, pruner_of
from distilbench.tracking.start import format_param

log = logging.getLogger(__name__)

_LONGEST_SHOWN = 6

SWEEP_FILE = "sweep.json"
"""File in a sweep's directory: the sweep's name, and the id that its study stores too."""


def open_studies(
    plan: SweepPlan, storage: Storage, run_ids: Callable[[str], Container[str]] | None
) -> tuple[SweepPlan, list[SweepStudy]]:
    """Create or load the sweep's studies; the one for baselines outside of its space, if any, comes first.

    Also returns the plan, with its choices in the order that the study stores. ``run_ids`` returns the ids of a sweep's
    MLflow runs; None without tracking. Raises :class:`SettingsError` if the plan does not continue what is there.
    """
    _refuse_others(plan, has_study=not storage.is_missing)
    warm, sources = ([], None) if has_begun(plan) else find_warm_trials(plan, storage)
    plan.directory.mkdir(parents=True, exist_ok=True)
    owner, grace = Owner.of(), plan.settings.sweep.grace_seconds
    with storage.lock():
        main = open_study(storage, plan.name, plan.directions, pruner_of(plan.settings.sweep), grace)
        kept = main.user_attrs.get("identity")
        if kept is not None:
            check_unchanged(kept, plan.identity, plan.name, plan.settings.sweep.on_change == "extend")
        had = [direction.name.lower() for direction in main.directions]  # a person may have created the study
        require(had == [*plan.directions], "sweep.name", f"that of a study with the directions {plan.directions}",
                plan.name, f"its directions are {had}: take another name")  # fmt: skip
        trials = main.get_trials(deepcopy=False)
        plan = replace(plan, space=_keep_choice_order(plan.space, trials))
        marked, known = _read_sweep_file(plan).get("id"), main.user_attrs.get("id")
        _refuse_others(plan, has_study=kept is not None and marked in (None, known))
        ours = {"sweep": plan.name, "id": known or uuid.uuid4().hex}
        main.set_user_attr("id", ours["id"])
        there = {trial.user_attrs.get("reused_from") for trial in trials}  # added by a call that was killed
        main.add_trials(trial for trial in warm if trial.user_attrs["reused_from"] not in there)
        if sources:
            main.set_user_attr(SOURCES_ATTRIBUTE, sources)
        if kept != plan.identity:
            main.set_user_attr("identity", plan.identity)
        if ours != _read_sweep_file(plan):  # last: once it exists, no call looks for a warm start again
            (plan.directory / SWEEP_FILE).write_text(json.dumps(ours) + "\n")
        main.sampler = sampler_of(plan.sampler, len(trials)) or main.sampler
        if plan.outside_baselines:
            baselines = open_study(storage, f"{plan.name}.{BASELINE_STUDY}", plan.directions, None, grace)
    studies = [SweepStudy(main, plan, owner)]
    if plan.outside_baselines:
        own = replace(plan, space=Space({}, plan.space.fixed), points=plan.outside_baselines, is_grid=True)
        studies.insert(0, SweepStudy(baselines, own, owner, is_outside=True))
    _retry(plan, studies, run_ids(plan.name) if run_ids and kept is not None else None)
    return plan, studies


def has_begun(plan: SweepPlan) -> bool:
    """Return whether an earlier call has started a sweep in this directory."""
    return (plan.directory / SWEEP_FILE).exists()


def _refuse_others(plan: SweepPlan, has_study: bool) -> None:
    """Raise :class:`SettingsError` if the directory belongs to another sweep, or holds trials whose study is gone.

    Trials are identified by their numbers, which another study would assign again.
    """
    other = _read_sweep_file(plan).get("sweep", plan.name)
    records = (any(plan.directory.glob(pattern)) for pattern in (f"*/{RECORD}", f"{BASELINE_STUDY}/*/{RECORD}"))
    if other != plan.name or (not has_study and any(records)):
        raise SettingsError(
            f"hydra.sweep.dir must be a new directory, or this sweep's own, got {plan.directory}, which holds trials "
            f"of sweep {other!r}{' whose study is gone, or another' if other == plan.name else ''}; take another "
            "sweep.name or hydra.sweep.dir"
        )


def _read_sweep_file(plan: SweepPlan) -> dict[str, str]:
    try:
        return dict(json.loads((plan.directory / SWEEP_FILE).read_text()))
    except (OSError, ValueError):  # missing, or truncated by a kill
        return {}


def _retry(plan: SweepPlan, studies: Sequence[SweepStudy], run_ids: Container[str] | None) -> None:
    """Have failed trials, except DIVERGED ones, and those whose runs are gone trained again, if that is asked for.

    Says how many trials have lost their runs if it is not.
    """
    sweep, lost = plan.settings.sweep, 0
    for study in studies:
        for view in study.counted():
            run_id = view.attribute("run_id")
            is_lost = run_ids is not None and run_id is not None and run_id not in run_ids
            is_failed = view.status in (Status.FAILED, Status.OUT_OF_MEMORY)
            if (is_failed and sweep.retry_failed) or (is_lost and sweep.retry_lost):
                study.retry.add(view.number)
            lost += is_lost
    if lost and not sweep.retry_lost:
        log.warning("MLflow has no run of %s any more: sweep.retry_lost=true added to the command trains what is lost",
                    pluralize(lost, "trial"))  # fmt: skip


def check_unchanged(kept: Mapping[str, Any], now: Mapping[str, Any], name: str, extend: bool) -> None:
    """Raise :class:`SettingsError`, naming the differences, if a sweep is continued with other settings.

    With ``extend``, the search space may change, but not the fixed settings.
    """
    earlier = {key: format_param(value) for key, value in OLD_DEFAULTS.items()}
    parts = [{**earlier, **one["fixed"], "objectives": one["objectives"], "directions": one["directions"],
              **{key: describe(json_to_distribution(text)) for key, text in one["space"].items()}}
             for one in (kept, now)]  # fmt: skip
    had, has = ({key: value for key, value in part.items() if value != "null"} for part in parts)  # null: unset
    dimensions = {*kept["space"], *now["space"]}
    changed = [key for key in {**had, **has} if had.get(key) != has.get(key)]
    # if a config group varies in only one of the two, the other has its members among the fixed values
    fixed = [key for key in changed if not any(f"{key}.".startswith(f"{group}.") for group in dimensions)]
    if fixed or (changed and not extend):
        told = [f"{key} {had.get(key, 'unset')} (now {has.get(key, 'unset')})"
                for key in [*fixed, *(key for key in changed if key in dimensions)]]  # fmt: skip
        had_lists = {key for key, text in kept["space"].items() if CategoricalDistribution.__name__ in text}
        can_extend = not fixed and not had_lists & set(now["space"]) & set(changed)  # Optuna stores a choice's place
        more = f" and {len(told) - _LONGEST_SHOWN} more" if len(told) > _LONGEST_SHOWN else ""
        raise SettingsError(
            f"sweep.name must be another one for another sweep, got {name!r}, which had "
            f"{'; '.join(told[:_LONGEST_SHOWN])}{more}; take another name"
            f"{' or add sweep.on_change=extend' if can_extend else ''}"
        )


def _keep_choice_order(space: Space, trials: Sequence[FrozenTrial]) -> Space:
    """Return the space with choices in the study's order, since Optuna stores a choice as its index in the list.

    Raises :class:`SettingsError` for changes that Optuna does not allow: of the choices, of a parameter's kind
    (integer, float or categorical), and of whether it is logarithmic.
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


def find_warm_trials(plan: SweepPlan, storage: Storage) -> tuple[list[FrozenTrial], Any]:
    """Return copies, for a new study, of the finished trials of ``sweep.warm_start`` that lie in the plan's space.

    Also returns their sources, which the new study must use too. The copies have the status REUSED, so that they do not
    count towards the sweep's total; a message says how many there are. Raises :class:`SettingsError` if there is no
    such sweep, or if its protocol or objectives differ.
    """
    name = plan.settings.sweep.warm_start
    if name is None:
        return [], None
    require(not plan.is_grid, "sweep.warm_start", "null in a grid", name, "add hydra/sweeper=optuna")
    earlier = _load_warm_study(plan, storage, name)
    identity = earlier.user_attrs.get("identity", {})
    _check_same_protocol(plan, identity, name)
    own = [t for t in earlier.get_trials(deepcopy=False) if t.user_attrs.get("status") == Status.FINISHED.value
           and not t.user_attrs.get("baseline")]  # fmt: skip
    found = [_copy_for_plan(trial, params, plan, identity["objectives"], name)
             for trial in own if (params := _params_in(plan, trial, identity["fixed"])) is not None]  # fmt: skip
    log.warning("warm start: of %s of %s in this space: %d", pluralize(len(own), "finished trial"), name, len(found))
    return found, earlier.user_attrs.get(SOURCES_ATTRIBUTE) if found else None


def _load_warm_study(plan: SweepPlan, storage: Storage, name: str) -> optuna.Study:
    own_file = storage == storage_at(None, None, plan.directory)
    other = storage_at(None, None, plan.directory.parent / name) if own_file else storage
    try:
        if not other.is_missing and name != plan.name:
            return optuna.load_study(study_name=name, storage=storage_of(other.url, plan.settings.sweep.grace_seconds))
    except KeyError:
        pass
    raise SettingsError(
        f"sweep.warm_start must be the name of an earlier sweep, got {name!r}; none is in {other.url_template}"
    )


def _check_same_protocol(plan: SweepPlan, identity: Mapping[str, Any], name: str) -> None:
    had = identity.get("fixed", {})
    differing = [f"{key}={had.get(key)} (now {plan.fixed.get(key)})" for key in (*SOURCES, *METRIC)
                 if had.get(key) != plan.fixed.get(key)]  # fmt: skip
    require(not differing, "sweep.warm_start", "a sweep of the same protocol", name, f"it had {', '.join(differing)}")
    require(set(plan.objectives) <= set(identity["objectives"]), "sweep.warm_start",
            f"a sweep that measured {', '.join(plan.objectives)}", name)  # fmt: skip


def _params_in(plan: SweepPlan, trial: FrozenTrial, fixed: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the trial's point in the plan's space; None if it lies outside, or if fixed settings differ."""
    had = {**fixed, **{key: format_param(value) for key, value in trial.params.items()}}
    params: dict[str, Any] = {}
    for key, distribution in plan.space.dimensions.items():
        if key not in had:
            return None
        params[key] = trial.params[key] if key in trial.params else _parse_param(had[key], distribution)
    extra = {key: value for key, value in trial.params.items() if key not in params and key not in plan.fixed}
    same = all(had.get(key) == value for key, value in plan.fixed.items()) and (plan.space.custom or not extra)
    return {**params, **extra} if same and plan.space.contains(params) else None


def _parse_param(text: str, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return next((choice for choice in distribution.choices if format_param(choice) == text), text)
    try:
        return json.loads(text)
    except ValueError:
        return text


def _copy_for_plan(
    trial: FrozenTrial, params: dict[str, Any], plan: SweepPlan, objectives: Sequence[str], name: str
) -> FrozenTrial:
    """Return a copy of the trial with the plan's objectives, for the plan's study."""
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

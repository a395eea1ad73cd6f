"""Making a sweep's studies, or taking them up again: what must not have changed in between."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.trial import FrozenTrial

from distilbench.identity import ADDED
from distilbench.results import RECORD, Owner, Status
from distilbench.settings import SettingsError, require
from distilbench.sweep.plan import SweepPlan, sampler_of
from distilbench.sweep.pruning import pruner_of
from distilbench.sweep.sources import PINNED
from distilbench.sweep.space import Space
from distilbench.sweep.storage import Storage, open_study
from distilbench.sweep.study import BESIDE, Study
from distilbench.sweep.warm_start import find_warm_trials

_LONGEST_SHOWN = 6

MARKER = "sweep.json"
"""In a sweep's directory: the sweep's name, and the id that its study has too."""


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
    _check_directory(plan, storage)
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
        _claim_directory(plan, main)
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


def _check_directory(plan: SweepPlan, storage: Storage) -> None:
    """Raise :class:`SettingsError`, before anything is written, for a directory that another sweep has."""
    marker = _marker(plan)
    is_ours = marker.get("sweep", plan.name) == plan.name
    _require_ours(plan, is_ours and (not marker or not _has_records(plan) or not storage.is_missing))


def _claim_directory(plan: SweepPlan, study: optuna.Study) -> None:
    """Write into the directory whose it is: trials are known by their numbers, which another study would give again."""
    marker, known = _marker(plan), study.user_attrs.get("id")
    _require_ours(plan, marker["id"] == known if marker and known else not _has_records(plan))
    if known is None or not marker:
        known = known or marker.get("id") or uuid.uuid4().hex
        (plan.directory / MARKER).write_text(json.dumps({"sweep": plan.name, "id": known}) + "\n")
        study.set_user_attr("id", known)


def is_begun(plan: SweepPlan) -> bool:
    """Return whether an earlier call has begun this sweep."""
    return bool(_marker(plan))


def _require_ours(plan: SweepPlan, is_ours: bool) -> None:
    other = _marker(plan).get("sweep", plan.name)
    if not is_ours:
        raise SettingsError(
            f"hydra.sweep.dir must be a new directory, or this sweep's own, got {plan.directory}, which holds trials "
            f"of sweep {other!r}{' whose study is gone' if other == plan.name else ''}; take another sweep.name or "
            "hydra.sweep.dir"
        )


def _marker(plan: SweepPlan) -> dict[str, str]:
    try:
        return dict(json.loads((plan.directory / MARKER).read_text()))
    except (OSError, ValueError):  # not there, or cut short by a kill
        return {}


def _has_records(plan: SweepPlan) -> bool:
    return any(any(plan.directory.glob(pattern)) for pattern in (f"*/{RECORD}", f"{BESIDE}/*/{RECORD}"))


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
    had, has = ({key: _in_order(value) for key, value in identity["space"].items()} for identity in (kept, now))
    moved = had.keys() ^ has.keys()
    """Dimensions of one of the two, whose value, or whose group's values, the other has fixed."""
    earlier = {key: value if isinstance(value, str) else json.dumps(value) for key, value in ADDED.items()}

    def stays(identity: Mapping[str, Any]) -> dict[str, Any]:
        known = {
            k: v for k, v in {**earlier, **identity["fixed"]}.items() if v != "null"
        }  # unset, as in older versions
        return {k: v for k, v in known.items() if not any(f"{k}.".startswith(f"{m}.") for m in moved)}

    fixed = _differences(stays(kept), stays(now))
    fixed += [line for key in ("objectives", "directions") for line in _differences({key: kept[key]}, {key: now[key]})]
    space = _differences(had | {m: kept["fixed"].get(m) for m in moved - had.keys()},
                         has | {m: now["fixed"].get(m) for m in moved - has.keys()})  # fmt: skip
    if fixed or (space and not extend):
        shown = [*fixed, *space]
        more = f" and {len(shown) - _LONGEST_SHOWN} more" if len(shown) > _LONGEST_SHOWN else ""
        remedy = "" if fixed else " or add sweep.on_change=extend"
        raise SettingsError(
            f"sweep.name must be another one for another sweep, got {name!r}, which had "
            f"{'; '.join(shown[:_LONGEST_SHOWN])}{more}; take another name{remedy}"
        )


def _in_order(distribution: str) -> str:
    """Choices make the same dimension in any order."""
    content = json.loads(distribution)
    if "choices" in content["attributes"]:
        content["attributes"]["choices"].sort(key=str)
    return json.dumps(content)


def _differences(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    keys = [key for key in {**kept, **now} if kept.get(key) != now.get(key)]
    return [f"{key} {_shown(kept.get(key))} (now {_shown(now.get(key))})" for key in keys]


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.startswith('{"name"'):
        content = json.loads(value)
        attributes = content["attributes"]
        choices = attributes.get("choices")
        return str(choices) if choices is not None else f"{attributes['low']}..{attributes['high']}"
    return "unset" if value is None else str(value)


def _as_known(space: Space, trials: Sequence[FrozenTrial]) -> Space:
    """Return the space with lists of choices in the study's own order: Optuna keeps a choice by its place in the list.

    Raises :class:`SettingsError` for what Optuna fixes: the choices, whether a parameter is whole, continuous or a
    choice, and whether it is logarithmic.
    """
    dimensions = dict(space.dimensions)
    for key, now in space.dimensions.items():
        known = next((trial.distributions[key] for trial in trials if key in trial.distributions), now)
        if isinstance(known, CategoricalDistribution) and isinstance(now, CategoricalDistribution):
            require(
                set(known.choices) == set(now.choices),
                key,
                f"the choices that it had in this sweep, {list(known.choices)}",
                list(now.choices),
                "Optuna takes no other list: put the first one back, or take another sweep.name",
            )
            dimensions[key] = known
        else:
            _check_kind(key, known, now)
    return replace(space, dimensions=dimensions)


def _check_kind(key: str, known: BaseDistribution, now: BaseDistribution) -> None:
    try:
        check_distribution_compatibility(known, now)
    except ValueError:
        kinds = [_kind(distribution) for distribution in (known, now)]
        raise SettingsError(
            f"{key} must stay {kinds[0]} in this sweep, got {kinds[1]}; only its ends may change; "
            "take another sweep.name"
        ) from None


def _kind(distribution: BaseDistribution) -> str:
    scale = "logarithmic" if getattr(distribution, "log", False) else "linear"
    words = {IntDistribution: f"a {scale} range of whole numbers", FloatDistribution: f"a {scale} interval"}
    return words.get(type(distribution), "a list of choices")

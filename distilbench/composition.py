"""Compositions besides the trial's own: its baseline, a command line that repeats it, and checks before any job."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import lru_cache
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from distilbench.cli import errors_in_one_line, format_command, format_override
from distilbench.identity import treatment_of, value_of
from distilbench.report.names import CHOICES, is_choice
from distilbench.settings import AppSettings, SettingsError, require, settings_from


def baseline_config(config: DictConfig) -> DictConfig:
    """Return the baseline of a composed config: a copy with ``baseline.overrides`` applied.

    ``group=choice`` replaces the whole group by its default composition, ``key=value`` sets one value. Needs an
    initialised Hydra, as inside a job.
    """
    loader = GlobalHydra.instance().config_loader()
    groups = set(loader.list_groups(""))
    result = config.copy()
    overrides = OverridesParser.create(config_loader=loader).parse_overrides(list(config.baseline.overrides))
    plain = _composed(*(f"{o.get_key_element()}={o.value()}" for o in overrides if o.get_key_element() in groups))
    for parsed in overrides:
        key = parsed.get_key_element()
        if key in groups:
            with open_dict(result):
                result[key] = plain[key]
        else:
            OmegaConf.update(result, key, parsed.value(), force_add=False)
    return result


def baseline_choices(config: DictConfig) -> dict[str, str]:
    """Return the choices of groups among ``baseline.overrides``."""
    groups = GlobalHydra.instance().config_loader().list_groups("")
    named = (override.partition("=")[::2] for override in config.baseline.overrides)
    return {key: value for key, value in named if key in groups}


def typed_choices(config: DictConfig, choices: Mapping[str, Any]) -> dict[str, object]:
    """Return the choices of :data:`CHOICES` that give ``config``, and the settings of the treatment that differ.

    ``freeze=layers3 freeze.dropout=false`` gives ``{"freeze": "layers3", "freeze.dropout": False, ...}``. An experiment
    that a baseline has as well, such as ``quick``, names no trial.
    """
    chosen: dict[str, object] = {group: choices[group] for group in CHOICES if group in choices}  # Hydra omits lists
    typed = HydraConfig.get().overrides.hydra if HydraConfig.initialized() else ()
    searched = [line for line in typed if line.startswith("hydra.searchpath=")]
    try:
        plain = default_treatment((*searched, *(f"{key}={one}" for key, one in chosen.items() if one is not None)))
        if chosen.get("experiment") and _is_baseline(*searched, f"experiment={chosen['experiment']}"):
            del chosen["experiment"]
    except (SettingsError, HydraException):  # a choice of the user's own, such as one that needs further settings
        return {}
    ours = _treatment(config)
    return chosen | {key: value_of(ours, key) for key in {*ours, *plain} if value_of(ours, key) != value_of(plain, key)}


@lru_cache(maxsize=64)
def _is_baseline(*overrides: str) -> bool:
    """Return whether these overrides give the baseline that they are compared with, as ``experiment=quick`` does."""
    config = compose("config", [*overrides])
    return not any(map(is_choice, overrides_between(config, baseline_config(config))))


@lru_cache(maxsize=64)
def default_treatment(overrides: tuple[str, ...] = ()) -> Mapping[str, object]:
    """Return the default treatment with ``overrides`` applied, without precision.

    Needs an initialised Hydra, as inside a job.
    """
    config = _composed(*overrides).copy()
    config.output.dir = "."  # Hydra knows the job's directory only once the job runs
    return _treatment(config)


def _treatment(config: DictConfig) -> dict[str, object]:
    treatment = treatment_of(settings_from(config), "")
    return {key: value for key, value in treatment.items() if key != "train.precision"}


def default_margin() -> float:
    """Return the default margin, in percentage points; needs an initialised Hydra."""
    return float(_composed().margin)


@lru_cache(maxsize=64)
def _composed(*choices: str) -> DictConfig:
    """Compose the default configuration with ``choices``; cached, because it takes 0.15 s per cell of a grid."""
    return compose("config", list(choices))


def command_for(config: DictConfig, choices: Mapping[str, str]) -> str:
    """Return a command that composes ``config``: its choices of model and data, then every value that still differs.

    Changes by a sweep, an experiment or a baseline become plain ``key=value``, and paths are absolute, so the command
    works anywhere. Interpolations, which may refer to secrets, are not resolved.
    """
    groups = [f"{group}={choices[group]}" for group in ("model", "data", "engine", "tracking")]
    default = dict(_leaves(_composed()))
    by_group = [group for group in groups if dict(_leaves(_composed(group))) != default]
    usual = dict(_leaves(_composed(*groups)))
    resolved = dict(_leaves(OmegaConf.structured(settings_from(config))))
    changed = {key: value for key, value in _leaves(config) if key not in usual or value != usual[key]}
    overrides = {key: value if "${" in str(value) else resolved[key] for key, value in changed.items() if key in usual}
    overrides |= {f"+{key}": value for key, value in changed.items() if key not in usual}  # what another setting reads
    for key, value in changed.items():
        if isinstance(value, dict):  # of a fallback, only the given keys: Hydra accepts no others
            overrides[key] = {name: overrides[key][name] for name in value}
    return format_command("train", by_group + [format_override(key, value) for key, value in overrides.items()])


def overrides_between(config: DictConfig, wanted: DictConfig) -> list[str]:
    """Return the overrides, one per value, that turn one composed config into another."""
    present = dict(_leaves(config))
    return [format_override(key, value) for key, value in _leaves(wanted) if present[key] != value]


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and unresolved values of all settings that describe the trial, without output and comparison.

    A fallback (a whole group, or null) is one value.
    """
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while pending:
        prefix, node = pending.pop(0)
        for key, value in node.items():
            if f"{prefix}{key}" in ("output", "baseline", "sweep", "margin", "train.resume"):
                continue
            if isinstance(value, dict) and key != "fallback":
                pending.append((f"{prefix}{key}.", value))
            else:
                yield f"{prefix}{key}", value


def _typed(config: DictConfig) -> Iterator[tuple[str, str]]:
    """Yield key and value of each override that was typed."""
    for line in (*config.hydra.overrides.hydra, *config.hydra.overrides.task):
        key, _, value = line.lstrip("+").partition("=")
        yield key, value


OF_SWEEPS = ("sweep.", "search", "hydra/sweeper", "hydra.sweeper.", "hydra/launcher", "hydra.launcher.", "hydra.sweep.")
"""Beginnings of keys that a single trial would ignore."""


def refuse_settings_of_sweeps(config: DictConfig) -> None:
    """Raise :class:`SettingsError` for an override that a single trial would ignore."""
    for key, value in _typed(config):
        require(not key.startswith(OF_SWEEPS), key, "left to a sweep", value, "add --multirun (in Python: run_sweep)")


class CheckFirst(Callback):
    """Checks every job before the first one starts, so that an invalid setting fails within two seconds.

    Hydra turns exceptions in callbacks into warnings, but lets SystemExit through; every job is checked again anyway.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the job of a single run."""
        HydraConfig.instance().set_config(config)  # for ${hydra:runtime.cwd} and the like; the job sets its own
        with errors_in_one_line():
            refuse_settings_of_sweeps(config)
            check(config, ask_hub=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check each job of a grid; other sweepers check their own."""
        HydraConfig.instance().set_config(config)
        is_basic = config.hydra.sweeper._target_ == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}"
        with errors_in_one_line():
            for key, value in _typed(config):
                require(key != "hydra.run.dir", key, "left to a single trial", value, "set hydra.sweep.dir")
                require(not is_basic or not key.startswith("sweep.") or key == "sweep.name", key,
                        "left to another sweeper", value, "drop hydra/sweeper=basic")  # fmt: skip
                name = key.removeprefix("hydra.job.env_set.")  # which trials would read, but not the sweep itself
                is_ours = name != key and name.startswith(("MLFLOW_", "DISTILBENCH_"))
                require(not is_ours, key, "left to the shell in a sweep", value, f"run: export {name}=...")
            at_once = config.hydra.launcher.get("max_trials")
            require(at_once is None or at_once >= 1, "hydra.launcher.max_trials", "1 or more", at_once)
            if is_basic:
                loader = GlobalHydra.instance().config_loader()
                params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
                parser = OverridesParser.create(config_loader=loader)
                overrides = parser.parse_overrides(params + list(config.hydra.overrides.task))
                (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
                for job in jobs:
                    check(loader.load_sweep_config(config, job), ask_hub=True)


def check(config: DictConfig, ask_hub: bool) -> AppSettings:
    """Check and return the settings of a job that has not started; raises :class:`SettingsError` if any is invalid.

    Asking the hub can take seconds: without ``ask_hub``, the job itself checks a model from the hub.
    """
    from distilbench.engines import check_engine
    from distilbench.models.resolve import check_trial, resolve_model
    from distilbench.tracking.uri import store_address_of

    known = {field.name for field in fields(OmegaConf.get_type(config))}  # type: ignore[arg-type]
    for key in {*config} - known - {"hydra"}:  # such as +freeze_layers=3, unless used as ${freeze_layers}
        is_read = bool(re.search(rf"\$\{{{re.escape(str(key))}[.\[}}]", OmegaConf.to_yaml(config)))
        require(is_read, str(key), "a setting that there is, or that another reads", config[key], "--help lists them")
    without_output_dir = config.copy()
    without_output_dir.output.dir = "."  # Hydra knows the job's directory only once the job runs
    settings = settings_from(without_output_dir)
    if settings.tracking.name != "none":
        store_address_of(settings.tracking)
    if ask_hub or settings.model.source != "hub":
        model = resolve_model(settings.model)
        check_trial(model, settings)
        check_engine(settings, model, settings.train.precision)
    return settings

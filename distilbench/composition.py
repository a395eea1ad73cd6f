"""What is composed besides the trial itself: its baseline, a command line, and every job before the first starts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict

from distilbench.cli import command, errors_in_one_line, override
from distilbench.identity import treatment_of
from distilbench.settings import AppSettings, settings_from


def baseline_config(config: DictConfig) -> DictConfig:
    """Return the baseline of a composed config: ``baseline.overrides`` put over a copy of it.

    ``group=choice`` replaces the whole group by what a plain composition gives it, ``key=value`` sets one value.
    Needs an initialised Hydra, as inside a job.
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


def default_treatment(overrides: Sequence[str] = ()) -> dict[str, object]:
    """Return the treatment that a plain composition has, with ``overrides``; precision is left to the trials.

    Needs an initialised Hydra, as inside a job.
    """
    settings = settings_from(compose("config", [*overrides, "output.dir=."]))
    return {key: value for key, value in treatment_of(settings, "").items() if key != "train.precision"}


def default_margin() -> float:
    """Return the margin that a plain composition has, in points; needs an initialised Hydra."""
    return float(_composed().margin)


@lru_cache(maxsize=64)
def _composed(*choices: str) -> DictConfig:
    """Compose these choices alone; 0.15 s, so once only for all the cells of a grid."""
    return compose("config", list(choices))


def command_for(config: DictConfig, choices: Mapping[str, str]) -> str:
    """Return the line that composes ``config``: its choices of model and data, then each value that still differs.

    What a sweep, an experiment or a baseline changed comes out as plain ``key=value``, so the line stands alone, and
    paths are absolute, so that it may be typed anywhere. What stands in an interpolation, as a secret may, stays there.
    """
    groups = [f"{group}={choices[group]}" for group in ("model", "data", "engine", "tracking")]
    default = dict(_leaves(_composed()))
    by_group = [group for group in groups if dict(_leaves(_composed(group))) != default]
    usual = dict(_leaves(_composed(*groups)))
    settled = dict(_leaves(OmegaConf.structured(settings_from(config))))
    changed = {key: value for key, value in _leaves(config) if value != usual[key]}
    told = {key: value if "${" in str(value) else settled[key] for key, value in changed.items()}
    for key, value in changed.items():
        if isinstance(value, dict):  # of a fallback no more than was given: Hydra takes no other
            told[key] = {name: told[key][name] for name in value}
    return command("train", by_group + [override(key, value) for key, value in told.items()])


def overrides_between(config: DictConfig, wanted: DictConfig) -> list[str]:
    """Return the overrides that turn one composed config into another, value by value."""
    present = dict(_leaves(config))
    return [override(key, value) for key, value in _leaves(wanted) if present[key] != value]


def _leaves(config: DictConfig) -> Iterator[tuple[str, Any]]:
    """Dotted keys and unresolved values of all that says what a trial is, not where it goes or what it is held to.

    A fallback, another whole group of sources or null, is one value.
    """
    pending: list[tuple[str, Any]] = [("", OmegaConf.to_container(config, resolve=False))]
    while pending:
        prefix, node = pending.pop(0)
        for key, value in node.items():
            if prefix == "" and key in ("output", "baseline", "sweep", "margin"):
                continue
            if isinstance(value, dict) and key != "fallback":
                pending.append((f"{prefix}{key}.", value))
            else:
                yield f"{prefix}{key}", value


class CheckFirst(Callback):
    """Checks every job before the first one starts, so that a mistake costs two seconds and leaves nothing behind.

    Hydra turns exceptions of callbacks into warnings, but lets SystemExit through; each job is checked again anyhow.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the one job of a plain run."""
        with errors_in_one_line():
            check(config, ask_hub=False)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check each job of a grid; other sweepers check their own."""
        if config.hydra.sweeper._target_ == f"{BasicSweeper.__module__}.{BasicSweeper.__name__}":
            with errors_in_one_line():
                loader = GlobalHydra.instance().config_loader()
                params = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
                parser = OverridesParser.create(config_loader=loader)
                overrides = parser.parse_overrides(params + list(config.hydra.overrides.task))
                (jobs,) = BasicSweeper.split_arguments(overrides, max_batch_size=None)
                for job in jobs:
                    check(loader.load_sweep_config(config, job), ask_hub=True)


def check(config: DictConfig, ask_hub: bool) -> AppSettings:
    """Return the settings of a job that has not begun; raises :class:`SettingsError` for what a person can mend.

    Deciding on the hub can take seconds: without ``ask_hub`` a model from there is left to the job itself.
    """
    from distilbench.engines import check_engine
    from distilbench.models.resolve import check_trial, resolve_model
    from distilbench.tracking.uri import store_address_of

    unplaced = config.copy()
    unplaced.output.dir = "."  # Hydra knows the job's directory only once the job runs
    settings = settings_from(unplaced)
    if settings.tracking.name != "none":
        store_address_of(settings.tracking)
    if ask_hub or settings.model.source != "hub":
        model = resolve_model(settings.model)
        check_trial(model, settings)
        check_engine(settings, model, settings.train.precision)
    return settings

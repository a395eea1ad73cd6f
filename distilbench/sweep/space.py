"""The search space of a sweep: Hydra's sweep syntax as Optuna distributions, and the settings of each point."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from distilbench.cli import as_settings_error
from distilbench.composition import baseline_choices, baseline_config, check, overrides_between
from distilbench.identity import SWEEP, point_key, short_hash
from distilbench.report.names import is_choice, name_of
from distilbench.settings import AppSettings, SettingsError, require
from distilbench.sweep.storage import STORAGE_ERRORS
from distilbench.tracking.retries import reason_of
from distilbench.tracking.start import params_of

Params = dict[str, Any]
"""Override key -> value, as Optuna stores it and as it is written into an override."""


@dataclass(frozen=True)
class Point:
    """The settings of one trial: a value for each dimension of a space, and ``extra`` overrides outside of it.

    A baseline outside of the space consists of ``extra`` overrides alone.
    """

    params: Params
    extra: tuple[str, ...] = ()
    is_baseline: bool = False

    @property
    def key(self) -> str:
        """A hash, equal for points of the same params and extra overrides."""
        return short_hash([sorted(self.params.items()), self.extra])

    @property
    def overrides(self) -> list[str]:
        """The point's own overrides on a command line."""
        return [*(f"{key}={value}" for key, value in self.params.items()), *self.extra]


@dataclass(frozen=True)
class Space:
    """``dimensions`` vary and ``fixed`` overrides do not; the ``custom`` function may suggest further dimensions."""

    dimensions: Mapping[str, BaseDistribution]
    fixed: Sequence[str]
    custom: Callable[[DictConfig, Any], None] | None = None

    @property
    def size(self) -> int | None:
        """The number of points; None if they can't be counted."""
        values: list[Any] = [_values(distribution) for distribution in self.dimensions.values()]
        return None if self.custom or None in values else math.prod(map(len, values))

    def points(self) -> list[Point]:
        """List every point, the last dimension varying fastest; only for a grid or if :attr:`size` is not None."""
        values: list[Any] = [_values(distribution) for distribution in self.dimensions.values()]
        return [Point(dict(zip(self.dimensions, chosen, strict=True))) for chosen in itertools.product(*values)]

    def corners(self) -> tuple[Point, Point]:
        """Return two points: one of first choices and lower ends, one of last choices and upper ends."""
        ends = {key: edges(distribution) for key, distribution in self.dimensions.items()}
        return Point({k: v[0] for k, v in ends.items()}), Point({k: v[-1] for k, v in ends.items()})

    def contains(self, params: Mapping[str, Any], is_partial: bool = False) -> bool:
        """Return whether ``params`` have a valid value of every dimension; of some, if ``is_partial``."""
        known = self.dimensions.keys() & params.keys()
        if (len(known) < len(params) and not self.custom) or (len(known) < len(self.dimensions) and not is_partial):
            return False
        try:
            return all(
                self.dimensions[key]._contains(self.dimensions[key].to_internal_repr(params[key])) for key in known
            )
        except ValueError:  # no such choice, or no number
            return False

    def suggest(self, config: Any, trial: Any) -> None:
        """Suggest a value of every dimension to an Optuna trial; ``custom`` may read them, and ``config``.

        Raises :class:`SettingsError` if ``custom`` raises.
        """
        for key, distribution in self.dimensions.items():
            trial._suggest(key, distribution)
        try:
            if self.custom:
                self.custom(config, trial)
        except (SettingsError, *STORAGE_ERRORS):
            raise
        except Exception as error:  # the user's own code
            raise SettingsError(
                "hydra.sweeper.custom_search_space must suggest values to every trial, got "
                f"{type(error).__name__}: {reason_of(error)}; mend that function"
            ) from error

    def name_of(self, point: Point, baseline: Mapping[str, Any], shared: Mapping[str, Any] = {}) -> str:
        """Return a trial's display name, as in reports: ``layers=3 scheduler=cosine``, ``baseline: layers=0``.

        ``baseline`` holds the baseline's value of each dimension, and of what the other points share but not with it
        (``shared``, their value of that); it is empty in a sweep without a baseline.
        """
        if not point.is_baseline:
            same = "baseline" if baseline else "trial"
            return name_of({**point.params, **shared}, baseline) or " ".join(point.extra) or same
        given = point.params or dict(override.partition("=")[::2] for override in point.extra)
        told = {key: given[key] for key in self.dimensions if key in given and not is_choice(key)}
        return name_of({key: value for key, value in baseline.items() if is_choice(key)} | told, title="baseline")


def edges(distribution: BaseDistribution) -> Sequence[Any]:
    """Return every choice, or both ends of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    return distribution.low, distribution.high


def describe(distribution: BaseDistribution) -> str:
    """Return a dimension as text, with its choices sorted: ``0, 3`` or ``1e-05 to 0.1, logarithmic``."""
    if isinstance(distribution, CategoricalDistribution):
        numbers = [choice for choice in distribution.choices if isinstance(choice, int | float)]
        return ", ".join([*map(str, sorted(numbers)), *sorted(map(str, {*distribution.choices} - {*numbers}))])
    low, high, step, is_log = (getattr(distribution, name) for name in ("low", "high", "step", "log"))
    whole = "whole numbers from " if isinstance(distribution, IntDistribution) else ""
    every = f" in steps of {step:g}" if step and not is_log and not (whole and step == 1) else ""
    return f"{whole}{low:g} to {high:g}{every}" + (", logarithmic" if is_log else "")


def _values(distribution: BaseDistribution) -> Sequence[Any] | None:
    """Return every value; None for a continuous interval."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if step is None:
        return [low] if distribution.single() else None
    return [low + i * step for i in range(round((high - low) / step) + 1)]


LONGEST_RANGE = 10_000_000
"""Maximum number of values of a range: some are written out as a list."""

_DEPTH = re.compile(r"^(freeze\.layers=.*)\bdepth\b")


def read_space(params: DictConfig | None, arguments: Sequence[str], loader: ConfigLoader, is_grid: bool,
               custom: str | None = None, depth_of: Callable[[Sequence[str]], int] | None = None) -> Space:  # fmt: skip
    """Read ``hydra.sweeper.params`` and the command line, which replaces the entry for a key that both have.

    In a range of ``freeze.layers``, the word ``depth`` stands for the number of encoder layers, which ``depth_of``
    finds from the other lines. Raises :class:`SettingsError` for invalid syntax, and for a range if ``is_grid``.
    """
    lines = [*(f"{key!s}={value}" for key, value in (params or {}).items()), *arguments]
    others = [line for line in lines if not _DEPTH.search(line)]
    if depth_of and len(others) < len(lines):
        depth = depth_of(others)
        lines = [_DEPTH.sub(rf"\g<1>{depth}", line) for line in lines]
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides(lines)
    except HydraException as error:
        raise SettingsError(f"the search space must be in Hydra's sweep syntax: {reason_of(error)}") from None
    last = {override.get_key_element(): override for override in parsed}
    swept = {key: override for key, override in last.items() if override.is_sweep_override()}
    dimensions = {key: _distribution(key, override, is_grid) for key, override in swept.items()}
    fixed = [override.input_line or "" for key, override in last.items() if key not in swept]
    return Space(dimensions, fixed, _custom_function(custom))


def _distribution(key: str, override: Override, is_grid: bool) -> BaseDistribution:
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    if override.is_range_sweep():
        value: Any = override.value()
        is_short = value.step and abs(value.stop - value.start) <= LONGEST_RANGE * abs(value.step)  # False for NaN
        require(is_short, key, f"a range of at most {LONGEST_RANGE:,} values", override.input_line,
                "take a longer step, or interval(low,high) with hydra/sweeper=optuna")  # fmt: skip
    if override.is_choice_sweep() or (is_grid and override.is_range_sweep()):
        choices: list[Any] = list(dict.fromkeys(override.sweep_iterator(transformer=Transformer.encode)))
        if choices:
            return CategoricalDistribution(choices)
        raise SettingsError(f"{key} must have a value to try, got {override.input_line!r}")
    if is_grid:
        raise SettingsError(
            f"{key} must be a list of values in a grid, got {override.input_line!r}; add hydra/sweeper=optuna, whose "
            "samplers take it, but for grid"
        )
    try:
        distribution: BaseDistribution = create_optuna_distribution_from_override(override)
    except (ValueError, NotImplementedError) as error:
        raise SettingsError(f"{key} must be a space that Optuna takes, got {override.input_line!r}: {error}") from None
    return distribution


def _custom_function(path: str | None) -> Callable[[DictConfig, Any], None] | None:
    if path is None:
        return None
    try:
        found: Callable[[DictConfig, Any], None] = resolve_name(path)
    except Exception as error:
        raise SettingsError(
            f"hydra.sweeper.custom_search_space must be the dotted path of a function (config, trial), got {path!r}: "
            f"{reason_of(error)}"
        ) from None
    return found


class Composer:
    """Composes points of a space into settings, with the same checks as in the job itself."""

    def __init__(self, config: DictConfig, loader: ConfigLoader, space: Space) -> None:
        self._config, self._loader, self._space = config, loader, space
        self._choices = config.hydra.runtime.choices
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self._settings: dict[str, AppSettings] = {}
        self.base = self._compose(Point({}))
        """The config that all points share."""

    def settings(self, point: Point) -> AppSettings:
        """Compose and check one point; raises :class:`SettingsError` if it is invalid."""
        if point.key not in self._settings:
            self._settings[point.key] = check(self._compose(point), ask_hub=True)
        return self._settings[point.key]

    def result_key(self, point: Point) -> str:
        """Return a hash, equal for points that would train the same trial; raises as :meth:`settings` does."""
        return point_key(self.settings(point))

    def baseline_of(self, point: Point) -> Point:
        """Return the baseline of a point: the point's own overrides, then those that turn it into the baseline."""
        config = self._compose(point)
        between = overrides_between(config, baseline_config(config))
        return Point({}, (*point.overrides, *between), is_baseline=True)

    def _compose(self, point: Point) -> DictConfig:
        """Compose groups and additions once for all points that share them (0.15 s), then apply the point's values."""
        try:
            groups = tuple(o for o in point.overrides if o.startswith("+") or o.partition("=")[0] in self._choices)
            if groups not in self._composed:
                config = self._loader.load_sweep_config(self._config, [*self._space.fixed, *groups])
                with open_dict(config):
                    del config["hydra"]  # most of a config, and no part of a trial's settings
                self._composed[groups] = config
            config = self._composed[groups].copy()
            values = [override for override in point.overrides if override not in groups]
            ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(values), config)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            raise as_settings_error(error) or error from None

    def shared_choices(self) -> tuple[Params, Params]:
        """Return the fixed choices that a baseline puts back, with the points' value and with the baseline's."""
        if not self.base.sweep.baseline:
            return {}, {}
        named, baseline = baseline_choices(self.base), baseline_config(self.base)
        fixed = dict(line.lstrip("+").partition("=")[::2] for line in self._space.fixed)
        keys = [key for key in fixed if is_choice(key) and (key in named or "." in key)]
        ours: Params = {key: fixed[key] if key in named else OmegaConf.select(self.base, key) for key in keys}
        theirs: Params = {key: named.get(key, OmegaConf.select(baseline, key)) for key in keys}
        told = {*keys, *self._space.dimensions}
        between = [override.partition("=")[0] for override in overrides_between(self.base, baseline)]
        if any(is_choice(key) and not {key, key.partition(".")[0]} & told for key in between):
            ours |= {key: value for key, value in fixed.items() if key == "experiment" and value[:1] != "["}
        differing = [key for key in ours if ours[key] != theirs.get(key)]
        return {key: ours[key] for key in differing}, {key: theirs.get(key) for key in differing}

    def baseline_params(self) -> Params:
        """Return the baseline's value of each dimension, a choice for a group; empty in a sweep without a baseline."""
        if not self.base.sweep.baseline:
            return {}
        named, baseline, params = baseline_choices(self.base), baseline_config(self.base), {}
        for key, distribution in self._space.dimensions.items():
            if key in self._choices:
                params[key] = named[key] if key in named else self._choices[key] or "null"
            else:
                value = OmegaConf.select(baseline, key)
                same = (v for v in getattr(distribution, "choices", ()) if str(v) == str(value))
                params[key] = next(same, value)
        return params


def fixed_of(settings: Sequence[AppSettings], space: Space) -> dict[str, str]:
    """Return the flat settings that trials share and a continued sweep must keep: all that ``space`` does not vary."""
    groups = tuple(f"{key}." for key in space.dimensions)
    first, *others = ({**params_of(one.trial), "sweep.seeds": str(one.sweep.seeds)} for one in settings)
    return {
        key: value
        for key, value in first.items()
        if key in (*SWEEP, "sweep.seeds")
        and key not in space.dimensions
        and not key.startswith(groups)
        and all(other.get(key) == value for other in others)
    }

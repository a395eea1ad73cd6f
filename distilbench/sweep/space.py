"""What a sweep may try: Hydra's sweep syntax read into Optuna's distributions, and each point's settings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Transformer
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)

from distilbench.composition import baseline_config, check, overrides_between
from distilbench.identity import SWEEP, point_key, short_hash
from distilbench.settings import AppSettings, SettingsError

Params = dict[str, Any]
"""A point: override key -> value, as Optuna keeps it and as it is written into an override."""


@dataclass(frozen=True)
class Cell:
    """A point, with ``extra`` overrides that stand outside of the space (a baseline beside it has some)."""

    params: Params
    extra: tuple[str, ...] = ()
    is_baseline: bool = False

    @property
    def point(self) -> str:
        """A digest of what the cell is."""
        return short_hash([sorted(self.params.items()), self.extra])


@dataclass(frozen=True)
class Space:
    """``dimensions`` that vary, over ``fixed`` overrides that do not; ``custom`` may suggest further ones."""

    dimensions: Mapping[str, BaseDistribution]
    fixed: Sequence[str]
    custom: Callable[[DictConfig, Any], None] | None = None

    @property
    def size(self) -> int | None:
        """How many points there are; None where they can't be counted."""
        counts = [_count(distribution) for distribution in self.dimensions.values()]
        return None if self.custom or None in counts else math.prod(c for c in counts if c is not None)

    def cells(self) -> list[Params]:
        """Every point, the last dimension running fastest; only where :attr:`size` is a number."""
        values = [_values(distribution) for distribution in self.dimensions.values()]
        return [dict(zip(self.dimensions, cell, strict=True)) for cell in itertools.product(*values)]

    def overrides(self, cell: Cell) -> list[str]:
        """The command line of one cell."""
        varied = [f"{key}={value}" for key, value in cell.params.items()]
        return [*self.fixed, *varied, *cell.extra]

    def contains(self, params: Mapping[str, Any]) -> bool:
        """Whether a point lies inside: it names every dimension, with a value that this one has."""
        named = params.keys() >= self.dimensions.keys() if self.custom else params.keys() == self.dimensions.keys()
        return named and all(_contains(distribution, params[key]) for key, distribution in self.dimensions.items())

    def describe(self) -> dict[str, str]:
        """Each dimension as Optuna writes it, to be kept and compared."""
        return {key: distribution_to_json(distribution) for key, distribution in self.dimensions.items()}


def _count(distribution: BaseDistribution) -> int | None:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    if distribution.step is None:
        return 1 if distribution.single() else None
    return round((distribution.high - distribution.low) / distribution.step) + 1


def _values(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices
    assert isinstance(distribution, (IntDistribution, FloatDistribution))
    count, step = _count(distribution), distribution.step
    if count is None:
        raise SettingsError("a grid must have values that can be counted, got an interval; use hydra/sweeper=optuna")
    return [distribution.low + i * (step or 0) for i in range(count)]


def _contains(distribution: BaseDistribution, value: Any) -> bool:
    try:
        return bool(distribution._contains(distribution.to_internal_repr(value)))
    except ValueError:
        return False


def read_space(params: DictConfig | None, arguments: Sequence[str], loader: ConfigLoader, is_grid: bool,
               custom: str | None = None) -> Space:  # fmt: skip
    """Read ``hydra.sweeper.params`` and the command line, which goes before it and replaces a key's values.

    Raises :class:`SettingsError` for what is no sweep, or none that can be counted where ``is_grid``.
    """
    lines = [f"{key!s}={value}" for key, value in (params or {}).items()]
    try:
        parsed = OverridesParser.create(config_loader=loader).parse_overrides([*lines, *arguments])
    except HydraException as error:
        raise SettingsError(f"the search space must be in Hydra's sweep syntax: {_first_line(error)}") from None
    dimensions: dict[str, BaseDistribution] = {}
    fixed: dict[str, str] = {}
    for override in parsed:
        key = override.get_key_element()
        dimensions.pop(key, None)
        fixed.pop(key, None)
        if override.is_sweep_override():
            dimensions[key] = _distribution(key, override, is_grid)
        else:
            fixed[key] = override.input_line or ""
    return Space(dimensions, list(fixed.values()), _custom_function(custom))


def _distribution(key: str, override: Override, is_grid: bool) -> BaseDistribution:
    from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override

    if override.is_discrete_sweep() and (is_grid or not (override.is_choice_sweep() or override.is_range_sweep())):
        choices: list[Any] = list(dict.fromkeys(override.sweep_iterator(transformer=Transformer.encode)))
        if choices:
            return CategoricalDistribution(choices)
        raise SettingsError(f"{key} must have a value to try, got {override.input_line!r}")
    if is_grid:
        raise SettingsError(
            f"{key} must be a list of values in a grid, got {override.input_line!r}; add hydra/sweeper=optuna"
        )
    try:
        distribution = create_optuna_distribution_from_override(override)
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise SettingsError(f"{key} must be a space that Optuna takes, got {override.input_line!r}: {error}") from None
    assert isinstance(distribution, BaseDistribution)
    return distribution


def _custom_function(path: str | None) -> Callable[[DictConfig, Any], None] | None:
    from hydra.utils import get_method

    if path is None:
        return None
    try:
        found: Callable[[DictConfig, Any], None] = get_method(path)
    except Exception as error:
        raise SettingsError(
            f"hydra.sweeper.custom_search_space must be the dotted path of a function (config, trial), got {path!r}: "
            f"{_first_line(error)}"
        ) from None
    return found


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@dataclass(frozen=True)
class Point:
    """A cell composed: its settings, and what it shares with every other that would train the same."""

    cell: Cell
    settings: AppSettings
    key: str
    """Equal for points that would train the same trial."""


class Composer:
    """Composes cells of a space into settings, checked as the job itself would check them."""

    def __init__(self, config: DictConfig, loader: ConfigLoader, space: Space) -> None:
        self._config, self._loader, self._space = config, loader, space
        self._choices = config.hydra.runtime.choices
        self._composed: dict[tuple[str, ...], DictConfig] = {}
        self.base = self._compose(Cell({}))

    def point(self, cell: Cell) -> Point:
        """Compose and check one cell; raises :class:`SettingsError` for what a person can mend."""
        settings = check(self._compose(cell), ask_hub=True)
        return Point(cell, settings, point_key(settings))

    def baseline_beside(self, cell: Cell) -> Point:
        """What a cell is to be compared with: the cell's own overrides, and those that make it the baseline."""
        config = self._compose(cell)
        baseline = baseline_config(config)
        settings = check(baseline, ask_hub=True)
        own = [f"{key}={value}" for key, value in cell.params.items()]
        extra = (*own, *overrides_between(config, baseline))
        return Point(Cell({}, extra, is_baseline=True), settings, point_key(settings))

    def _compose(self, cell: Cell) -> DictConfig:
        """Compose the groups once for all cells that share them (0.15 s), then put each cell's values over them."""
        try:
            overrides = [*(f"{key}={value}" for key, value in cell.params.items()), *cell.extra]
            groups = [line for line in overrides if line.partition("=")[0] in self._choices]
            config = self._groups(tuple(groups)).copy()
            for override in overrides:
                if override not in groups:
                    _put(config, override)
            return config
        except (HydraException, OmegaConfBaseException) as error:
            said = " ".join(line.strip() for line in str(error).split("\n")[:2])
            raise SettingsError(f"the search space must name settings that there are: {said}") from None

    def _groups(self, groups: tuple[str, ...]) -> DictConfig:
        if groups not in self._composed:
            config = self._loader.load_sweep_config(self._config, self._space.overrides(Cell({}, groups)))
            with open_dict(config):
                del config["hydra"]  # most of a config, and nothing that a trial's settings say
            self._composed[groups] = config
        return self._composed[groups]

    def baseline_params(self) -> Params:
        """The baseline's values of every dimension; of a group, its choice in ``baseline.overrides`` or by default."""
        return {key: self._baseline_value(key) for key in self._space.dimensions}

    def _baseline_value(self, key: str) -> Any:
        named = dict(override.partition("=")[::2] for override in self.base.baseline.overrides)
        if key in self._choices:
            return named[key] if key in named else self._choices[key] or "null"
        value = OmegaConf.select(baseline_config(self.base), key)
        distribution = self._space.dimensions[key]
        same = [v for v in getattr(distribution, "choices", ()) if str(v) == str(value)]
        return same[0] if same else value


def _put(config: DictConfig, override: str) -> None:
    """Set one value that a composed config has; an unknown key raises."""
    parsed = OverridesParser.create().parse_override(override)
    OmegaConf.update(config, parsed.get_key_element().lstrip("+"), parsed.value(), force_add=override.startswith("+"))


def fixed_of(settings: AppSettings, space: Space) -> dict[str, str]:
    """What every trial of a sweep shares and must keep when it is continued: settings outside of the space, flat."""
    from distilbench.tracking import params_of

    groups = tuple(f"{key}." for key in space.dimensions)
    flat = params_of(settings.trial) | {"sweep.seeds": str(settings.sweep.seeds)}
    return {
        key: value
        for key, value in flat.items()
        if key in (*SWEEP, "sweep.seeds") and key not in space.dimensions and not key.startswith(groups)
    }

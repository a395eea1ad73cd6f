"""What a sweep will do, checked to the last cell before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilbench.settings import AppSettings, SettingsError
from distilbench.sweep.job import directions_of, objectives_of
from distilbench.sweep.options import Options, Place
from distilbench.sweep.pruning import check_pruning
from distilbench.sweep.space import Cell, Composer, Params, Point, Space, fixed_of, read_space


@dataclass(frozen=True)
class Plan:
    """A sweep before its first trial.

    ``cells`` are queued first: all of a grid, the baseline alone otherwise. ``beside`` are baselines that lie outside
    of the space; ``total`` counts the trials inside, which are fewer than were ``asked`` for in a small space.
    """

    settings: AppSettings
    space: Space
    composer: Composer
    cells: Sequence[Cell]
    beside: Sequence[Cell]
    total: int
    asked: int
    is_grid: bool
    objectives: tuple[str, ...]
    directions: Sequence[str]
    name: str
    directory: Path

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued sweep must still have."""
        return {
            "fixed": fixed_of(self.settings, self.space),
            "space": self.space.describe(),
            "objectives": list(self.objectives),
            "directions": list(self.directions),
        }

    @property
    def selection_split(self) -> str:
        """The split that picks epochs and winners."""
        if self.settings.data.report_fraction:
            return "validation split; a part of train only reports"
        held_out = self.settings.data.selection_fraction > 0
        return "selection split held out of train" if held_out else "validation split, which also reports"

    @property
    def failures_borne(self) -> float:
        """Failed trials that do not end the sweep yet; infinite without a limit."""
        limit = self.settings.sweep.max_failures
        if limit is None:
            return float("inf")
        return limit if limit >= 1 else limit * (self.total + len(self.beside))


def make_plan(options: Options, place: Place, arguments: Sequence[str]) -> Plan:
    """Read the space and check every cell of a grid, every value of another space on its own.

    Raises :class:`SettingsError` for the first thing that a person can mend.
    """
    loader = place.context.config_loader
    space = read_space(options.params, arguments, loader, options.is_grid, options.custom_search_space)
    composer = Composer(place.config, loader, space)
    settings = composer.point(Cell({})).settings if not options.is_grid else _any_settings(composer, space)
    objectives = objectives_of(settings)
    check_pruning(settings.sweep, objectives)
    asked = options.n_trials or settings.sweep.trials
    cells, beside = _grid(composer, space, settings) if options.is_grid else _baseline(composer, space, settings)
    return Plan(
        settings=settings,
        space=space,
        composer=composer,
        cells=cells,
        beside=beside,
        total=len(cells) if options.is_grid else min(asked, space.size or asked),
        asked=asked,
        is_grid=options.is_grid,
        objectives=objectives,
        directions=_directions(options.direction, objectives),
        name=options.study_name,
        directory=Path(place.config.hydra.sweep.dir).absolute(),
    )


def _any_settings(composer: Composer, space: Space) -> AppSettings:
    """The settings that a grid's cells share: those of its first cell, once their number has been confirmed."""
    base = composer.point(Cell({})).settings
    if (space.size or 0) > base.sweep.max_grid:
        raise SettingsError(
            f"sweep.max_grid must be at least the number of cells, got {base.sweep.max_grid} for a grid of "
            f"{space.size:,}; to train them all: sweep.max_grid={space.size}"
        )
    return base


def _grid(composer: Composer, space: Space, settings: AppSettings) -> tuple[list[Cell], list[Cell]]:
    """Every cell, those that are baselines first, and the baselines of others where they are no cells themselves."""
    if not settings.sweep.baseline:
        return [composer.point(Cell(params)).cell for params in space.cells()], []
    cells: list[Cell] = []
    keys: set[str] = set()
    beside: dict[str, Cell] = {}
    for params in space.cells():
        point, baseline = composer.point(Cell(params)), composer.baseline_beside(Cell(params))
        keys.add(point.key)
        beside.setdefault(baseline.key, baseline.cell)
        cells.append(Cell(params, is_baseline=point.key == baseline.key))
    ordered = sorted(cells, key=lambda cell: not cell.is_baseline)
    return ordered, [cell for key, cell in beside.items() if key not in keys]


def _baseline(composer: Composer, space: Space, settings: AppSettings) -> tuple[list[Cell], list[Cell]]:
    """The baseline as the first trial where it lies in the space, beside it elsewhere; each value is checked alone."""
    for key, distribution in space.dimensions.items():
        for value in _edges(distribution):
            composer.point(Cell({key: value}))
    if not settings.sweep.baseline:
        return [], []
    beside = composer.baseline_beside(Cell({}))
    inside = _inside(composer, space, composer.baseline_params())
    if inside is not None and inside.key == beside.key:
        return [Cell(inside.cell.params, is_baseline=True)], []
    return [], [beside.cell]


def _inside(composer: Composer, space: Space, params: Params) -> Point | None:
    if not space.contains(params):
        return None
    try:
        return composer.point(Cell(params))
    except SettingsError:  # a baseline that the sweep's other settings contradict
        return None


def _edges(distribution: Any) -> Sequence[Any]:
    """Every choice, or the two ends of a range."""
    choices = getattr(distribution, "choices", None)
    return choices if choices is not None else (distribution.low, distribution.high)


def _directions(direction: Any, objectives: Sequence[str]) -> list[str]:
    """``hydra.sweeper.direction`` as a list, by default what each objective is for."""
    if direction is None:
        return directions_of(objectives)
    given = [direction] if isinstance(direction, str) or not hasattr(direction, "__iter__") else list(direction)
    names = [str(getattr(one, "name", one)) for one in given]
    if set(names) - {"minimize", "maximize"} or len(names) != len(objectives):
        raise SettingsError(
            f"hydra.sweeper.direction must be minimize or maximize for each of {list(objectives)}, got {names}; "
            "leave it out to have it follow from sweep.objectives"
        )
    return names

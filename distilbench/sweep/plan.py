"""The plan of a sweep, with every setting checked before anything is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext
from omegaconf import DictConfig, ListConfig, OmegaConf
from optuna.distributions import CategoricalDistribution, distribution_to_json

from distilbench.identity import METRIC, SOURCES, short_hash
from distilbench.models.resolve import resolve_model
from distilbench.settings import SWEEP_NAME, AppSettings, Checked, DataSettings, Rule, SettingsError, require
from distilbench.sweep.job import directions_of, objectives_of
from distilbench.sweep.space import Composer, Point, Space, describe, edges, fixed_of, read_space
from distilbench.sweep.trial import check_pruning, pruning_objective
from distilbench.tracking.retries import reason_of

SAMPLERS = ("hydra_plugins.hydra_optuna_sweeper.*", "optuna.samplers.*")
"""Patterns of what ``hydra.sweeper.sampler`` may instantiate, the same as in hydra-optuna-sweeper."""

FIXED_GROUPS = ("sweep", "search", "tracking", "margin", "output")
"""Groups and settings that can't vary within a sweep, since they do not change what a trial trains."""

COUNT = Rule("1 or more", lambda value: isinstance(value, int) and value >= 1)
SHARE = Rule("a share in [0, 1]", lambda value: isinstance(value, int | float) and 0 <= value <= 1)
SPACE_BY_KEY = Rule("null or a space by key", lambda value: isinstance(value, DictConfig))
DATABASE_URL = Rule("the URL of a database", lambda value: isinstance(value, str))


@dataclass(frozen=True)
class SweeperOptions(Checked, group="hydra.sweeper"):
    """What Hydra passes to a sweeper, and the keys of ``hydra.sweeper``, named as in Hydra's own sweepers."""

    config: DictConfig
    context: HydraContext
    launcher: Launcher
    params: Annotated[DictConfig | None, SPACE_BY_KEY] = None
    storage: Annotated[str | None, DATABASE_URL] = None
    study_name: str | None = None
    n_jobs: Annotated[int | None, COUNT] = None
    max_batch_size: Annotated[int | None, COUNT] = None
    """Hydra's own grid's name for ``n_jobs``."""
    n_trials: Annotated[int | None, COUNT] = None
    direction: Any = None
    max_failure_rate: Annotated[float | None, SHARE] = None
    sampler: DictConfig | None = None
    custom_search_space: str | None = None

    @property
    def at_once(self) -> int | None:
        """Trials to launch at once; None for the launcher's default."""
        return self.n_jobs or self.max_batch_size

    @property
    def is_grid(self) -> bool:
        """Whether every point is trained, also by Optuna's sampler of that name."""
        is_sampler = isinstance(self.sampler, DictConfig) and self.sampler._target_ == "optuna.samplers.GridSampler"
        return is_sampler or str(self.config.hydra.sweeper._target_).endswith(".GridSweeper")


@dataclass(frozen=True)
class SweepPlan:
    """A sweep before its first trial.

    ``points`` are queued first: all of a grid, otherwise the baseline alone. ``outside_baselines`` lie outside of the
    space. ``total`` counts the trials inside.
    """

    settings: AppSettings
    space: Space
    points: Sequence[Point]
    outside_baselines: Sequence[Point]
    total: int
    is_grid: bool
    objectives: tuple[str, ...]
    directions: Sequence[str]
    name: str
    directory: Path
    fixed: Mapping[str, str]
    """Settings that all trials share and that a continued sweep must keep."""
    result_key: Callable[[Point], str]
    """Checks a point and returns a hash, equal for points that would train the same trial."""
    name_of: Callable[[Point], str]
    """Returns a point's display name."""
    max_failures: float = math.inf
    """Number of failed trials that the sweep tolerates; infinite without a limit."""
    data: Sequence[DataSettings] = ()
    """The trials' text sources, to be loaded and checked before a new sweep starts."""
    requires_all: bool = False
    """Whether a single failed trial makes the sweep fail, after all others have been trained."""
    base: DictConfig | None = None
    """The config that ``hydra.sweeper.custom_search_space`` is called with."""
    sampler: DictConfig | None = None
    """``hydra.sweeper.sampler``; None for Optuna's default."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a continued sweep must keep."""
        return {
            "fixed": self.fixed,
            "space": {key: distribution_to_json(kind) for key, kind in self.space.dimensions.items()},
            "objectives": list(self.objectives),
            "directions": list(self.directions),
        }

    @property
    def is_selection(self) -> bool:
        """Whether the sweep selects one of several settings besides the baseline; a confirmation's points have none."""
        settings = {frozenset({**point.params, "seed": None}.items()) for point in self.points if not point.is_baseline}
        return len(settings) > 1 or not self.is_grid

    @property
    def chosen_by(self) -> str:
        """The objectives and the split that rank and prune trials, as text."""
        split = "validation split, which also reports"
        if self.settings.data.report_fraction:
            split = "validation split; a part of train only reports"
        elif self.settings.data.selection_fraction:
            split = "selection split held out of train"
        is_pruned = self.settings.sweep.pruner != "none" and len(self.objectives) > 1
        pruned = f"; pruned by {pruning_objective(self.objectives)} alone" if is_pruned else ""
        return f"{' and '.join(self.objectives)} on the {split}{pruned}"


def make_plan(options: SweeperOptions, arguments: Sequence[str]) -> SweepPlan:
    """Read the search space and check every point of a grid, or every value of any other space by itself.

    Raises :class:`SettingsError` for the first invalid setting.
    """
    _check_options(options, arguments)
    loader = options.context.config_loader
    space = read_space(options.params, arguments, loader, options.is_grid, options.custom_search_space,
                       partial(_min_depth, options))  # fmt: skip
    for key in space.dimensions:
        require(key.lstrip("+").partition(".")[0] not in FIXED_GROUPS, key, "one value for a whole sweep",
                describe(space.dimensions[key]), "run a sweep for each")  # fmt: skip
    composer = Composer(options.config, loader, space)
    own = OmegaConf.to_container(composer.base.output, resolve=False)["dir"]  # type: ignore[index, call-overload]
    require(own == "${hydra:runtime.output_dir}", "output.dir", "left to a sweep, which gives each trial its own", own,
            "set hydra.sweep.dir")  # fmt: skip
    grid = options.is_grid
    checked = _grid_points(space, composer) if grid else _checked_values(space, composer)
    settings = [composer.settings(point) for point in checked]
    objectives = objectives_of(settings[0], type(options.launcher) is BasicLauncher or options.at_once == 1)
    check_pruning(settings[0].sweep, objectives)
    require("seed" not in space.dimensions or not settings[0].sweep.seeds, "sweep.seeds",
            "null where seed varies", settings[0].sweep.seeds, "drop one of the two")  # fmt: skip
    sampler_of(options.sampler, trials=0)
    asked = options.n_trials or settings[0].sweep.trials
    points, outside = _add_baselines(checked, composer) if grid else _search_baselines(checked, space, composer, asked)
    if grid:
        points = points[: options.n_trials]  # a number with Optuna's grid sampler, else None
    total = len(points) if grid else min(asked, space.size or asked)
    shared, theirs = composer.shared_choices()
    return SweepPlan(
        settings=settings[0],
        space=space,
        points=points,
        outside_baselines=outside,
        total=total,
        is_grid=grid,
        objectives=objectives,
        directions=_directions(options.direction, objectives),
        name=options.config.sweep.name,
        directory=Path(options.config.hydra.sweep.dir).absolute(),
        fixed=fixed_of(settings, space),
        data=list({short_hash(one.data): one.data for one in settings}.values()),
        result_key=composer.result_key,
        name_of=partial(space.name_of, baseline={**composer.baseline_params(), **theirs}, shared=shared),
        max_failures=_max_failures(options, settings[0], total + len(outside)),
        base=composer.base,
        sampler=options.sampler,
    )


def _check_options(options: SweeperOptions, arguments: Sequence[str]) -> None:
    """Raise :class:`SettingsError` for what contradicts each other in ``hydra.sweeper``, ``hydra.sweep`` and the rest.

    A ``study_name`` names the sweep, its directory included.
    """
    hydra, name = options.config.hydra, options.study_name or options.config.sweep.name
    subdir = OmegaConf.to_container(hydra.sweep, resolve=False)["subdir"]  # type: ignore[index, call-overload]
    require(subdir == "${hydra.job.num}", "hydra.sweep.subdir", "left to a sweep, which finds trials by number", subdir,
            "set hydra.sweep.dir, or take Hydra's own grid: hydra/sweeper=basic")  # fmt: skip
    typed = dict(line.partition("=")[::2] for line in arguments)
    is_total = "," in typed.get("sweep.trials", ",") or not options.is_grid or options.sampler is not None
    require(is_total, "sweep.trials", "left to Optuna", typed.get("sweep.trials"),
            "a grid trains all of its points; add hydra/sweeper=optuna")  # fmt: skip
    require(name == options.config.sweep.name or "sweep.name" not in typed, "hydra.sweeper.study_name",
            "left to sweep.name", name, "drop one of the two")  # fmt: skip
    key = "sweep.name" if name == options.config.sweep.name else "hydra.sweeper.study_name"
    require(SWEEP_NAME.is_valid(str(name)), key, SWEEP_NAME.allowed, name)
    options.config.sweep.name = str(name)
    _check_launcher(options.launcher)


def _check_launcher(launcher: Any) -> None:
    """Raise :class:`SettingsError` for what joblib's launcher would refuse at each trial."""
    if not hasattr(launcher, "joblib"):
        return
    from hydra_plugins.hydra_joblib_launcher._core import process_joblib_cfg
    from joblib import Parallel, effective_n_jobs

    given = dict(launcher.joblib)
    try:
        process_joblib_cfg(given)
        given.pop("inner_max_num_threads")
        Parallel(**given)
        effective_n_jobs(given["n_jobs"])
    except ValueError as error:
        raise SettingsError(f"hydra.launcher must have settings that joblib takes: {reason_of(error)}") from None


def _min_depth(options: SweeperOptions, lines: Sequence[str]) -> int:
    """Return the number of encoder layers of the model, or of the shallowest one if the model varies."""
    loader = options.context.config_loader
    space = read_space(None, lines, loader, options.is_grid)
    composer, (low, _) = Composer(options.config, loader, space), space.corners()
    models = [Point({**low.params, key: value}) for key, distribution in space.dimensions.items()
              if key.partition(".")[0] == "model" for value in edges(distribution)]  # fmt: skip
    return min(resolve_model(composer.settings(point).model).depth for point in models or [low])


def _max_failures(options: SweeperOptions, settings: AppSettings, trials: int) -> float:
    limit = settings.sweep.max_failures
    if options.max_failure_rate is not None:
        return options.max_failure_rate * trials
    if limit is None:
        return math.inf
    return limit if limit >= 1 else limit * trials


def _grid_points(space: Space, composer: Composer) -> list[Point]:
    """Return every point of a grid; raises :class:`SettingsError` for more than ``sweep.max_grid``."""
    limit = composer.settings(space.corners()[0]).sweep.max_grid
    if (space.size or 0) > limit:
        raise SettingsError(
            f"sweep.max_grid must be at least the number of points, got {limit} for a grid of {space.size:,}; "
            f"to train them all: sweep.max_grid={space.size}"
        )
    return space.points()


def _checked_values(space: Space, composer: Composer) -> list[Point]:
    """Return points that cover each choice and each end of a range, with all other dimensions at one of their ends.

    A value that is invalid with either end of the others is returned all the same, so that the caller's check fails.
    """
    low, high = space.corners()
    found = []
    for key, distribution in space.dimensions.items():
        for value in edges(distribution):
            point, other = (Point({**corner.params, key: value}) for corner in (low, high))
            found.append(point if _is_valid(point, composer) else other)
    return found or [low]


def _is_valid(point: Point, composer: Composer) -> bool:
    try:
        composer.settings(point)
    except SettingsError:
        return False
    return True


def _add_baselines(points: Sequence[Point], composer: Composer) -> tuple[list[Point], list[Point]]:
    """Return the points of a grid, baselines first, and the baselines that are not among these points."""
    if not composer.settings(points[0]).sweep.baseline:
        return list(points), []
    baselines: dict[str, Point] = {}
    for baseline in map(composer.baseline_of, points):
        baselines.setdefault(composer.result_key(baseline), baseline)
    marked = [replace(point, is_baseline=composer.result_key(point) in baselines) for point in points]
    keys = {composer.result_key(point) for point in points}
    ordered = sorted(marked, key=lambda point: not point.is_baseline)
    return ordered, [baseline for key, baseline in baselines.items() if key not in keys]


def _search_baselines(
    checked: Sequence[Point], space: Space, composer: Composer, asked: int
) -> tuple[list[Point], list[Point]]:
    """Return the baseline as the first trial if it lies in the space, otherwise as a trial beside it.

    If the space varies model, text or metric, each combination of their values gets a baseline of its own, beside the
    space: trials of different protocols are never compared. Raises :class:`SettingsError` for more of them than the
    number of trials ``asked`` for. If the settings outside of the space are invalid by themselves, a ``checked`` point
    completes the baseline.
    """
    if not composer.settings(checked[0]).sweep.baseline:
        return [], []
    varied = {key: kind for key, kind in space.dimensions.items() if key in ("model", "data", *SOURCES, *METRIC)}
    ranges = {key: kind for key, kind in varied.items() if not isinstance(kind, CategoricalDistribution)}
    require((Space(ranges, ()).size or asked + 1) <= asked, ", ".join(ranges),
            f"{asked} values or fewer, since each needs a baseline of its own",
            " and ".join(map(describe, ranges.values())),
            "list some, as in choice(1,2), raise sweep.trials, or go without: sweep.baseline=false")  # fmt: skip
    found = {}
    for protocol in Space(varied, ()).points():
        bases = (Point({**point.params, **protocol.params}) for point in (Point({}), *checked))
        if base := next((point for point in bases if _is_valid(point, composer)), None):
            baseline = composer.baseline_of(base)
            found[composer.result_key(baseline)] = baseline
    if varied:
        return [], list(found.values())
    baseline = next(iter(found.values()))
    inside = Point(composer.baseline_params(), is_baseline=True)
    is_inside = space.contains(inside.params) and _is_valid(inside, composer)
    if is_inside and composer.result_key(inside) == composer.result_key(baseline):
        return [inside], []
    return [], [baseline]


def _directions(direction: Any, objectives: Sequence[str]) -> list[str]:
    """Return ``hydra.sweeper.direction`` as a list, by default the natural direction of each objective."""
    if direction is None:
        return directions_of(objectives)
    names = [str(one) for one in (direction if isinstance(direction, ListConfig) else [direction])]
    require(not {*names} - {"minimize", "maximize"} and len(names) == len(objectives), "hydra.sweeper.direction",
            f"minimize or maximize for each of {[*objectives]}", names,
            "leave it out to have it follow from sweep.objectives")  # fmt: skip
    return names


def sampler_of(config: DictConfig | None, trials: int) -> Any:
    """Create the sampler of ``hydra.sweeper.sampler``; None, Optuna's default, for a grid.

    The number of existing ``trials`` is added to the seed; otherwise, a continued sweep would draw the same points.
    """
    from hydra.utils import instantiate

    require(config is None or isinstance(config, DictConfig), "hydra.sweeper.sampler", "settings of a sampler", config,
            f"choose one by hydra/sweeper/sampler={config}")  # fmt: skip
    if config is None or config._target_ == "optuna.samplers.GridSampler":
        return None
    lacks = config._target_.endswith(".CmaEsSampler") and find_spec("cmaes") is None  # which Optuna asks for in a trial
    require(not lacks, "hydra.sweeper.sampler", "another without the package cmaes", "cmaes", "run: pip install cmaes")
    seed = config.get("seed")
    moved = {} if seed is None else {"seed": seed + trials}
    try:
        return instantiate(config, _execution_whitelist_=SAMPLERS, **moved)
    except Exception as error:  # a sampler may raise anything for its arguments
        raise SettingsError(
            f"hydra.sweeper.sampler must be a sampler of Optuna's with its arguments: {reason_of(error)}"
        ) from None

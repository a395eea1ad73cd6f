"""The plan of a sweep, made in process: what is refused of a sweeper's keys, and what is planned."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import OmegaConf
from optuna import create_study
from optuna.samplers import RandomSampler

from distilbench.settings import SettingsError, register_schema
from distilbench.sweep.plan import SweeperOptions, make_plan, sampler_of
from hydra_plugins.distilbench_sweeper.sweeper import GridSweeper, OptunaSweeper
from tests.conftest import ROOT, TINY

OPTUNA = ("hydra/sweeper=optuna", "freeze.layers=0,1")


def planned(*typed: str):
    """Make the plan of a command line, as the sweeper does."""
    register_schema()
    swept = [line for line in typed if "," in line or "(" in line]
    with initialize_config_dir(str(ROOT / "conf")):
        given = [*TINY, *(line for line in typed if line not in swept)]
        config = compose("config", given, return_hydra_config=True)
        keys = {key: value for key, value in config.hydra.sweeper.items() if key != "_target_"}
        sweeper = (OptunaSweeper if "hydra/sweeper=optuna" in typed else GridSweeper)(**keys)
        context = HydraContext(GlobalHydra.instance().config_loader(), Callbacks())
        launcher = Plugins.instance().instantiate_launcher(hydra_context=context, task_function=print, config=config)
        options = SweeperOptions(config, context, launcher, **sweeper._options)
        return make_plan(options, [*config.hydra.overrides.task, *swept])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            ["seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
            "hydra.sweep.subdir must be left",
        ),
        (
            ["seed=1,2", "sweep.trials=3"],
            "sweep.trials must be left to Optuna, got '3'; a grid trains all of its points",
        ),
        ([*OPTUNA, "hydra.sweeper.n_trials=two"], "hydra.sweeper.n_trials must be 1 or more, got 'two'"),
        ([*OPTUNA, "hydra.sweeper.max_failure_rate=x"], "hydra.sweeper.max_failure_rate must be a share"),
        ([*OPTUNA, "hydra.sweeper.params=[a]"], "hydra.sweeper.params must be null or a space by key, got ['a']"),
        (
            ["seed=1,2", "hydra/launcher=joblib", "hydra.launcher.backend=x"],
            "hydra.launcher must have settings",
        ),
        (["seed=1,2", "hydra/launcher=joblib", "hydra.launcher.prefer=x"], "joblib takes: prefer=x is not a valid"),
        ([*OPTUNA, "hydra.sweeper.storage=5"], "hydra.sweeper.storage must be the URL of a database, got 5"),
        (
            [*OPTUNA, "hydra.sweeper.sampler=random"],
            "hydra.sweeper.sampler must be settings of a sampler, got "
            "'random'; choose one by hydra/sweeper/sampler=random",
        ),
        ([*OPTUNA, "hydra.sweeper.study_name=a/b"], "hydra.sweeper.study_name must be letters"),
        (
            [*OPTUNA, "sweep.name=a", "hydra.sweeper.study_name=b"],
            "study_name must be left to sweep.name, got 'b'",
        ),
        (
            ["seed=1,2", "sweep.seeds=[1,2]"],
            "sweep.seeds must be null where seed varies, got [1, 2]; drop one of the two",
        ),
        (["++margin=1,2"], "margin must be one value for a whole sweep, got '1, 2'; run a sweep for each"),
        (
            ["seed=1,2", "output.dir=here"],
            "output.dir must be left to a sweep, which gives each trial its own, got 'here'",
        ),
        (["seed=range(0,3)", "sweep.max_grid=2"], "got 2 for a grid of 3; to train them all: sweep.max_grid=3"),
        (
            [*OPTUNA, "hydra.sweeper.direction=up"],
            "direction must be minimize or maximize for each of ['accuracy'], got",
        ),
        ([*OPTUNA, "hydra.sweeper.custom_search_space=no.such"], "custom_search_space must be the dotted path"),
        ([*OPTUNA, "optim.lr=1e-4,-1.0"], "optim.lr must be "),
    ],
)
def test_what_a_sweep_would_ignore_or_stumble_over_is_refused_in_a_line(typed, line):
    with pytest.raises(SettingsError) as refused:
        planned(*typed)
    assert line in str(refused.value)


def test_optunas_name_of_a_study_names_the_sweep_and_its_directory():
    plan = planned(*OPTUNA, "hydra.sweeper.study_name=mine")
    assert (plan.name, plan.directory.name) == ("mine", "mine")
    assert planned(*OPTUNA, "hydra.sweeper.study_name=null", "sweep.name=own").name == "own"


@pytest.mark.parametrize(
    ("typed", "cost"),
    [([], "train_seconds"), (["hydra/launcher=fused"], "train_flops"),
     (["hydra/launcher=fused", "hydra.sweeper.n_jobs=1"], "train_seconds"),
     (["hydra/launcher=fused", "hydra.sweeper.max_batch_size=1"], "train_seconds")],
)  # fmt: skip
def test_a_sweeps_cost_is_seconds_only_where_its_launcher_runs_one_trial_at_a_time(typed, cost):
    assert planned("freeze.layers=0,1", "sweep.objectives=[accuracy,cost]", *typed).objectives == ("accuracy", cost)


def test_a_continued_sweeps_sampler_draws_other_points_as_if_its_seed_were_higher():
    config = OmegaConf.create({"_target_": "optuna.samplers.RandomSampler", "seed": 7})
    samplers = sampler_of(config, 0), sampler_of(config, 3), RandomSampler(7), RandomSampler(10)
    drawn = [create_study(sampler=sampler).ask().suggest_float("x", 0, 1) for sampler in samplers]
    assert drawn[:2] == drawn[2:]


def protocols_of(*typed: str) -> list[tuple[str, ...]]:
    """The values of a sweep's dimensions that its baselines have."""
    plan = planned("hydra/sweeper=optuna", "optim.lr=interval(1e-5,1e-3)", *typed)
    return [
        tuple(line for line in point.extra if line.startswith(("data.", "model."))) for point in plan.outside_baselines
    ]


def test_each_value_and_each_combination_of_what_makes_a_protocol_has_a_baseline():
    assert protocols_of("data.split_seed=range(0,3)") == [(f"data.split_seed={seed}",) for seed in (0, 1, 2)]
    both = protocols_of("model.layers=1,2", "data.split_seed=int(interval(4,5))")
    assert both == [(f"model.layers={m}", f"data.split_seed={d}") for m in (1, 2) for d in (4, 5)]
    assert len(protocols_of("data.max_train_examples=range(10,100)")) == 1  # treatment, compared with all of the text


@pytest.mark.parametrize(
    ("typed", "got"),
    [
        ("data.split_seed=range(0,100)", "whole numbers from 0 to 99"),
        ("data.report_fraction=interval(0.1,0.3)", "0.1 to 0.3"),
    ],
)
def test_more_protocols_than_trials_are_refused_with_baselines_but_not_without(typed, got):
    with pytest.raises(SettingsError) as refused:
        protocols_of(typed)
    assert str(refused.value) == (
        f"{typed.partition('=')[0]} must be 20 values or fewer, since each needs a baseline of its own, got {got!r}; "
        "list some, as in choice(1,2), raise sweep.trials, or go without: sweep.baseline=false"
    )
    assert protocols_of(typed, "sweep.baseline=false") == []


@pytest.mark.parametrize("key", ["config", "n_trails"])
def test_what_is_no_key_of_a_sweeper_is_refused_in_a_line(capsys, key):
    sweeper = GridSweeper(**{key: 1})
    sweeper._setup = (None, None, None)
    with pytest.raises(SystemExit):
        sweeper.sweep([])
    assert f"hydra.sweeper.{key} must be a key of this sweeper, got 1; --cfg" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "max_failures"),
    [("sweep.max_failures=null", math.inf), ("sweep.max_failures=1", 1), ("sweep.max_failures=0.5", 1),
     ("hydra.sweeper.max_failure_rate=0.25", 0.5)],
)  # fmt: skip
def test_failures_are_tolerated_as_a_number_or_as_a_share_of_all_trials(typed, max_failures):
    assert planned(*OPTUNA, typed).max_failures == max_failures


@pytest.mark.parametrize(
    ("typed", "split"),
    [("seed=7", "validation split, which also reports"),
     ("data.report_fraction=0.2", "validation split; a part of train only reports"),
     ("data.selection_fraction=0.2", "selection split held out of train"),
     ("sweep.seeds=[1,2]", "validation split, which also reports")],
)  # fmt: skip
def test_a_plan_says_which_split_ranks_its_trials_and_what_a_continued_sweep_must_keep(typed, split):
    plan = planned(*OPTUNA, "sweep.objectives=[accuracy,train_seconds]", "sweep.pruner=median", typed)
    assert plan.chosen_by == f"accuracy and train_seconds on the {split}; pruned by accuracy alone"
    assert replace(plan, objectives=("f1",)).chosen_by == f"f1 on the {split}"
    unpruned = replace(plan.settings, sweep=replace(plan.settings.sweep, pruner="none"))
    assert replace(plan, settings=unpruned).chosen_by == f"accuracy and train_seconds on the {split}"
    kept = plan.identity
    assert (kept["objectives"], kept["directions"]) == (["accuracy", "train_seconds"], ["maximize", "minimize"])
    assert (kept["fixed"], [*kept["space"]]) == (plan.fixed, ["freeze.layers"])


def test_depth_is_that_of_the_shallowest_model():
    found = [planned("hydra/sweeper=optuna", "search=accuracy", *more).space.dimensions["freeze.layers"].high
             for more in ((), ("model.layers=1,2",))]  # fmt: skip
    assert found == [2, 1]


def test_a_grid_trains_its_baselines_first_and_only_what_lies_beside_it_is_outside():
    inside, outside = planned("freeze.layers=1,0"), planned("freeze.layers=1,2")
    assert [(point.params["freeze.layers"], point.is_baseline) for point in inside.points] == [(0, True), (1, False)]
    assert (inside.outside_baselines, inside.total, inside.is_selection) == ([], 2, False)
    assert [point.is_baseline for point in outside.points] == [False, False]
    assert len(outside.outside_baselines) == 1
    assert (outside.total, outside.is_selection, outside.is_grid) == (2, True, True)
    assert planned("seed=1,2", "freeze.layers=1").is_selection is False
    assert planned("freeze.layers=1,2", "sweep.baseline=false").outside_baselines == []

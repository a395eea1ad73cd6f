"""The plan of a sweep, made in process: what is refused of a sweeper's keys, and what is planned."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
from hydra.core.global_hydra import GlobalHydra
from hydra.types import HydraContext

from distilbench.settings import SettingsError, register_schema
from distilbench.sweep.plan import SweeperOptions, make_plan
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
        options = SweeperOptions(config, context, BasicLauncher(), **sweeper._options)
        return make_plan(options, [*config.hydra.overrides.task, *swept])


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (
            ["seed=1,2", "hydra.sweep.subdir=${hydra.job.override_dirname}"],
            "hydra.sweep.subdir must be left",
        ),
        (["seed=1,2", "sweep.trials=3"], "sweep.trials must be left to Optuna, got 3; a grid trains all of its points"),
        ([*OPTUNA, "hydra.sweeper.n_trials=two"], "hydra.sweeper.n_trials must be 1 or more, got 'two'"),
        ([*OPTUNA, "hydra.sweeper.max_failure_rate=x"], "hydra.sweeper.max_failure_rate must be a share"),
        ([*OPTUNA, "hydra.sweeper.sampler=random"], "got 'random'; choose one by hydra/sweeper/sampler=random"),
        ([*OPTUNA, "hydra.sweeper.study_name=a/b"], "hydra.sweeper.study_name must be letters"),
        (
            [*OPTUNA, "sweep.name=a", "hydra.sweeper.study_name=b"],
            "study_name must be left to sweep.name, got 'b'",
        ),
        ([*OPTUNA, "hydra.sweeper.custom_search_space=no.such"], "custom_search_space must be the dotted path"),
    ],
)
def test_what_a_sweep_would_ignore_or_stumble_over_is_refused_in_a_line(typed, line):
    with pytest.raises(SettingsError) as refused:
        planned(*typed)
    assert line in str(refused.value)


def test_optunas_name_of_a_study_names_the_sweep_and_its_directory():
    plan = planned(*OPTUNA, "hydra.sweeper.study_name=mine")
    assert (plan.name, plan.directory.name) == ("mine", "mine")

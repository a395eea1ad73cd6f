"""What of Hydra's own suites, and of hydra-optuna-sweeper's, says something about our sweepers.

Left out: ``BatchedSweeperTestSuite``, the sweep cases of ``LauncherTestSuite`` (whose launcher side ``test_launcher``
runs) and the stock sweeper's examples. They sweep over applications of their own, to which ours are not offered: those
are named in our ``conf/`` alone and need our settings. The stock sweeper's failure rates per batch, deprecated
spaces and ``n_trials`` added on resume are what ours replaces.
"""

from __future__ import annotations

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.test_utils.launcher_common_tests import IntegrationTestSuite
from hydra_plugins.hydra_optuna_sweeper._impl import create_optuna_distribution_from_override
from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper as StockSweeper
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from distilbench.sweep.space import read_space
from hydra_plugins.distilbench_sweeper.sweeper import GridSweeper, OptunaSweeper
from tests.conftest import ROOT

Plugins.instance()  # once before Hydra's fixture saves and restores what plugins registered


def test_hydra_finds_our_sweepers_beside_the_stock_one():
    assert {GridSweeper, OptunaSweeper, StockSweeper} <= set(Plugins.instance().discover(Sweeper))


@pytest.mark.parametrize("name", ["grid", "optuna"])
def test_our_configurations_have_every_key_of_the_stock_sweeper_and_name_samplers_that_there_are(name):
    config = yaml.safe_load((ROOT / "conf" / "hydra" / "sweeper" / f"{name}.yaml").read_text())
    stock = ConfigStore.instance().load("hydra/sweeper/optuna.yaml").node
    if name == "optuna":
        assert set(map(str, stock)) - {"defaults"} <= set(config) - {"defaults"} | {"sampler", "max_failure_rate"}
        assert "tpe.yaml" in ConfigStore.instance().list("hydra/sweeper/sampler")
    assert {"params", "storage", "study_name"} <= set(config)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("key=choice(1,2)", CategoricalDistribution([1, 2])),
        ("key=choice(true, false)", CategoricalDistribution([True, False])),
        ("key=choice(hello, world)", CategoricalDistribution(["hello", "world"])),
        ("key=shuffle(range(1,3))", CategoricalDistribution((1, 2))),
        ("key=range(1,3)", IntDistribution(1, 2)),
        ("key=interval(1, 5)", FloatDistribution(1, 5)),
        ("key=int(interval(1, 5))", IntDistribution(1, 5)),
        ("key=tag(log, interval(1, 5))", FloatDistribution(1, 5, log=True)),
        ("key=tag(log, int(interval(1, 5)))", IntDistribution(1, 5, log=True)),
        ("key=range(0.5, 2.0, step=0.5)", FloatDistribution(0.5, 1.5, step=0.5)),
    ],
)
def test_a_line_of_sweep_syntax_means_what_it_means_to_the_stock_sweeper(line, expected):
    space = read_space(None, [line], None, is_grid=False)  # type: ignore[arg-type]
    stock = create_optuna_distribution_from_override(OverridesParser.create().parse_override(line))
    ours = space.dimensions["key"]
    assert type(ours) is type(expected)
    if isinstance(expected, CategoricalDistribution):
        assert sorted(map(str, ours.choices)) == sorted(map(str, expected.choices)) == sorted(map(str, stock.choices))
    else:
        assert ours == expected == stock


@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/sweeper=basic"])])
class TestAnApplicationOfSomeoneElse(IntegrationTestSuite):
    """Hydra's suite: an application that never heard of us sweeps as if our plugins were not installed."""

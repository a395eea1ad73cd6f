"""The space of methods: each experiment is there and draws rates of its own."""

from __future__ import annotations

import optuna
import pytest
from omegaconf import OmegaConf
from optuna.trial import FixedTrial

from distilbench.settings import SettingsError
from distilbench.sweep.methods import RATES, suggest_lr
from tests.conftest import ROOT, compose_settings


def test_every_method_is_an_experiment_at_a_rate_within_its_own():
    for name, (low, high) in RATES.items():
        assert low <= compose_settings("output.dir=.", "sweep.name=s", f"experiment={name}").optim.lr <= high
    space = OmegaConf.load(ROOT / "conf/search/methods.yaml").hydra.sweeper
    assert space.params.experiment == f"choice({','.join(RATES)})"
    assert space.custom_search_space == "distilbench.sweep.methods.suggest_lr"


def test_experiments_of_methods_set_apart_what_is_trained():
    methods = {n: compose_settings("output.dir=.", "sweep.name=s", f"experiment={n}") for n in RATES}
    told = {name: (s.freeze.policy, s.freeze.layers, s.adapter.name) for name, s in methods.items()}
    assert told == {
        "full": ("depth", 0, "none"), "layer_freezing": ("depth", 3, "none"), "head": ("head", 0, "none"),
        "bias": ("bias", 0, "none"), "lora": ("depth", 0, "lora"), "ia3": ("depth", 0, "ia3"),
    }  # fmt: skip
    assert methods["full"] == compose_settings("output.dir=.", "sweep.name=s")


@pytest.mark.parametrize("name", RATES)
def test_a_trial_draws_its_rate_on_a_log_scale_between_the_ends_of_its_method(name):
    trial = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0)).ask()
    trial.suggest_categorical("experiment", [name])
    suggest_lr(OmegaConf.create(), trial)
    distribution = trial.distributions["optim.lr"]
    assert (distribution.low, distribution.high, distribution.log) == (*RATES[name], True)


def test_without_its_experiment_the_space_is_refused_in_one_line():
    with pytest.raises(SettingsError, match=r"^experiment must be a choice of full, .* with search=methods, got None;"):
        suggest_lr(OmegaConf.create(), FixedTrial({}))

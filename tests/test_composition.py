"""Hydra's side: baselines, command lines that compose to what they describe."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from distilbench.composition import (
    CheckFirst,
    _composed,
    baseline_config,
    check,
    command_for,
    default_treatment,
    overrides_between,
    typed_choices,
)
from distilbench.identity import treatment_of
from distilbench.report.rows import find_baseline, label_rows, rows_from
from distilbench.results import BASELINE_ROLE
from distilbench.settings import SettingsError, register_schema, settings_from
from distilbench.sweep.plan import _add_baselines
from distilbench.sweep.space import Composer, read_space
from distilbench.train import job_of
from tests.conftest import ROOT
from tests.report.made_trials import trial


@pytest.fixture
def composing():
    """Hydra initialised on the project's configurations, as inside a job."""
    register_schema()
    default_treatment.cache_clear()
    _composed.cache_clear()  # of another registration, whose classes are others
    with initialize_config_dir(str(ROOT / "conf")):
        yield


def composed(*overrides: str):
    return compose("config", ["sweep.name=unused", "output.dir=unused", *overrides])


def test_what_is_added_with_a_plus_is_refused_unless_a_setting_reads_it(composing):
    given = ("model=tiny", "data=synthetic", "tracking=none", "+freeze_layers=1")
    line = "^freeze_layers must be a setting that there is, or that another reads, got 1; --help lists them$"
    with pytest.raises(SettingsError, match=line):
        check(composed(*given), ask_hub=True)
    assert check(composed(*given, "freeze.layers=${freeze_layers}"), ask_hub=True).freeze.layers == 1
    several = (*given[:-1], "+own={depth:2,rates:[1e-3]}", "freeze.layers=${own.depth}", "optim.lr=${own.rates[0]}")
    assert check(composed(*several), ask_hub=True).freeze.layers == 2
    with pytest.raises(SettingsError, match=r"^layers must be"):  # ${freeze.layers} reads another
        check(composed(*given[:-1], "+layers=1", "train.epochs=${freeze.layers}"), ask_hub=True)


@pytest.mark.parametrize(
    "given",
    [
        ["freeze.layers=3", "scheduler=cosine", "scheduler.warmup_ratio=0.1"],
        ["experiment=[quick,layer_freezing]", "seed=7"],
        ["model=tiny", "data=synthetic", "tracking=none", "data.label_names=['a=b','c, d']"],
        ["data=tweets", "optim=sgd", "train.precision=fp32", "train.eval_steps=5"],
        ["data.fallback=null", "model.fallback=null"],
        ["+depth=2", "freeze.layers=${depth}"],
        ["model=minilm", "model.fallback={source:random,checkpoint:bert,layers:2}", "data.fallback.source=synthetic"],
    ],
)
def test_a_printed_command_composes_to_the_trial_that_it_describes(composing, given):
    choices = {"model": "distilbert", "data": "sst2", "engine": "auto", "tracking": "mlflow"}
    choices |= dict(line.split("=") for line in given if line.split("=")[0] in choices)
    config = composed(*given)
    line = command_for(config, choices)
    assert line.startswith("python -m distilbench.train ")
    again = composed(*shlex.split(line)[3:])
    assert settings_from(again).trial == settings_from(config).trial


def test_a_printed_command_means_the_same_files_wherever_it_is_typed(composing, tmp_path, monkeypatch):
    monkeypatch.setenv("STORE", "sqlite:///secret.db")
    places = ["model=local", "model.checkpoint=m", "data=files", "data.train=p.csv", "data.validation=v.csv"]
    choices = {"model": "local", "data": "files", "engine": "auto", "tracking": "mlflow"}
    (tmp_path / "m").mkdir()
    for name in ("p.csv", "v.csv"):
        (tmp_path / name).write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    meant = settings_from(config := composed(*places, "tracking.uri=sqlite:///my.db"))
    line = command_for(config, choices)
    hidden = command_for(composed(*places, "tracking.uri=${oc.env:STORE}", "train.resume=true"), choices)
    monkeypatch.chdir("/")
    again = settings_from(composed(*shlex.split(line)[3:]))
    assert (again.model, again.data, again.tracking) == (meant.model, meant.data, meant.tracking)
    assert meant.tracking.uri == f"sqlite:///{tmp_path}/my.db"
    assert "secret" not in hidden
    assert "train.resume" not in hidden, "there is nothing to continue elsewhere"
    assert settings_from(composed(*shlex.split(hidden)[3:])).tracking.uri == "sqlite:////secret.db"


def test_a_baseline_takes_back_the_choices_that_it_names_and_keeps_the_rest(composing):
    given = composed("freeze.layers=3", "optim.lr=1e-3", "scheduler=cosine", "train.epochs=1",
                     "data.max_train_examples=500", "seed=3")  # fmt: skip
    baseline = settings_from(baseline_config(given))
    assert (baseline.freeze.layers, baseline.optim.lr, baseline.scheduler.name) == (0, 2e-5, "linear")
    assert (baseline.train.epochs, baseline.data.max_train_examples, baseline.seed) == (1, 500, 3)


def test_a_baseline_of_ones_own_may_name_the_amount_of_text_and_the_epochs(composing):
    own = "baseline.overrides=['freeze=none','data.max_train_examples=null','train.epochs=3']"
    baseline = settings_from(baseline_config(composed("freeze.layers=3", "optim.lr=1e-3", "train.epochs=1", own)))
    assert (baseline.freeze.layers, baseline.optim.lr) == (0, 1e-3)
    assert (baseline.train.epochs, baseline.data.max_train_examples) == (3, None)


def test_overrides_between_two_configurations_turn_one_into_the_other(composing):
    one, other = composed(), composed("freeze.layers=3", "data.label_names=['a b',c]", "train.eval_steps=5")
    changed = composed(*overrides_between(one, other))
    assert settings_from(changed) == settings_from(other)


def test_the_quick_experiment_and_its_baseline_learn_at_one_rate_from_one_amount_of_text(composing):
    config = composed("experiment=quick", "freeze.layers=3")
    trial, baseline = settings_from(config), settings_from(baseline_config(config))
    assert (trial.optim.lr, trial.freeze.layers) == (1e-4, 3)
    assert (baseline.optim.lr, baseline.freeze.layers) == (1e-4, 0)
    assert (baseline.train, baseline.data) == (trial.train, trial.data)


@pytest.mark.parametrize(
    ("lines", "names"),
    [
        (["freeze=none,layers3,bias"], ["baseline: freeze=none", "freeze=layers3", "freeze=bias"]),
        (["freeze=layers3,embeddings", "freeze.dropout=true,false"],
         ["freeze=layers3", "freeze=layers3 dropout=false", "freeze=embeddings", "freeze=embeddings dropout=false",
          "baseline: freeze=none dropout=true"]),
        (["experiment=baseline,layer_freezing,head"], ["baseline", "layer_freezing", "head"]),
        (["freeze.layers=0,3", "optim.lr=5e-5"],
         ["lr=5e-05", "layers=3 lr=5e-05", "baseline: layers=0 lr=2e-05"]),
        (["freeze=layers3", "optim.lr=1e-5,2e-5"],
         ["freeze=layers3 lr=1e-05", "freeze=layers3", "baseline: freeze=none lr=2e-05"]),
        (["experiment=layer_freezing", "optim.lr=2e-5,1e-3"],
         ["layer_freezing", "layer_freezing lr=0.001", "baseline: lr=2e-05"]),
        (["experiment=quick", "freeze=none,layers3"], ["baseline: freeze=none", "freeze=layers3"]),
        (["adapter=lora", "adapter.rank=4,16"],
         ["adapter=lora rank=4", "adapter=lora rank=16", "baseline: adapter=none rank=null"]),
    ],
)  # fmt: skip
def test_a_sweep_its_report_and_a_trial_by_itself_name_it_the_same_and_as_it_was_typed(composing, lines, names):
    shared = ["model=tiny", "model.layers=4", "data=synthetic", "tracking=none", "sweep.name=unused", "output.dir=x"]
    config, loader = compose("config", shared, return_hydra_config=True), GlobalHydra.instance().config_loader()
    space = read_space(None, lines, loader, is_grid=True)
    composer = Composer(config, loader, space)
    inside, beside = _add_baselines(space.points(), composer)
    ours, theirs = composer.shared_choices()
    points, baseline = [*inside, *beside], {**composer.baseline_params(), **theirs}
    assert [space.name_of(point, baseline, ours) for point in points] == names
    trials = []
    for number, point in enumerate(points):
        made = loader.load_sweep_config(config, [*space.fixed, *point.overrides])
        choices = made.hydra.runtime.choices
        with open_dict(made):
            del made["hydra"]
        made.output.dir = "x"
        job = job_of(made, choices)
        assert job.name == f"{'baseline' if point.is_baseline else names[number]} seed=42"
        role = BASELINE_ROLE if point.is_baseline else ""
        trials.append(trial(0.9, 1, number, treatment_of(job.settings, "")))
        trials[-1] = replace(trials[-1], choices=json.loads(json.dumps(dict(job.choices))), role=role)
    rows = label_rows(rows := rows_from(trials), find_baseline(rows, {}))
    assert sorted(row.label for row in rows) == sorted(names)


def test_choices_are_recorded_with_what_differs_from_them_but_lists_of_choices_are_not(composing):
    plain = {
        "freeze": "none",
        "adapter": "none",
        "scheduler": "linear",
        "optim": "adamw",
    }
    given = ("model=tiny", "data=synthetic", "experiment=[quick,head]", "optim.lr=0.5")
    found = typed_choices(composed(*given), plain)
    assert found == {**plain, "freeze.policy": "head", "freeze.embeddings": True, "optim.lr": 0.5, "train.epochs": 1,
                     "data.max_train_examples": 1200}  # fmt: skip
    wanting = typed_choices(composed(*given), {**plain, "optim": "none_such_as_hydra_refuses"})
    assert wanting == {}


def test_choices_from_a_folder_of_ones_own_name_trials_too(composing, tmp_path, monkeypatch):
    (tmp_path / "freeze").mkdir()
    (tmp_path / "freeze" / "mine.yaml").write_text("defaults: [none, _self_]\nlayers: 2\n")
    typed = [f"hydra.searchpath=[file://{tmp_path}]", "model=tiny", "model.layers=4", "data=synthetic", "output.dir=x"]
    config = compose("config", [*typed, "freeze=mine", "freeze.dropout=false"], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", config)
    config.hydra.overrides.hydra = typed[:1]
    choices = config.hydra.runtime.choices
    with open_dict(config):
        trial_config = config.copy()
        del trial_config["hydra"]
    found = typed_choices(trial_config, choices)
    assert (found["freeze"], found["freeze.dropout"], "freeze.layers" in found) == ("mine", False, False)


@pytest.mark.parametrize(
    ("start", "typed", "line"),
    [
        (
            CheckFirst.on_run_start,
            "sweep.seeds=[1,2]",
            "sweep.seeds must be left to a sweep, got '[1,2]'; add",
        ),
        (CheckFirst.on_run_start, "hydra/sweeper=optuna", "hydra/sweeper must be left to a sweep, got 'optuna'"),
        (CheckFirst.on_run_start, "hydra.sweep.dir=here", "hydra.sweep.dir must be left to a sweep, got 'here'"),
        (
            CheckFirst.on_multirun_start,
            "+hydra.job.env_set.MLFLOW_TRACKING_URI=http://a",
            "hydra.job.env_set.MLFLOW_TRACKING_URI must be left to the shell in a sweep, got 'http://a'; run: export",
        ),
        (
            CheckFirst.on_multirun_start,
            "hydra.run.dir=here",
            "hydra.run.dir must be left to a single trial",
        ),
        (CheckFirst.on_multirun_start, "+hydra.launcher.max_trials=0", "hydra.launcher.max_trials must be 1 or more"),
    ],
)
def test_what_hydra_would_ignore_in_its_mode_is_refused(composing, capsys, start, typed, line):
    with pytest.raises(SystemExit) as ended:
        start(CheckFirst(), compose("config", ["tracking=none", typed], return_hydra_config=True))
    HydraConfig.instance().cfg = None
    assert ended.value.code == 2
    assert f"distilbench: {line}" in capsys.readouterr().err


def test_hydras_own_grid_refuses_settings_of_the_other_sweepers(composing, capsys):
    typed = ["tracking=none", "hydra/sweeper=basic", "sweep.dry_run=true", "seed=1"]
    with pytest.raises(SystemExit):
        CheckFirst().on_multirun_start(compose("config", typed, return_hydra_config=True))
    HydraConfig.instance().cfg = None
    line = "sweep.dry_run must be left to another sweeper, got 'true'; drop hydra/sweeper=basic"
    assert line in capsys.readouterr().err


def test_hydras_own_values_are_known_before_the_job(composing, tmp_path):
    (tmp_path / "p.csv").write_text("text,label\n")
    given = ["model=tiny", "tracking=none", "data=files", "data.validation_fraction=0.3",
             "data.train=${hydra:runtime.cwd}/p.csv"]  # fmt: skip
    config = compose("config", given, return_hydra_config=True)
    config.hydra.runtime.cwd = str(tmp_path)
    CheckFirst().on_run_start(config)
    assert settings_from(config).data.train == str(tmp_path / "p.csv")
    HydraConfig.instance().cfg = None

"""Settings: what composes, what each range is, and one clear line for everything else."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from distilbench.settings import (
    FREEZE_POLICIES,
    SCHEDULERS,
    AppSettings,
    BenchSettings,
    CompareSettings,
    ConfirmSettings,
    FreezeSettings,
    ModelSettings,
    OptimSettings,
    PredictDataSettings,
    PredictSettings,
    Rule,
    SchedulerSettings,
    SettingsError,
    TrackingSettings,
    TrainSettings,
    TrialSettings,
    _marks,
    register_schema,
    require,
    setting_names,
    settings_from,
)
from tests.conftest import ROOT

CONF = ROOT / "conf"
GROUPS = ("model", "data", "freeze", "adapter", "scheduler", "optim", "engine", "tracking", "experiment", "search")
NEEDED = {"local": ["model.checkpoint=."], "files": ["data.train=README.md"]}
CHOICES = [(g, p.stem) for g in GROUPS for p in sorted((CONF / g).glob("*.yaml"))]


def composed(*overrides: str) -> AppSettings:
    register_schema()
    with initialize_config_dir(str(CONF)):
        return settings_from(compose("config", ["output.dir=unused", "sweep.name=unused", *overrides]))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=lambda v: v)
def test_every_choice_of_every_group_composes(group, choice, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert isinstance(composed(f"{group}={choice}", *NEEDED.get(choice, [])), AppSettings)


def test_a_value_may_refer_to_one_that_a_user_has_added():
    assert composed("+mine.rate=0.25", "optim.lr=${mine.rate}").optim.lr == 0.25


def test_every_documented_group_has_choices():
    assert {group for group, _ in CHOICES} == set(GROUPS)


def test_plain_composition_is_the_reports_baseline_protocol():
    s = composed()
    assert (s.model.checkpoint, s.data.hub_name) == ("distilbert/distilbert-base-uncased", "stanfordnlp/sst2")
    assert (s.data.split_seed, s.data.selection_fraction, s.data.report_fraction) == (0, 0.0, 0.0)
    assert (s.train.epochs, s.train.batch_size, s.train.max_length) == (3, 16, 128)
    assert (s.optim.name, s.optim.lr, s.optim.weight_decay, s.optim.max_grad_norm) == ("adamw", 2e-5, 0.01, 1.0)
    assert (s.scheduler.name, s.scheduler.warmup(1000)) == ("linear", 0)
    assert (s.freeze.layers, s.freeze.freezes_embeddings, s.train.metric) == (0, False, "accuracy")
    assert composed("experiment=baseline") == s


def test_the_reports_other_rows_compose_as_it_states_them():
    frozen = composed("experiment=layer_freezing")
    assert (frozen.freeze.layers, frozen.freeze.freezes_embeddings, frozen.freeze.dropout) == (3, True, True)
    assert dataclasses.replace(frozen, freeze=composed().freeze) == composed()
    hyper = composed("experiment=hyperparameters")
    assert (hyper.scheduler.name, hyper.scheduler.warmup_ratio) == ("cosine", 0.1)
    assert (hyper.optim.lr, hyper.optim.weight_decay, hyper.freeze.layers) == (3e-5, 0.05, 0)


def test_experiments_add_up_and_the_command_line_wins():
    s = composed("experiment=[quick,layer_freezing]", "freeze.layers=2")
    assert (s.data.max_train_examples, s.train.epochs, s.baseline.ensure, s.freeze.layers) == (1200, 1, True, 2)


BARE = {
    "compare": CompareSettings(
        sweep="first", runs=[], experiments=[], protocol=None, baseline=None, margin=None, untested="refuse",
        layout="full", rows=20, output=None,
        tracking=TrackingSettings("none", None, "distilbench", 300),
    ),
    "confirm": ConfirmSettings(
        sweep="first", top=1, seeds=2, margin=None, name=None, output=None, dry_run=False,
        tracking=TrackingSettings("none", None, "distilbench", 300),
    ),
    "predict": PredictSettings(
        run=None, dir=None, sweep="first", best="answer", output="out.csv", format="table", batch_size=1, device="cpu",
        data=PredictDataSettings("in.csv", None, None, None, None, None),
        tracking=TrackingSettings("none", None, "distilbench", 300),
    ),
    "bench": BenchSettings(trials=2, steps=8, eval_examples=1, repeats=1, processes=0),
}  # fmt: skip
"""Settings that ``config.yaml`` does not compose."""
INF, NAN = math.inf, math.nan
RANGES = {
    "data.source": (["hub", "synthetic", "tweets"], ["web", ""], "one of hub, files, tweets, synthetic"),
    "model.checkpoint": (["a"], [""], "a name or a path"),
    "data.label_names": ([None, ["a", "b"]], [[], ["a"], ["a", "a"]], "2 or more distinct names"),
    "data.validation_fraction": ([1e-9, 0.999], [0, 1, -0.1, NAN], "in (0, 1)"),
    "data.selection_fraction": ([0, 0.999], [1, -0.1, NAN], "in [0, 1)"),
    "data.report_fraction": ([0, 0.999], [1, -0.1, NAN], "in [0, 1)"),
    "data.max_train_examples": ([1, None], [0, -1], "1 or more"),
    "data.max_validation_examples": ([1, None], [0, -1], "1 or more"),
    "freeze.layers": ([0, 99], [-1], "0 or more"),
    "freeze.embeddings": ([True, False, "auto"], ["maybe"], "auto, true or false"),
    "freeze.policy": (["depth", "head", "bias", "gradual", "auto"], ["middle"], "one of " + ", ".join(FREEZE_POLICIES)),
    "adapter.name": (["none", "ia3"], ["prefix"], "one of none, lora, ia3"),
    "adapter.rank": ([None], [0, -1], "1 or more"),
    "adapter.alpha": ([None], [0, -1, INF, NAN], "above 0"),
    "adapter.dropout": ([None], [1, -0.1, NAN], "in [0, 1)"),
    "scheduler.name": (SCHEDULERS, ["step"], "one of " + ", ".join(SCHEDULERS)),
    "scheduler.warmup_ratio": ([0, 1, 0.5], [-0.1, 1.001, NAN], "in [0, 1]"),
    "scheduler.warmup_steps": ([0, 1, None], [-1], "0 or more"),
    "optim.name": (["adamw", "sgd"], ["adam"], "one of adamw, sgd"),
    "optim.lr": ([1e-300, 1e300], [0, -1e-300, INF, NAN], "above 0"),
    "optim.weight_decay": ([0, 1e300], [-1e-300, INF, NAN], "0 or more"),
    "optim.max_grad_norm": ([0, 1e300], [-1e-300, INF, NAN], "0 or more"),
    "optim.eps": ([0, 1e300], [-1e-300, INF, NAN], "0 or more"),
    "optim.beta1": ([0, 0.999], [1, -0.001, NAN], "in [0, 1)"),
    "optim.beta2": ([0, 0.999], [1, -0.001, NAN], "in [0, 1)"),
    "optim.layer_decay": ([1e-9, 1], [0, -0.1, 1.001, NAN], "in (0, 1]"),
    "train.label_smoothing": ([0, 0.999], [1, -0.1, NAN], "in [0, 1)"),
    "train.class_weights": (["none", "balanced"], ["log"], "one of none, balanced"),
    "optim.momentum": ([0, 0.999], [1, -0.001, NAN], "in [0, 1)"),
    "train.epochs": ([1], [0], "1 or more"),
    "train.batch_size": ([1, 999], [0], "1 or more"),
    "train.micro_batch_size": ([1, 8, 16, None], [0, -1], "1 or more"),
    "train.eval_batch_size": ([1], [0], "1 or more"),
    "train.max_length": ([3], [2], "3 or more"),
    "train.precision": (["auto", "fp32", "bf16", "fp16"], ["fp8"], "one of auto, fp32, bf16, fp16"),
    "train.metric": (["accuracy", "f1", "mcc", "loss"], ["auc"], "one of accuracy, f1, mcc, loss"),
    "train.eval_steps": ([1, None], [0], "1 or more"),
    "train.patience": ([1, None], [0], "1 or more"),
    "train.logging_steps": ([1], [0], "1 or more"),
    "engine.name": (["auto", "trainer", "fused"], ["magic"], "one of auto, trainer, fused"),
    "engine.device": (["auto", "cuda", "cuda:3", "mps"], ["tpu", "cuda:"], "auto, cpu, cuda, cuda:NUMBER or mps"),
    "seed": ([0, 2**32 - 1], [-1, 2**32], "0 .. 2**32 - 1"),
    "margin": ([0.001, 100], [0, 100.001, -1, NAN], "in (0, 100]"),
    "tracking.name": (["mlflow", "none"], ["wandb"], "one of mlflow, none"),
    "tracking.experiment": ([" a\nb", "x" * 256, "ä" * 128], ["", " ", "x" * 257, "ä" * 129],
                            "a name of at most 256 bytes"),
    "sweep.name": (["a", "_", "a.b_c+d-e", "x" * 200], ["", ".a", "-a", "a/b", "a b", "a\n", "x" * 201],
                   "letters, digits and ._+- without a path, 200 bytes at most"),
    "sweep.warm_start": ([None, "first"], ["", "a/b"], "letters, digits and ._+- without a path, 200 bytes at most"),
    "sweep.trials": ([1], [0], "1 or more"),
    "sweep.objectives": ([None, ["accuracy", "train_flops"]], [["speed"], ["accuracy", "speed"]],
                         "a list of accuracy, f1, mcc, loss, train_seconds, train_flops, cost, trainable_parameters"),
    "sweep.pruner": (["none", "median", "wilcoxon"], ["best"], "one of none, median, percentile, patient, "
                     "successive_halving, hyperband, threshold, wilcoxon"),
    "sweep.seeds": ([None, [1], [1, 2]], [[], [1, 1]], "null or a list of different values"),
    "sweep.max_failures": ([0, 0.99, 1, 7, None], [-0.1, INF, NAN], "0.0 or more"),
    "sweep.timeout_minutes": ([0, 0.5, None], [-0.1, INF, NAN], "0 or more"),
    "tracking.patience_seconds": ([0, 300.5], [-0.1, INF, NAN], "0 or more"),
    "sweep.grace_seconds": ([2], [1, 0], "2 or more"),
    "sweep.max_grid": ([1], [0], "1 or more"),
    "sweep.on_change": (["refuse", "extend"], ["ignore"], "one of refuse, extend"),
    "compare.margin": ([None, 0.5], [0, 101], "in (0, 100]"),
    "compare.untested": (["refuse", "show"], ["hide"], "one of refuse, show"),
    "compare.layout": (["full", "paper"], ["wide"], "one of full, paper"),
    "compare.rows": ([1], [0], "1 or more"),
    "confirm.sweep": (["a..b"], ["..", "a/b", ""], "letters, digits and ._+- without a path, 200 bytes at most"),
    "confirm.name": ([None, "c.d"], [".", "a\\b", "a/b"], "letters, digits and ._+- without a path, 200 bytes at most"),
    "confirm.top": ([1], [0], "1 or more"),
    "confirm.seeds": ([2, "auto"], [1, "many"], "auto, or 2 or more"),
    "tracking.log_model": (["never", "best", "always"], ["last"], "one of never, best, always"),
    "tracking.register": ([None], ["a/b", "", " ", "a@", "a@latest", "a@V2", " @x", "a" * 257],
                          "NAME or NAME@ALIAS (MLflow keeps latest and v1 for itself)"),
    "predict.best": (["answer", "accuracy"], ["loss"], "one of answer, accuracy"),
    "predict.format": (["table", "glue"], ["csv"], "one of table, glue"),
    "predict.batch_size": ([1], [0], "1 or more"),
    "predict.device": (["auto", "cpu", "cuda:1"], ["tpu"], "auto, cpu, cuda, cuda:NUMBER or mps"),
    "confirm.margin": ([None, 100], [0, 101], "in (0, 100]"),
    "bench.trials": ([2], [1], "2 or more"),
    "bench.steps": ([8, 64], [0, -8, 4, 12], "a multiple of 8"),
    "bench.eval_examples": ([1], [0], "1 or more"),
    "bench.repeats": ([1], [0], "1 or more"),
    "bench.processes": ([0, 2, 3], [1, -1], "0, or 2 or more"),
}  # fmt: skip
"""Setting -> values at the ends of its range, values just outside, the range in words."""


@pytest.fixture(scope="module")
def usual():
    return composed("train.micro_batch_size=null")


def changed(usual, key: str, value: object):
    """The settings that hold ``key``, with another value."""
    group, _, name = key.rpartition(".")
    return dataclasses.replace(BARE.get(group) or (getattr(usual, group) if group else usual), **{name: value})


@pytest.mark.parametrize("key", RANGES)
def test_a_range_has_its_ends_and_nothing_beyond(usual, key):
    inside, outside, allowed = RANGES[key]
    shown = key if key.partition(".")[0] not in ("compare", "confirm", "predict") else key.partition(".")[2]
    for value in inside:
        assert getattr(changed(usual, key, value), key.rpartition(".")[2]) == value
    for value in outside:
        with pytest.raises(SettingsError) as caught:
            changed(usual, key, value)
        assert str(caught.value).startswith(f"{shown} must be {allowed}, got ")


def test_every_declared_range_is_tried_at_its_ends():
    groups = {"compare": CompareSettings, "confirm": ConfirmSettings, "predict": PredictSettings,
              "bench": BenchSettings, "": AppSettings}  # fmt: skip
    app = composed()
    groups |= {f.name: type(getattr(app, f.name)) for f in dataclasses.fields(AppSettings)}
    declared = {
        f"{group}.{name}".lstrip(".")
        for group, cls in groups.items()
        if dataclasses.is_dataclass(cls)
        for name, marks in _marks(cls).items()
        if any(isinstance(mark, Rule) for mark in marks)
    }
    assert declared - RANGES.keys() == {"model.source"}, "which cannot change by itself"


@pytest.mark.parametrize(
    ("key", "changes", "line"),
    [
        ("train", {"batch_size": 16, "micro_batch_size": 5}, "train.micro_batch_size must be a divisor of "
         "train.batch_size=16, got 5"),
        ("train", {"batch_size": 16, "micro_batch_size": 32}, "train.micro_batch_size must be a divisor of "
         "train.batch_size=16, got 32"),
        ("model", {"source": "web"}, "model.source must be one of hub, package, local, random, got 'web'"),
        ("model", {"checkpoint": ""}, "model.checkpoint must be a name or a path, got ''"),
        ("model", {"source": "local", "checkpoint": "/no/such"}, "model.checkpoint must be an existing directory, got "
         "'/no/such'; give the folder that holds config.json and model.safetensors"),
        ("model", {"source": "random"}, "model.layers must be 1 or more for a random model, got null"),
        ("model", {"layers": 3}, "model.layers must be null with model.source=hub, got 3; a model that is loaded has"),
        ("model", {"source": "random", "layers": 0}, "model.layers must be 1 or more for a random model, got 0"),
        ("data", {"hub_name": None}, "data.hub_name must be the id of a data set on the hub, got null"),
        ("data", {"source": "files", "train": None}, "data.train must be given with data=files, got null; add data"),
        ("data", {"source": "files", "train": "/no.csv"}, "data.train must be an existing CSV, TSV, JSON, JSONL or "
         "Parquet file, got '/no.csv'; check the path"),
        ("data", {"source": "files", "train": __file__, "validation": "/no.csv"}, "data.validation must be an existing "
         "CSV, TSV, JSON, JSONL or Parquet file, got '/no.csv'; check the path"),
        ("data", {"source": "files", "train": __file__, "validation": None, "text_column": None}, "data.text_column "
         "must be given with data=files, got null; add data.text_column=..."),
        ("data", {"source": "files", "train": __file__, "validation": None, "label_column": ""}, "data.label_column "
         "must be given with data=files, got ''; add data.label_column=..."),
        ("data", {"selection_fraction": 0.1, "report_fraction": 0.2}, "data.selection_fraction must be 0 with "
         "data.report_fraction, where validation picks, got 0.1"),
        ("data", {"label_names": ["a", "b", "a"]}, "data.label_names must be 2 or more distinct names, got "
         "['a', 'b', 'a']"),
        ("data", {"label_names": ["a"]}, "data.label_names must be 2 or more distinct names, got ['a']"),
        ("freeze", {"policy": "head", "layers": 3}, "freeze.layers must be 0 with freeze.policy=head, which says what "
         "is frozen, got 3"),
        ("freeze", {"policy": "bias", "embeddings": False}, "freeze.embeddings must be auto with freeze.policy=bias, "
         "which says what is frozen, got false"),
        ("freeze", {"policy": "bias", "dropout": False}, "freeze.dropout must be true with freeze.policy=bias, got "
         "false"),
        ("freeze", {"policy": "gradual", "layers": 1}, "freeze.layers must be 0 with freeze.policy=gradual, which says "
         "what is frozen, got 1"),
        ("freeze", {"policy": "scheduled"}, "freeze.layers must be 1 or more with freeze.policy=scheduled, got 0"),
        ("adapter", {"rank": 4}, "adapter.rank must be null with adapter.name=none, got 4"),
        ("adapter", {"alpha": 4}, "adapter.alpha must be null with adapter.name=none, got 4"),
        ("adapter", {"name": "ia3", "dropout": 0.0}, "adapter.dropout must be null with adapter.name=ia3, "
         "got 0.0"),
        ("adapter", {"name": "lora", "rank": 1, "alpha": 1.0}, "adapter.dropout must be a number with "
         "adapter.name=lora, got null"),
        ("scheduler", {"warmup_steps": 3, "warmup_ratio": 0.1}, "scheduler.warmup_ratio must be 0 when "
         "scheduler.warmup_steps=3 is given, got 0.1; set one of the two"),
        ("scheduler", {"name": "constant", "warmup_ratio": 0.1}, "scheduler.name must be a schedule that warms up when "
         "a warm-up is given, got 'constant'; use scheduler=constant_with_warmup"),
        ("scheduler", {"name": "constant", "warmup_steps": 1}, "scheduler.name must be a schedule that warms up when "
         "a warm-up is given, got 'constant'; use scheduler=constant_with_warmup"),
        ("tracking", {"uri": "http://me:secret@host"}, "tracking.uri must not hold a password, since Hydra writes "
         "settings to disk; put the URI into MLFLOW_TRACKING_URI, or user and password into "
         "MLFLOW_TRACKING_USERNAME and _PASSWORD"),
        ("sweep", {"pruner_options": {"n_startup_trials": "auto"}}, "sweep.pruner_options.n_startup_trials must be a "
         "number or null, got 'auto'"),
        ("sweep", {"pruner_options": {"n": True}}, "sweep.pruner_options.n must be a number or null, got true"),
        ("sweep", {"pruner_options": {"min_resource": "many"}}, "sweep.pruner_options.min_resource must be a number, "
         "auto or null, got 'many'"),
        ("sweep", {"objectives": []}, "sweep.objectives must be null or a list of different values, got []"),
        ("sweep", {"objectives": ["loss", "loss"]}, "sweep.objectives must be null or a list of different values, got "
         "['loss', 'loss']"),
        ("sweep", {"seeds": []}, "sweep.seeds must be null or a list of different values, got []"),
        ("sweep", {"seeds": [1, 2, 1]}, "sweep.seeds must be null or a list of different values, got [1, 2, 1]"),
        ("sweep", {"max_failures": 1.5}, "sweep.max_failures must be a whole number or a share below 1, got 1.5"),
        ("compare", {"sweep": None}, "what to compare must be sweep=NAME, runs=[ID,...] or experiment=NAME,..., got "
         "'nothing'; add one of them"),
        ("confirm", {"sweep": None}, "sweep must be the name of a sweep, got null; add sweep=NAME"),
        ("predict", {"run": "a"}, "what predicts must be one of run=ID, dir=PATH and sweep=NAME, got 'run and sweep'; "
         "name one model"),
        ("predict", {"sweep": None}, "what predicts must be one of run=ID, dir=PATH and sweep=NAME, got 'none'; name "
         "one model"),
        ("predict", {"sweep": None, "dir": "/no/such"}, "dir must be an existing directory, got '/no/such'; give the "
         "folder that holds config.json and model.safetensors"),
        ("predict", {"sweep": None, "run": "a", "best": "accuracy"}, "best must be answer without sweep=NAME, got "
         "'accuracy'"),
        ("data", {"pair_column": "label"}, "data.text_column, data.pair_column and data.label_column must be columns "
         "of their own, got 'sentence, label, label'"),
        ("data", {"train": "my.csv"}, "data.train must be no file with data.source=hub, got 'my.csv'; add data=files"),
        ("data", {"source": "tweets", "slice_column": "day"}, "data.slice_column must be null with data.source=tweets, "
         "got 'day'"),
        ("tracking", {"register": "a"}, "tracking.register must be null with tracking.log_model=never, got 'a'; add "
         "tracking.log_model=best"),
        ("tracking", {"name": "none", "log_model": "best"}, "tracking.log_model must be never with tracking=none, got "
         "'best'"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_told_with_what_to_do(usual, key, changes, line):
    with pytest.raises(SettingsError) as caught:
        dataclasses.replace(BARE.get(key) or getattr(usual, key), **changes)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    ("key", "changes"),
    [
        ("model", {"source": "random", "layers": 1}),
        ("data", {"source": "tweets", "hub_name": None}),
        ("data", {"source": "files", "train": __file__, "validation": None, "pair_column": "b", "slice_column": "c"}),
        ("data", {"label_names": ["a", "b"]}),
        ("scheduler", {"name": "constant_with_warmup", "warmup_steps": 3, "warmup_ratio": 0}),
        ("scheduler", {"name": "constant", "warmup_steps": 0, "warmup_ratio": 0}),
        ("freeze", {"policy": "head", "dropout": False}),
        ("freeze", {"policy": "scheduled", "layers": 1}),
        ("adapter", {"name": "lora", "rank": 1, "alpha": 0.5, "dropout": 0.0}),
        ("tracking", {"uri": "http://me@host/a:b"}),
        ("sweep", {"pruner_options": {"min_resource": "auto", "max_resource": 3, "lower": 0.5, "upper": None}}),
        ("sweep", {"seeds": [1, 2]}),
        ("compare", {"sweep": None, "runs": ["a"]}),
        ("compare", {"sweep": None, "experiments": ["a"]}),
        ("confirm", {"sweep": "a..b", "name": "c.d"}),
        ("predict", {"sweep": None, "run": "a"}),
        ("predict", {"best": "accuracy"}),
        ("data", {"pair_column": "other", "slice_column": "day"}),
        ("tracking", {"register": "a", "log_model": "best"}),
    ],
)
def test_settings_that_only_look_contradictory_are_taken(usual, key, changes):
    made = dataclasses.replace(BARE.get(key) or getattr(usual, key), **changes)
    assert {name: getattr(made, name) for name in changes} == changes


def test_a_policy_that_moves_needs_evaluations_to_move_at():
    for policy, epochs, fewest in (("gradual", 1, 2), ("auto", 2, 3)):
        with pytest.raises(SettingsError) as caught:
            composed(f"freeze={policy}", f"train.epochs={epochs}")
        assert str(caught.value) == (
            f"train.epochs must be {fewest} or more with freeze.policy={policy}, which moves at evaluations, got "
            f"{epochs}; or set train.eval_steps"
        )
    assert composed("freeze=gradual", "train.epochs=2").freeze.is_dynamic
    assert composed("freeze=auto", "train.epochs=1", "train.eval_steps=9").freeze.is_dynamic
    assert composed("freeze=gradual", "train.epochs=2").freeze.is_dynamic


def test_a_model_that_is_not_saved_is_not_logged():
    with pytest.raises(SettingsError) as caught:
        composed("output.save_model=false", "tracking.log_model=best")
    assert str(caught.value) == "tracking.log_model must be never with output.save_model=false, got 'best'"
    assert not composed("output.save_model=false").output.save_model


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "freeze.layers=6",
            "freeze.layers must be 0 with adapter.name=lora, which leaves the encoder as it was, got 6",
        ),
        (
            "freeze=head",
            "freeze.policy must be depth with adapter.name=lora, which leaves the encoder as it was, got 'head'",
        ),
        (
            "freeze=embeddings",
            "freeze.embeddings must be auto with adapter.name=lora, which leaves the encoder as it was, got true",
        ),
        (
            "freeze.dropout=false",
            "freeze.dropout must be true with adapter.name=lora, which leaves the encoder as it was, got false",
        ),
    ],
)
def test_an_adapter_and_a_frozen_part_are_two_ways_of_which_one_is_taken(override, line):
    with pytest.raises(SettingsError) as caught:
        composed("adapter=lora", override)
    assert str(caught.value).startswith(line)


def test_micro_batches_that_memory_asks_for_are_divisors_of_the_batch(usual):
    train = dataclasses.replace(usual.train, batch_size=12)
    assert (train.examples_per_pass, dataclasses.replace(train, micro_batch_size=4).examples_per_pass) == (12, 4)
    assert [train.smaller_micro_batch(size) for size in (12, 10, 6, 5, 4, 3, 2, 1)] == [6, 4, 3, 2, 2, 1, 1, None]


@pytest.mark.parametrize(
    ("steps", "ratio", "given", "warmup"), [(100, 0.101, None, 11), (100, 0.0, 7, 7), (9, 0.0, 0, 0)]
)
def test_a_warm_up_is_whole_steps(steps, ratio, given, warmup):
    assert SchedulerSettings("linear", warmup_ratio=ratio, warmup_steps=given).warmup(steps) == warmup


def test_a_message_is_made_only_where_a_rule_is_broken():
    require(True, "a", "b", "c")
    for value, remedy, line in [("v", "", "a must be b, got 'v'"), (None, "do c", "a must be b, got null; do c"),
                                ("x" * 198, "", f"a must be b, got '{'x' * 198}'"),
                                ("x" * 199, "", f"a must be b, got '{'x' * 196}...")]:  # fmt: skip
        with pytest.raises(SettingsError) as caught:
            require(False, "a", "b", value, remedy)
        assert str(caught.value) == line


@pytest.mark.parametrize(("given", "shown"), [("model.fallback=fail", "'fail'"), ("data.fallback=[a]", "['a']")])
def test_a_fallback_that_is_no_group_is_refused_in_one_line(given, shown):
    with pytest.raises(SettingsError) as caught:
        composed("model=tiny", "data=synthetic", given)
    name = given.partition("=")[0]
    assert str(caught.value) == f"{name} must be null or settings of its own, got {shown}; conf/ shows one"


def test_settings_are_named_flat_and_a_fallback_counts_as_one():
    assert setting_names(ModelSettings) == ["source", "checkpoint", "revision", "layers", "fallback"]
    names = setting_names(AppSettings)
    assert names[:2] == ["model.source", "model.checkpoint"]
    assert {"seed", "margin", "model.fallback", "tracking.uri", "sweep.pruner_options"} <= set(names)
    assert len(set(names)) == len(names)


def test_what_is_not_given_is_named_with_the_words_that_give_it():
    register_schema()
    with initialize_config_dir(str(CONF)):
        config = compose("config", ["output.dir=unused", "sweep.name=unused", "model=local"])
    with pytest.raises(SettingsError) as caught:
        settings_from(config)
    assert str(caught.value) == "model.checkpoint must be given, got nothing; add model.checkpoint=..."
    with initialize_config_dir(str(CONF)):
        compare = compose("compare", ["sweep=first", "output=here", "tracking=none"])
        confirm = compose("confirm", ["sweep=first", "output=here", "tracking=none"])
        predict = compose("predict", ["dir=.", "data.test=a.csv", "output=here", "tracking=none"])
    here = str(Path.cwd() / "here")
    assert settings_from(compare, CompareSettings).output == settings_from(confirm, ConfirmSettings).output == here
    predicts = settings_from(predict, PredictSettings)
    assert (predicts.output, predicts.dir) == (here, str(Path.cwd()))


def test_trial_settings_are_the_applications_without_sweep_and_tracking(usual):
    trial = usual.trial
    assert type(trial) is TrialSettings
    assert all(getattr(trial, f.name) is getattr(usual, f.name) for f in dataclasses.fields(TrialSettings))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("freeze.embeddings=maybe", "freeze.embeddings must be auto, true or false, got 'maybe'"),
        ("optim.lr=0", "optim.lr must be above 0, got 0.0"),
        ("optim.lr=nan", "optim.lr must be above 0, got nan"),
        ("tracking.experiment=''", "tracking.experiment must be a name of at most 256 bytes, got ''"),
        (f"tracking.experiment={'x' * 600}", "tracking.experiment must be a name of at most 256 bytes, got 'xxx"),
        (f"sweep.name={'x' * 201}", "sweep.name must be letters, digits and ._+- without a path, 200 bytes at most"),
        ("sweep.objectives=[accuracy,speed]", "sweep.objectives must be a list of accuracy, f1, mcc, loss,"),
        ("train.micro_batch_size=5", "train.micro_batch_size must be a divisor of train.batch_size=16, got 5"),
        ("data.label_names=[a]", "data.label_names must be 2 or more distinct names, got ['a']"),
        ("data.label_names=[a,null]", "data.label_names must be 2 or more distinct names, got ['a', None]"),
        ("data.label_names=[1,'1']", "data.label_names must be 2 or more distinct names, got ['1', '1']"),
    ],
)
def test_a_value_out_of_range_on_the_command_line_is_one_line(override, line):
    with pytest.raises(SettingsError) as caught:
        composed(override)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["scheduler.warmup_steps=5", "scheduler.warmup_ratio=0.1"], "set one of the two"),
        (["scheduler=constant", "scheduler.warmup_ratio=0.1"], "use scheduler=constant_with_warmup"),
        (["data=files"], "add data.train="),
        (["data=files", "data.train=no/such.csv"], "check the path"),
        (["model=local"], "add model.checkpoint=..."),
        (["model=local", "model.checkpoint=no/such/folder"], "give the folder"),
        (["tracking.uri=http://user:secret@host"], "MLFLOW_TRACKING_URI"),
    ],
)
def test_contradictions_and_missing_paths_say_what_to_do(overrides, remedy):
    with pytest.raises(SettingsError, match=remedy.replace(".", r"\.")) as caught:
        composed(*overrides)
    assert "secret" not in str(caught.value)


@given(layers=st.integers(0, 100), embeddings=st.sampled_from(["auto", True, False]))
def test_auto_freezes_the_embeddings_with_the_first_layer(layers, embeddings):
    frozen = FreezeSettings(layers, embeddings, True, "depth").freezes_embeddings
    assert frozen == (layers > 0 if embeddings == "auto" else embeddings)


def test_the_policies_head_and_bias_freeze_the_embeddings_too():
    frozen = {policy for policy in FREEZE_POLICIES
              if FreezeSettings(policy == "scheduled", "auto", True, policy).freezes_embeddings}  # fmt: skip
    assert frozen == {"head", "bias", "scheduled"}


def test_dropout_is_off_only_in_what_is_frozen_and_only_if_asked_for():
    assert FreezeSettings(3, "auto", False, "depth").deterministic_layers(6) == 3
    assert FreezeSettings(0, "auto", False, "head").deterministic_layers(6) == 6
    assert FreezeSettings(3, "auto", True, "depth").deterministic_layers(6) == 0


@given(
    name=st.sampled_from(sorted(set(SCHEDULERS) - {"constant"})),
    ratio=st.floats(0, 1),
    steps=st.integers(1, 20_000),
)
def test_warmup_by_ratio_never_exceeds_the_trial(name, ratio, steps):
    assert 0 <= SchedulerSettings(name=name, warmup_ratio=ratio, warmup_steps=None).warmup(steps) <= steps


@pytest.mark.parametrize(
    ("typed", "names"),
    [("[false,true]", ["false", "true"]), ("[0,1]", ["0", "1"]), ("[1.0,2.5]", ["1.0", "2.5"]), ("null", None),
     ("['null',no]", ["null", "no"])],
)  # fmt: skip
def test_label_names_are_words_whatever_else_they_look_like(typed, names):
    assert composed(f"data.label_names={typed}").data.label_names == names


def test_paths_mean_the_directory_in_which_the_command_was_typed(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.csv").write_text("text,label\n")
    monkeypatch.chdir(tmp_path)
    s = composed("data=files", "data.train=texts/a.csv", "model=local", "model.checkpoint=./texts", "output.dir=out")
    assert (s.data.train, s.data.validation) == (str(tmp_path / "texts" / "a.csv"), None)
    assert (s.model.checkpoint, s.output.dir) == (str(tmp_path / "texts"), str(tmp_path / "out"))
    for typed, meant in (("sqlite:///my.db", f"sqlite:///{tmp_path}/my.db"), ("sqlite:////my.db", "sqlite:////my.db"),
                         ("sqlite:///:memory:",) * 2, ("http://127.0.0.1:5000",) * 2):  # fmt: skip
        assert composed(f"tracking.uri={typed}").tracking.uri == meant


def test_names_that_are_no_paths_stay_as_they_are():
    s = composed()
    assert (s.data.train, s.data.validation, s.model.checkpoint) == (
        "train", "validation", "distilbert/distilbert-base-uncased",
    )  # fmt: skip


def test_settings_can_not_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        composed().train.epochs = 5  # type: ignore[misc]


def test_every_field_says_what_it_means():
    source = (ROOT / "distilbench" / "settings.py").read_text()
    for cls in (TrainSettings, OptimSettings, SchedulerSettings, FreezeSettings):
        body = source[source.index(f"class {cls.__name__}") :]
        for f in dataclasses.fields(cls):
            line = next(rest for rest in body.split(f"    {f.name}: ")[1:])
            assert line.split("\n")[1].strip().startswith('"""'), f"{cls.__name__}.{f.name} has no docstring"


def test_a_long_value_is_cut_in_its_message(settings):
    with pytest.raises(SettingsError) as caught:
        settings(f"tracking.experiment={'x' * 600}")
    assert len(str(caught.value)) < 300
    assert "xxx..." in str(caught.value)

"""Settings: what composes, what each range is, and one clear line for everything else."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from distilbench.settings import (
    SCHEDULERS,
    AppSettings,
    FreezeSettings,
    OptimSettings,
    SchedulerSettings,
    SettingsError,
    TrainSettings,
    register_schema,
    settings_from,
)
from tests.conftest import ROOT

CONF = ROOT / "conf"
GROUPS = ("model", "data", "freeze", "scheduler", "optim", "engine", "tracking", "experiment", "search")
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


def test_every_documented_group_has_choices():
    assert {group for group, _ in CHOICES} == set(GROUPS)


def test_plain_composition_is_the_reports_baseline_protocol():
    s = composed()
    assert (s.model.checkpoint, s.data.hub_name) == ("distilbert/distilbert-base-uncased", "stanfordnlp/sst2")
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
    assert (s.data.max_train_examples, s.train.epochs, s.baseline.ensure, s.freeze.layers) == (2000, 2, True, 2)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("freeze.layers=-1", "freeze.layers must be 0 or more, got -1"),
        ("freeze.embeddings=maybe", "freeze.embeddings must be auto, true or false, got 'maybe'"),
        ("train.epochs=0", "train.epochs must be 1 or more, got 0"),
        ("train.precision=fp8", "train.precision must be one of auto, fp32, bf16, fp16, got 'fp8'"),
        ("train.max_length=2", "train.max_length must be 3 or more, got 2"),
        ("optim.lr=0", "optim.lr must be above 0, got 0.0"),
        ("optim.lr=nan", "optim.lr must be above 0, got nan"),
        ("optim.weight_decay=inf", "optim.weight_decay must be 0 or more, got inf"),
        ("optim.beta2=1", "optim.beta2 must be in [0, 1), got 1.0"),
        ("scheduler.name=step", "scheduler.name must be one of linear, cosine,"),
        ("scheduler.warmup_ratio=1.5", "scheduler.warmup_ratio must be in [0, 1], got 1.5"),
        ("seed=-1", "seed must be 0 .. 2**32 - 1, got -1"),
        ("data.max_train_examples=0", "data.max_train_examples must be 1 or more, got 0"),
        ("data.selection_fraction=1", "data.selection_fraction must be in [0, 1), got 1.0"),
        ("engine.name=magic", "engine.name must be one of"),
        ("engine.device=tpu", "engine.device must be one of auto, cpu, cuda, mps, got 'tpu'"),
        ("tracking.experiment=''", "tracking.experiment must be a name of at most 256 bytes, got ''"),
        (f"tracking.experiment={'x' * 600}", "tracking.experiment must be a name of at most 256 bytes, got 'xxx"),
        (f"sweep.name={'x' * 201}", "sweep.name must be letters, digits and ._+- without a path, 200 bytes at most"),
        ("sweep.objectives=[accuracy,speed]", "sweep.objectives must be one of accuracy, f1, mcc, loss,"),
        ("train.micro_batch_size=5", "train.micro_batch_size must be a divisor of train.batch_size=16, got 5"),
        ("data.label_names=[a]", "data.label_names must be 2 or more distinct names, got ['a']"),
        ("data.label_names=[a,null]", "data.label_names must be 2 or more distinct names, got ['a', None]"),
        ("data.label_names=[1,'1']", "data.label_names must be 2 or more distinct names, got ['1', '1']"),
    ],
)
def test_a_value_out_of_range_is_one_line_with_setting_value_and_range(override, line):
    with pytest.raises(SettingsError) as caught:
        composed(override)
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["scheduler.warmup_steps=5", "scheduler.warmup_ratio=0.1"], "set one of the two"),
        (["scheduler=constant", "scheduler.warmup_ratio=0.1"], "use scheduler=constant_with_warmup"),
        (["data=files"], "give data.train="),
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
    frozen = FreezeSettings(layers=layers, embeddings=embeddings, dropout=True).freezes_embeddings
    assert frozen == (layers > 0 if embeddings == "auto" else embeddings)


@given(
    name=st.sampled_from(sorted(set(SCHEDULERS) - {"constant"})),
    ratio=st.floats(0, 1),
    steps=st.integers(1, 20_000),
)
def test_warmup_by_ratio_never_exceeds_the_trial(name, ratio, steps):
    assert 0 <= SchedulerSettings(name=name, warmup_ratio=ratio, warmup_steps=None).warmup(steps) <= steps


@given(st.sampled_from(["lr", "weight_decay", "max_grad_norm", "eps", "beta1", "momentum"]), st.floats())
def test_optimizer_settings_are_valid_or_refused_by_name(field, value):
    good = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0, "max_grad_norm": 0.0, "beta1": 0.9, "beta2": 0.9,
            "eps": 0.0, "momentum": 0.0}  # fmt: skip
    at_least = {"lr": value > 0, "beta1": 0 <= value < 1, "momentum": 0 <= value < 1}
    if math.isfinite(value) and at_least.get(field, value >= 0):
        assert getattr(OptimSettings(**good | {field: value}), field) == value
    else:
        with pytest.raises(SettingsError, match=rf"^optim\.{field} must be "):
            OptimSettings(**good | {field: value})


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

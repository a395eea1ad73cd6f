"""Identity: each setting stands in one table, keys differ where they must, and stored ids stay what they were."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest

from distilbench.identity import (
    TABLES,
    ProtocolIdentity,
    SourceUsed,
    checkpoint_identity,
    fusion_key,
    has_choices_of,
    point_key,
    preparation_key,
    select,
    short_hash,
    treatment_of,
    trial_identity,
    value_of,
)
from distilbench.settings import TrialSettings, setting_names

WEIGHTS = SourceUsed("hub", "m", "a" * 64, "r")
TEXT = SourceUsed("hub", "d", "b" * 64)
PROTOCOL = ProtocolIdentity(WEIGHTS, TEXT, "accuracy", "validation", "validation")


def test_every_setting_of_a_trial_stands_in_exactly_one_table():
    placed = Counter(name for table in TABLES for name in table)
    assert sorted(placed.elements()) == sorted(setting_names(TrialSettings))


def test_every_placed_name_can_be_selected(settings):
    names = [name for table in TABLES for name in table]
    assert select(settings("freeze.layers=1").trial, names)["freeze.layers"] == 1


@pytest.mark.parametrize(
    ("overrides", "stored"),
    [
        ([], "ebb949b75c5b"),
        (["experiment=layer_freezing"], "744642015e57"),
        (["experiment=hyperparameters", "train.eval_steps=7", "optim=sgd"], "5118f73ad491"),
    ],
)
def test_treatments_stored_by_earlier_versions_stay_the_same(settings, overrides, stored):
    trial = settings("data=sst2", *overrides).trial
    assert short_hash(treatment_of(trial, "fp32")) == stored
    assert trial_identity(PROTOCOL, trial, "fp32") == type(trial_identity(PROTOCOL, trial, "fp32"))(
        "c5a5af75cc28", stored, 42
    )


def test_the_amount_of_text_is_treatment_and_all_of_it_stands_nowhere(settings):
    few, all_of_it = (settings(f"data.max_train_examples={n}").trial for n in (9, "null"))
    assert treatment_of(few, "fp32") == treatment_of(all_of_it, "fp32") | {"data.max_train_examples": 9}
    assert "data.max_train_examples" not in treatment_of(all_of_it, "fp32")


def test_an_amount_of_text_is_told_with_the_seed_that_draws_it_and_all_of_it_without(settings):
    drawn, other = (settings("data.max_train_examples=9", f"data.split_seed={n}").trial for n in (0, 1))
    assert treatment_of(other, "fp32") == treatment_of(drawn, "fp32") | {"data.split_seed": 1}
    whole, again = (settings("data.max_train_examples=null", f"data.split_seed={n}").trial for n in (0, 1))
    assert treatment_of(whole, "fp32") == treatment_of(again, "fp32")


def test_a_treatment_without_a_policy_freezes_to_a_depth(settings):
    plain, head = (treatment_of(settings(f"freeze={choice}").trial, "fp32") for choice in ("none", "head"))
    assert [value_of(t, "freeze.policy") for t in (plain, head)] == ["depth", "head"]
    assert has_choices_of(plain, plain)
    assert not has_choices_of(head | {"freeze.embeddings": False}, plain)
    assert has_choices_of(plain | {"train.epochs": 9}, plain)


def test_protocols_stored_by_earlier_versions_stay_the_same():
    assert PROTOCOL.id == "c5a5af75cc28"
    held_out = dataclasses.replace(PROTOCOL, metric="loss", selection_split="train (held out)")
    assert held_out.id == "3cac9d5a2539"


def test_the_same_contents_from_elsewhere_are_the_same_protocol():
    moved = dataclasses.replace(WEIGHTS, kind="local", name="copy", revision=None, fallback_for="m")
    assert dataclasses.replace(PROTOCOL, model=moved).id == PROTOCOL.id


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-3", "optim.weight_decay=0.5", "optim.max_grad_norm=0", "optim.layer_decay=0.9", "scheduler=cosine",
     "scheduler.warmup_ratio=0.1", "seed=7", "train.metric=loss", "train.checkpoints=false", "output.dir=elsewhere"],
)  # fmt: skip
def test_trials_that_differ_in_their_own_settings_train_at_once(settings, override):
    assert fusion_key(settings(override).trial) == fusion_key(settings().trial)


@pytest.mark.parametrize(
    "override",
    ["freeze.layers=1", "freeze=bias", "train.label_smoothing=0.1", "train.class_weights=balanced",
     "freeze.dropout=false", "train.epochs=1", "train.batch_size=8",
     "train.precision=bf16",
     "train.eval_steps=3", "optim=sgd", "model.layers=3", "data.max_train_examples=9", "engine.device=cpu"],
)  # fmt: skip
def test_trials_that_differ_in_what_a_batch_shares_do_not(settings, override):
    assert fusion_key(settings(override).trial) != fusion_key(settings().trial)


def test_settings_with_lists_have_keys_too(settings):
    given = "data.label_names=[a,b]"
    assert fusion_key(settings(given).trial) == fusion_key(settings(given).trial)


@pytest.mark.parametrize(
    ("override", "shares"),
    [
        ("freeze.layers=1", True), ("optim.lr=1e-3", True), ("seed=7", True), ("train.epochs=1", True),
        ("train.max_length=9", False), ("train.precision=bf16", False), ("train.metric=loss", False),
        ("freeze=head", True), ("adapter=lora", False), ("freeze=gradual", True), ("freeze=auto", False),
        ("engine=trainer", False), ("data.max_train_examples=9", False), ("model.layers=3", False),
    ],
)  # fmt: skip
def test_what_is_prepared_is_shared_by_trials_that_differ_in_steps_alone(settings, override, shares):
    assert (preparation_key(settings(override).trial) == preparation_key(settings().trial)) is shares


@pytest.mark.parametrize(
    ("override", "is_another"),
    [
        ("seed=7", True), ("train.metric=loss", True), ("engine=trainer", True), ("optim.beta1=0.5", True),
        ("train.precision=bf16", True),
        ("freeze.embeddings=false", False), ("train.logging_steps=1", False), ("output.dir=elsewhere", False),
        ("train.eval_batch_size=1", False),
    ],
)  # fmt: skip
def test_points_of_a_space_are_told_apart_by_what_they_would_train(settings, override, is_another):
    assert (point_key(settings(override).trial) != point_key(settings().trial)) is is_another


@pytest.mark.parametrize(
    ("override", "continues"),
    [
        ("train.micro_batch_size=4", True), ("train.resume=true", True), ("output.dir=elsewhere", True),
        ("engine.device=cpu", True), ("optim.lr=1e-3", False), ("train.epochs=9", False), ("seed=7", False),
    ],
)  # fmt: skip
def test_a_checkpoint_is_continued_by_settings_that_come_to_the_same_result(settings, override, continues):
    now, then = (checkpoint_identity(s.trial, "w", "t", "fp32") for s in (settings(override), settings()))
    assert (now == then) is continues


def test_a_checkpoint_is_told_by_what_was_really_used(settings):
    trial = settings("train.precision=auto", "data.max_train_examples=9").trial
    identity = checkpoint_identity(trial, "weights", "text", "bf16")
    assert (identity["model"], identity["data"], identity["train.precision"]) == ("weights", "text", "bf16")
    assert identity["train.max_length"] == trial.train.max_length
    assert not {"data.max_train_examples", "engine.device", "output.dir"} & set(identity)


def test_a_hash_is_of_contents_in_whatever_order_and_kind():
    assert short_hash({"a": 1, "b": [2]}) == short_hash({"b": (2,), "a": 1}) == "ae8a9a505246"
    assert short_hash(WEIGHTS) == short_hash(dataclasses.asdict(WEIGHTS)) != short_hash(TEXT)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (TEXT, "d"),
        (dataclasses.replace(TEXT, revision="0123456789abcdef"), "d (0123456789ab)"),
        (dataclasses.replace(TEXT, fallback_for="sst2"), "d, FALLBACK for sst2"),
        (dataclasses.replace(TEXT, revision="1.0", fallback_for="sst2"), "d (1.0), FALLBACK for sst2"),
    ],
)
def test_a_source_says_its_version_and_what_it_stands_in_for(source, said):
    assert source.describe() == said

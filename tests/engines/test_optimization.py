"""Parameter groups, optimizers and learning-rate factors are those of transformers' Trainer."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from transformers import Trainer, TrainingArguments, get_scheduler

from distilbench.engines.optimization import (
    build_loss,
    build_optimizer,
    decay_parameter_names,
    lr_factors,
    parameter_groups,
)
from distilbench.models.build import build_model
from distilbench.models.freezing import freeze
from distilbench.models.resolve import check_trial, resolve_model
from distilbench.settings import (
    SCHEDULERS,
    FreezeSettings,
    ModelSettings,
    OptimSettings,
    SchedulerSettings,
    SettingsError,
)
from tests.conftest import compose_settings

CPU = torch.device("cpu")
ADAMW = OptimSettings("adamw", 2e-5, 0.01, 1.0, 0.9, 0.999, 1e-8, 0.0, 1.0)


def tiny(architecture="distilbert", frozen=0):
    model = build_model(resolve_model(ModelSettings("random", architecture, layers=2)), ("a", "b"), seed=0)
    freeze(model, FreezeSettings(frozen, "auto", True, "depth"))
    return model


def schedule(name, ratio=0.0, steps=None):
    return SchedulerSettings(name, ratio, steps)


@pytest.mark.parametrize("architecture", ["distilbert", "bert", "roberta", "electra", "albert", "modernbert"])
def test_weight_decay_spares_what_trainer_spares(architecture):
    model = tiny(architecture)
    theirs = set(Trainer.get_decay_parameter_names(None, model))
    assert decay_parameter_names(model) == theirs


def test_biases_and_normalisation_do_not_decay():
    model = tiny()
    decayed = decay_parameter_names(model)
    assert "distilbert.transformer.layer.0.attention.q_lin.weight" in decayed
    assert "distilbert.embeddings.word_embeddings.weight" in decayed
    assert not any("bias" in name or "layer_norm" in name.lower() for name in decayed)


def test_groups_hold_every_trainable_parameter_once():
    model = tiny(frozen=1)
    decayed, spared = parameter_groups(model, replace(ADAMW, weight_decay=0.05))
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    grouped = [id(p) for group in (decayed, spared) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert id(model.distilbert.embeddings.word_embeddings.weight) not in grouped


def test_adamw_gets_its_settings():
    optimizer = build_optimizer(tiny(), ADAMW)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]
    wanted = {"lr": 2e-5, "betas": (0.9, 0.999), "eps": 1e-8, "fused": True}
    assert {key: optimizer.defaults[key] for key in wanted} == wanted


def test_sgd_gets_its_settings():
    optimizer = build_optimizer(tiny(), OptimSettings("sgd", 0.1, 0.02, 1.0, 0.9, 0.999, 1e-8, 0.5, 1.0))
    assert isinstance(optimizer, torch.optim.SGD)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.1, 0.5)


@pytest.mark.parametrize("family", ["distilbert", "bert", "roberta", "electra", "modernbert"])
def test_layer_decay_goes_down_by_a_factor_a_layer_to_the_embeddings(family):
    model = tiny(family)
    groups = parameter_groups(model, replace(ADAMW, lr=1.0, layer_decay=0.5))
    rate_of = {id(p): group["lr"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        layer = re.search(r"\.layers?\.(\d)\.", name)
        expected = 0.5 ** (2 - int(layer[1])) if layer else 0.125 if "embeddings" in name else 1.0
        assert rate_of[id(parameter)] == expected, name
    assert groups[0]["lr"] == 1.0, "the head's comes first, for it is what is logged"


def test_layer_decay_is_refused_where_layers_are_one():
    resolved = resolve_model(ModelSettings("random", "albert", layers=2))
    with pytest.raises(SettingsError, match=r"^optim.layer_decay must be 1 for .*albert.*, got 0.9; ALBERT's layers"):
        check_trial(resolved, compose_settings("model=tiny", "data=synthetic", "output.dir=.", "optim.layer_decay=0.9"))


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("lr", [2e-5, 1e-2])
def test_factors_are_those_a_stepped_scheduler_gives(name, warmup, lr):
    warmup = 0 if name == "constant" else warmup
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    theirs = get_scheduler(name, optimizer, warmup, 11)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < 11:
            theirs.step()
    factors = lr_factors(schedule(name, steps=warmup), 11, lr)
    assert factors.shape == (11,)
    assert factors.dtype == np.float64
    np.testing.assert_array_equal(factors * lr, rates)


def test_the_report_s_schedules_in_closed_form():
    steps = np.arange(12630)
    np.testing.assert_allclose(lr_factors(schedule("linear"), 12630, 2e-5), 1 - steps / 12630, atol=1e-15)
    warm = 1263
    cosine = 0.5 * (1 + np.cos(math.pi * (steps - warm) / (12630 - warm)))
    expected = np.where(steps < warm, steps / warm, cosine)
    np.testing.assert_allclose(lr_factors(schedule("cosine", 0.1), 12630, 3e-5), expected, atol=1e-15)


@pytest.mark.parametrize("name", [n for n in SCHEDULERS if n != "constant"])
def test_a_warm_up_as_long_as_the_trial_is_a_ramp(name):
    np.testing.assert_allclose(lr_factors(schedule(name, steps=4), 4, 1e-3), [0, 0.25, 0.5, 0.75])


@given(ratio=st.floats(0, 1, exclude_max=True), steps=st.integers(1, 20_000))
def test_warm_up_rounds_as_transformers_does(ratio, steps):
    theirs = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=ratio), steps)
    assert schedule("linear", ratio).warmup(steps) == theirs


def test_polynomial_ends_at_a_rate_and_refuses_a_peak_below_it():
    assert lr_factors(schedule("polynomial"), 1000, 1e-5)[-1] * 1e-5 == pytest.approx(1e-7 + 9.9e-9, rel=1e-6)
    with pytest.raises(SettingsError, match=r"optim\.lr must be above 1e-07 with scheduler=polynomial, got 1e-08"):
        lr_factors(schedule("polynomial"), 10, 1e-8)


LABELS = np.array([0, 0, 0, 1, 2, 2])
LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3]], dtype=torch.float64)


def loss_of(settings, labels=LABELS):
    return build_loss(settings.train, labels, 3, CPU, torch.float64)


def test_without_either_it_is_the_plain_cross_entropy(settings):
    loss = loss_of(settings())
    expected = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([0, 2]), reduction="none")
    assert torch.equal(loss(LOGITS, torch.tensor([0, 2])), expected)


def test_smoothing_spreads_a_share_of_the_target_over_all_labels(settings):
    loss = loss_of(settings("train.label_smoothing=0.3"))
    target = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]], dtype=torch.float64)
    expected = -(target * LOGITS.log_softmax(1)).sum(1)
    torch.testing.assert_close(loss(LOGITS, torch.tensor([0, 2])), expected)


def test_balanced_weights_are_those_of_scikit_learn_and_multiply_an_examples_loss(settings):
    loss = loss_of(settings("train.class_weights=balanced"))
    weights = compute_class_weight("balanced", classes=np.arange(3), y=LABELS)
    plain = torch.nn.functional.cross_entropy(LOGITS, torch.tensor([1, 2]), reduction="none")
    torch.testing.assert_close(loss(LOGITS, torch.tensor([1, 2])), plain * torch.from_numpy(weights[[1, 2]]))
    assert weights.mean() != pytest.approx(1)


def test_a_label_that_no_example_has_weighs_as_one_example(settings):
    loss = loss_of(settings("train.class_weights=balanced"), np.array([0, 0]))
    assert loss.weight.tolist() == pytest.approx([1 / 3, 2 / 3, 2 / 3])


def test_examples_that_fill_up_a_batch_lose_nothing(settings):
    loss = loss_of(settings("train.class_weights=balanced", "train.label_smoothing=0.1"))
    assert loss(LOGITS, torch.tensor([1, -100]))[1] == 0

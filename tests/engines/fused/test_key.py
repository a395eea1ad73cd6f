"""Which trials may train at once, and which the fused engine refuses."""

from __future__ import annotations

import pytest

from distilbench.engines.fused.key import check_fusable, fusion_key
from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings, SettingsError


@pytest.mark.parametrize(
    "override",
    ["optim.lr=1e-3", "optim.weight_decay=0.5", "optim.max_grad_norm=0", "scheduler=cosine",
     "scheduler.warmup_ratio=0.1", "seed=7", "train.metric=loss", "train.checkpoints=false"],
)  # fmt: skip
def test_trials_that_differ_so_train_at_once(settings, override):
    assert fusion_key(settings(override).trial) == fusion_key(settings().trial)


def test_trials_that_write_elsewhere_train_at_once(settings):
    assert fusion_key(settings("output.dir=elsewhere").trial) == fusion_key(settings().trial)


@pytest.mark.parametrize(
    "override",
    ["freeze.layers=1", "freeze.dropout=false", "train.epochs=1", "train.batch_size=8", "train.precision=bf16",
     "train.eval_steps=3", "optim=sgd", "model.layers=3", "data.max_train_examples=9", "engine.device=cpu"],
)  # fmt: skip
def test_trials_that_differ_so_do_not(settings, override):
    assert fusion_key(settings(override).trial) != fusion_key(settings().trial)


def test_keys_can_be_compared_with_lists_in_the_settings(settings):
    given = "data.label_names=[a,b]"
    assert hash(fusion_key(settings(given).trial)) == hash(fusion_key(settings(given).trial))


@pytest.mark.parametrize("kind", ["roberta", "electra", "albert", "modernbert"])
def test_other_architectures_are_refused_with_the_remedy(kind):
    resolved = resolve_model(ModelSettings("random", kind, layers=2))
    with pytest.raises(SettingsError, match=rf"distilbert or bert, got '{kind}' .*; use engine=trainer"):
        check_fusable(resolved, "fp32")


def test_half_precision_that_needs_loss_scaling_is_refused():
    resolved = resolve_model(ModelSettings("random", "bert", layers=2))
    with pytest.raises(SettingsError, match=r"train.precision must be fp32 or bf16 .*, got 'fp16'; use engine=trainer"):
        check_fusable(resolved, "fp16")
    check_fusable(resolved, "bf16")

"""Which trials the fused engine refuses."""

from __future__ import annotations

import pytest

from distilbench.engines import resolve_engine
from distilbench.engines.fused.compatibility import check_fusable
from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings, SettingsError


@pytest.mark.parametrize("kind", ["roberta", "electra", "albert", "modernbert"])
def test_other_architectures_are_refused_with_the_remedy(settings, kind):
    resolved = resolve_model(ModelSettings("random", kind, layers=2))
    with pytest.raises(SettingsError, match=rf"distilbert or bert with .*, got '{kind} \(.*; use engine=trainer$"):
        check_fusable(settings().trial, resolved, "fp32")


def test_half_precision_that_needs_loss_scaling_is_refused(settings):
    resolved = resolve_model(ModelSettings("random", "bert", layers=2))
    with pytest.raises(SettingsError, match=r"train.precision must be fp32 or bf16 .*, got 'fp16'; use engine=trainer"):
        check_fusable(settings().trial, resolved, "fp16")
    check_fusable(settings().trial, resolved, "bf16")


def test_adapters_and_freezing_by_gradients_are_refused_and_auto_takes_the_trainer(settings):
    lora = settings("adapter=lora").trial
    resolved = resolve_model(lora.model)
    with pytest.raises(
        SettingsError, match=r"^adapter.name must be none with engine.name=fused, got 'lora'; use engine=trainer$"
    ):
        check_fusable(lora, resolved, "fp32")
    auto, gradual = settings("freeze=auto").trial, settings("freeze=gradual").trial
    with pytest.raises(
        SettingsError,
        match=r"^freeze.policy must be any but auto with engine.name=fused, got 'auto'; use engine=trainer$",
    ):
        check_fusable(auto, resolved, "fp32")
    chosen = [resolve_engine(trial, resolved, "fp32", "cpu").name for trial in (lora, auto, gradual, settings().trial)]
    assert chosen == ["trainer", "trainer", "fused", "fused"]
    devices = [resolve_engine(settings().trial, resolved, "bf16", device).name for device in ("cpu", "cuda", "mps")]
    assert devices == ["fused", "fused", "trainer"]

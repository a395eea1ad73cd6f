"""What a trial begins with."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import torch

from distilbench.identity import preparation_key
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.trials import prepared
from tests.models.made_checkpoints import random


def test_a_checkout_that_runs_without_being_installed_has_an_unknown_version(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    assert torch.__version__.startswith(prepared.version_of("torch"))
    monkeypatch.setattr(prepared, "version", missing)
    assert prepared.version_of.__wrapped__("distilbench") == "unknown"


def test_weights_that_were_trained_anew_in_this_process_are_another_protocol(settings, tmp_path):
    protocols = set()
    for seed in (1, 2):
        export_model(
            build_model(random(), ("negative", "positive"), seed), load_tokenizer(random()), tmp_path / "model"
        )
        trial = settings("model=local", f"model.checkpoint={tmp_path}/model")
        protocols.add(prepared.prepare(trial).protocol.id)
    assert len(protocols) == 2


def test_text_with_other_slices_is_prepared_anew(settings):
    trial = settings()
    sliced = replace(trial, data=replace(trial.data, source="hub", hub_name="a", slice_column="source"))
    other = replace(sliced, data=replace(sliced.data, slice_column="genre"))
    assert preparation_key(sliced) != preparation_key(other)

"""A probe predicts what a trial takes alone, from a short run that leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distilbench.data.text import load_text
from distilbench.data.tokens import encode, random_part
from distilbench.models.build import load_tokenizer
from distilbench.models.resolve import resolve_model
from distilbench.results import Status, TrialResult
from distilbench.settings import SettingsError
from distilbench.trials import estimate
from distilbench.trials.estimate import STEPS, estimate_alone, solo_seconds


@pytest.fixture
def splits(settings):
    s = settings()
    return encode(load_text(s.data), load_tokenizer(resolve_model(s.model)), s.train.max_length, None)


class Recording:
    """An engine that takes a second an example, evaluated ones included, and keeps what it was given."""

    def __init__(self, status: Status = Status.PRUNED) -> None:
        self.status, self.given = status, []

    def train(self, trials, splits, observer):
        self.given.append((trials[0], splits))
        seconds = float(len(splits.train) + len(splits.selection))
        return [TrialResult(self.status, train_seconds=seconds)]


def test_the_estimate_scales_a_share_of_training_and_evaluation_to_the_whole(settings, splits):
    engine = Recording()
    trial = settings("train.epochs=4", "train.batch_size=4").trial
    seconds = solo_seconds(engine, trial, splits)
    whole = 4 * (len(splits.train) + len(splits.selection))
    assert seconds == pytest.approx(whole, rel=0.02)
    assert len(engine.given) == 2, "the first run only warms up"
    assert len(engine.given[1][1].train) == STEPS * 4


def test_a_gpu_is_probed_for_as_many_steps_as_it_takes_to_record_them(settings, splits, monkeypatch):
    monkeypatch.setattr(estimate, "resolve_device", lambda name: torch.device("cuda", 0))
    engine, trial = Recording(), settings("train.batch_size=1", "train.epochs=20").trial
    assert solo_seconds(engine, trial, splits) == pytest.approx(
        20 * (len(splits.train) + len(splits.selection)), rel=0.02
    )
    assert len(engine.given[1][1].train) == min(estimate.GPU_STEPS, len(splits.train))


def test_a_probe_keeps_the_vocabulary_and_touches_no_directory_of_the_trial(settings, splits):
    engine = Recording()
    trial = settings("train.resume=true").trial
    solo_seconds(engine, trial, splits)
    given, probed = engine.given[0]
    assert set(splits.train.tokens) <= set(probed.report.tokens)
    assert Path(given.output.dir) != Path(trial.output.dir)
    assert (given.output.save_model, given.train.checkpoints, given.train.resume) == (False, False, False)


def test_a_probe_that_fails_gives_no_estimate(settings, splits):
    with pytest.raises(SettingsError, match="needs a trial that can begin, got FAILED"):
        solo_seconds(Recording(Status.FAILED), settings().trial, splits)


def test_random_parts_keep_rows_whole_and_in_order(splits):
    part = random_part(splits.train, 5, np.random.default_rng(3))
    rows = [splits.train.row(i).tolist() for i in range(len(splits.train))]
    places = [rows.index(part.row(i).tolist()) for i in range(5)]
    assert places == sorted(places)


def test_what_moves_is_estimated_between_its_most_and_its_fewest_frozen_levels(settings, splits, monkeypatch):
    """In four parts nothing is frozen, the embeddings (twice), and a layer too: one level in the mean."""

    class Cheaper(Recording):
        def train(self, trials, splits, observer):
            [result] = super().train(trials, splits, observer)
            return [replace(result, train_seconds=result.train_seconds / (1 + trials[0].freeze.freezes_embeddings))]

    engine = Cheaper()
    monkeypatch.setattr("distilbench.trials.estimate.engine_for", lambda settings: engine)
    trial = settings("freeze=scheduled", "freeze.layers=1", "train.epochs=4", "train.batch_size=4")
    prepared = SimpleNamespace(engine=trial.engine, splits=splits, model=SimpleNamespace(depth=2, settings=trial.model))
    estimate = estimate_alone(trial, prepared)
    given = [settings.freeze for settings, _ in engine.given[::2]]
    assert [(f.policy, f.layers, f.freezes_embeddings) for f in given] == [("depth", 0, False), ("depth", 1, True)]
    assert estimate == pytest.approx(0.75 * 4 * (len(splits.train) + len(splits.selection)), rel=0.02)

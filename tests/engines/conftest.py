"""Fixtures for engines: splits of generated text, a model without dropout, and an observer that records its calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from distilbench.data.text import load_text
from distilbench.data.tokens import EncodedSplits, encode
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import resolve_model
from distilbench.results import Evaluation, StepRecord
from distilbench.settings import TrialSettings

PAIRS = ("data=files", f"data.train={Path(__file__).with_name('pairs.csv')}", "data.text_column=one",
         "data.pair_column=two", "data.label_column=label", "data.validation_fraction=0.4")  # fmt: skip
"""Examples of two generated texts, of one to six words each; the label says whether the two are equal."""


@dataclass
class Recorder:
    """Records steps and evaluations by trial; can prune trials, raise at a step, or request a checkpoint and end."""

    prune: set[int] = field(default_factory=set)
    raise_at: dict[int, BaseException] = field(default_factory=dict)
    leave_at: int = 0
    asked: int = 0
    steps: dict[int, list[StepRecord]] = field(default_factory=dict)
    evaluations: dict[int, list[Evaluation]] = field(default_factory=dict)

    def on_step(self, trial: int, record: StepRecord) -> None:
        self.steps.setdefault(trial, []).append(record)
        if record.step in self.raise_at:
            raise self.raise_at[record.step]

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        self.evaluations.setdefault(trial, []).append(evaluation)
        return trial in self.prune

    def wants_checkpoint(self) -> bool:
        self.asked += 1
        return self.asked == self.leave_at

    def on_checkpoint(self) -> None:
        raise KeyboardInterrupt

    def losses(self, trial: int = 0) -> list[float]:
        return [record.loss for record in self.steps[trial]]


@pytest.fixture
def recorder():
    """Return the class of the observers."""
    return Recorder


@pytest.fixture(scope="session")
def splits_of():
    """Return ``splits_of(settings) -> EncodedSplits``: the splits that an engine gets for these settings."""

    known: dict[str, EncodedSplits] = {}

    def make(settings: TrialSettings) -> EncodedSplits:
        key = f"{settings.model} {settings.data} {settings.train.max_length}"
        if key not in known:
            tokenizer = load_tokenizer(resolve_model(settings.model))
            known[key] = encode(load_text(settings.data), tokenizer, settings.train.max_length, None)
        return known[key]

    return make


@pytest.fixture(scope="session")
def model_without_dropout(tmp_path_factory):
    """Return the directory of a tiny DistilBERT without dropout, on which all engines must agree."""
    from distilbench.settings import ModelSettings

    directory = tmp_path_factory.mktemp("still") / "model"
    resolved = resolve_model(ModelSettings("random", "distilbert", layers=2))
    model = build_model(resolved, ("negative", "positive"), seed=3)
    model.config.update({"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0})
    export_model(model, load_tokenizer(resolved), directory)
    return directory

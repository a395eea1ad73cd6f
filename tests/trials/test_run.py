"""A trial beside its baseline, both trained in this process: what is printed and what is kept."""

from __future__ import annotations

import numpy as np

from distilbench.results import PREDICTIONS
from distilbench.tracking.artifacts import read_predictions
from distilbench.trials.prepared import Job
from distilbench.trials.run import run_and_compare
from tests.engines.conftest import PAIRS


def test_slices_of_pairs_are_kept_with_the_predictions_and_told_beside_the_baseline(settings, tmp_path, capsys):
    given = (*PAIRS, "data.slice_column=source", "train.epochs=1", "engine=fused", "output.save_model=false",
             "train.checkpoints=false", "baseline.ensure=true")  # fmt: skip
    trial, baseline = settings(*given, "freeze.layers=1"), settings(*given)
    outcome = run_and_compare(Job(trial, baseline, lambda: ""))
    kept, theirs = (read_predictions(tmp_path / part / PREDICTIONS) for part in ("", "baseline"))
    assert kept.slices.tolist() == theirs.slices.tolist() == list(outcome.prepared.text.report.slices)
    rows = outcome.comparison.slices
    assert {(row.slice, row.label) for row in rows} == {
        (source, label) for source in ("web", "book", "mail") for label in ("baseline", "this trial")
    }
    for row in rows:
        said = theirs if row.is_baseline else kept
        assert row.accuracy == said.correct[kept.slices == row.slice].mean()
        assert row.examples == np.sum(kept.slices == row.slice)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"slices {rows[0].slice} " in printed
    assert "By slice: p is corrected (Holm) for all slices" in printed

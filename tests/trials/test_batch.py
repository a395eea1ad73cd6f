"""Trials trained in this process: what is printed and what is kept, on disk and in memory."""

from __future__ import annotations

import gc
from types import SimpleNamespace

import numpy as np

from distilbench import train
from distilbench.report.from_store import ReportRequest, make_report
from distilbench.results import PREDICTIONS, Status, TrialResult
from distilbench.tracking.run import read_predictions
from distilbench.tracking.uri import sqlite_url
from distilbench.train import Assignment, BatchTrainer
from distilbench.trials.batch import run_and_compare
from distilbench.trials.prepared import Job
from distilbench.trials.run import Trial, _share_batch
from tests.engines.conftest import PAIRS
from tests.made_store import make_store


def test_slices_of_pairs_are_kept_with_the_predictions_and_told_beside_the_baseline_and_in_reports(
    settings, tmp_path, capsys
):
    given = (*PAIRS, "data.slice_column=source", "train.epochs=1", "engine=fused", "output.save_model=false",
             "train.checkpoints=false", "baseline.ensure=true", "tracking=mlflow",
             f"tracking.uri={sqlite_url(tmp_path / 'mlflow.db')}")  # fmt: skip
    store = make_store(tmp_path)
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
    assert "By slice: p is corrected (Holm) for all slices" in printed
    trials = store.search({})
    (base,) = [found.run_id for found in trials if found.treatment["freeze.layers"] == 0]
    report = make_report(store, trials, ReportRequest("Both", {}, 1.0, baseline=base))
    assert [(row.slice, row.accuracy, row.points) for row in report.slices] == [
        (row.slice, row.accuracy, row.points) for row in rows
    ]


def test_a_batch_has_left_memory_before_the_next_is_trained(settings, tmp_path, monkeypatch):
    def trials() -> int:
        gc.collect()
        return sum(type(it) is Trial and it.ended is not None for it in gc.get_objects())

    alive, objective = [], train._objective
    monkeypatch.setattr(train, "_objective", lambda trial: alive.append(trials()) or objective(trial))
    given = ("model=tiny", "data=synthetic", "engine=fused", "train.epochs=1", "output.save_model=false")
    made = [settings(*given, f"seed={seed}", f"output.dir={tmp_path / str(seed)}") for seed in range(3)]
    before = trials()
    tasks = BatchTrainer(max_trials=1).train([Assignment(Job(one, one, lambda: ""), None) for one in made])
    assert len(tasks) == 3
    assert [count - before for count in [*alive, trials()]] == [1, 1, 1, 0]


def test_a_trial_that_ran_out_of_patience_takes_its_share_of_the_time_alone(settings):
    asked = settings("train.epochs=4", "train.batch_size=16")
    splits = SimpleNamespace(train=range(32))  # 8 steps
    ends = [(Status.FINISHED, 8), (Status.FINISHED, 2), (Status.DIVERGED, 2)]
    trials = [
        SimpleNamespace(settings=asked, prepared=SimpleNamespace(splits=splits), result=TrialResult(end, steps=steps))
        for end, steps in ends
    ]
    _share_batch(trials, 9.0, 4.0)
    assert [one.ended.solo_seconds_estimate for one in trials] == [4.0, 1.0, None]
    assert {(one.ended.batch_seconds, one.ended.num_trials_in_batch) for one in trials} == {(9.0, 3)}

"""Runs are brought to what their directories say: after a kill, after an outage, and never to a guess."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
from matplotlib.figure import Figure

from distilbench.results import Owner, Predictions, Record, Status, StepRecord, TrialResult
from distilbench.tracking.search import SWEEP_TAG
from distilbench.tracking.undelivered import is_any_below
from tests.made_store import DONE, LABELS, make_store, start_of

IDENTITY = {"protocol": "p", "treatment": "t", "seed": 1}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("store"))


@pytest.fixture
def dead():
    """A process that was there and is gone."""
    process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    owner = replace(Owner.of(), pid=process.pid)
    process.communicate()
    return owner


@pytest.fixture
def gone(store, monkeypatch):
    """Return a function that takes the server away, and brings it back the second time."""
    monkeypatch.setattr(store, "address", replace(store.address, file=None))  # a file is no server that may go
    real = dict.fromkeys(("create_run", "log_batch", "log_artifact", "set_terminated", "search_runs", "get_run"))

    def switch():
        for name, known in real.items():
            current = getattr(store._client, name)
            monkeypatch.setattr(store._client, name, known or refuse)
            real[name] = None if known else current

    def refuse(*args, **kwargs):
        raise ConnectionError("the server is gone")

    return switch


def begun_by(store, owner, directory, **changes):
    """A run that says it is of ``owner``."""
    run = store.begin(start_of(f"output.dir={directory}", **changes))
    for name, value in {"pid": owner.pid, "process_started": owner.started}.items():
        store._client.set_tag(run.run_id, f"distilbench.{name}", str(value))
    return run


def status_of(store, run_id):
    run = store._client.get_run(run_id)
    return run.info.status, run.data.tags["distilbench.status"]


def test_a_run_that_a_dead_process_left_ends_as_its_record_says(store, dead, tmp_path, caplog):
    kinds = {"finished": Status.FINISHED, "killed": Status.RUNNING, "pruned": Status.PRUNED, "unwritten": None}
    runs = {kind: begun_by(store, dead, tmp_path / kind, name=kind).run_id for kind in kinds}
    alive = store.begin(start_of(f"output.dir={tmp_path / 'alive'}")).run_id
    for kind, status in kinds.items():
        if status:
            figures = {"accuracy": 0.75, "steps": 20.0}
            Record(IDENTITY, status, dead, runs[kind], figures=figures).write(tmp_path / kind)
    (tmp_path / "finished" / "predictions.parquet").write_bytes(b"kept")
    caplog.set_level("INFO")
    store.end_left_runs()
    assert {kind: status_of(store, run_id) for kind, run_id in runs.items()} == {
        "finished": ("FINISHED", "FINISHED"),
        "killed": ("KILLED", "INTERRUPTED"),
        "pruned": ("KILLED", "PRUNED"),
        "unwritten": ("KILLED", "INTERRUPTED"),
    }
    assert status_of(store, alive) == ("RUNNING", "RUNNING")
    assert store._client.get_run(runs["finished"]).data.metrics == {"accuracy": 0.75, "steps": 20.0}
    assert [file.path for file in store._client.list_artifacts(runs["finished"], "")][-1] == "predictions.parquet"
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.startswith("closed 4 runs whose process is gone: ")
    assert "finished FINISHED" in line


def test_a_run_that_can_not_be_ended_does_not_keep_the_others_from_their_end(store, dead, tmp_path, monkeypatch):
    stuck, other = (begun_by(store, dead, tmp_path / name, name=name).run_id for name in ("stuck", "other"))
    Record(IDENTITY, Status.FINISHED, dead, stuck).write(tmp_path / "stuck")
    (tmp_path / "stuck" / "predictions.parquet").write_bytes(b"kept")

    def refuse(*args):
        raise ConnectionError("gone for a while")

    monkeypatch.setattr(store._client, "log_artifact", refuse)
    store.end_left_runs()
    assert [status_of(store, run_id)[1] for run_id in (stuck, other)] == ["RUNNING", "INTERRUPTED"]
    monkeypatch.undo()
    store.end_left_runs()
    assert status_of(store, stuck) == ("FINISHED", "FINISHED")


def test_a_file_that_the_store_refuses_for_good_costs_a_line_and_not_the_end_of_its_run(
    store, dead, tmp_path, monkeypatch, caplog
):
    run_id = begun_by(store, dead, tmp_path).run_id
    Record(IDENTITY, Status.FINISHED, dead, run_id).write(tmp_path)
    (tmp_path / "predictions.parquet").write_bytes(b"too large")

    def refuse(*args):
        raise ValueError("larger than 500 MB")

    monkeypatch.setattr(store._client, "log_artifact", refuse)
    store.end_left_runs()
    assert status_of(store, run_id) == ("FINISHED", "FINISHED")
    assert "MLflow did not take predictions.parquet of the run: larger than 500 MB" in caplog.text


def test_a_directory_that_another_trial_has_used_since_says_nothing_of_a_run(store, dead, tmp_path):
    run_id = begun_by(store, dead, tmp_path).run_id
    Record(IDENTITY, Status.FINISHED, dead, "another run").write(tmp_path)
    store.end_left_runs()
    assert status_of(store, run_id) == ("KILLED", "INTERRUPTED")


def test_a_sweep_that_ended_without_a_server_is_told_whole_by_the_next_command(store, dead, tmp_path, gone):
    parent = store.open_parent_run("outage", {SWEEP_TAG: "outage"}, tmp_path)
    for name, value in {"pid": dead.pid, "process_started": dead.started}.items():
        store._client.set_tag(parent.run_id, f"distilbench.{name}", str(value))
    gone()
    directory = tmp_path / "0"
    run = store.begin(start_of(f"output.dir={directory}", tags={SWEEP_TAG: "outage"}, parent_run_id=parent.run_id))
    assert run.run_id is None
    Record(IDENTITY, Status.FINISHED, Owner.of(), None, figures={"steps": 20.0}).write(directory)
    run.on_evaluation(DONE.report)
    run.finish(DONE, Predictions(LABELS, LABELS[:, None] == [0, 1]))
    parent.update({"trials_finished": 1}, "one of one")
    parent.finish(Status.FINISHED)
    assert is_any_below(directory)
    store.end_left_runs()
    gone()
    store.end_left_runs()
    assert not is_any_below(tmp_path)
    assert status_of(store, parent.run_id) == ("FINISHED", "FINISHED")
    described = store._client.get_run(parent.run_id).data
    assert (described.metrics["trials_finished"], described.tags["mlflow.note.content"]) == (1, "one of one")
    (trial,) = [t for t in store.search({SWEEP_TAG: "outage"}) if t.status is Status.FINISHED]
    assert (trial.accuracy, trial.train_seconds) == (DONE.report.accuracy, DONE.train_seconds)
    assert store.predictions(trial.run_id).correct.shape == LABELS.shape
    files = [file.path for file in store._client.list_artifacts(trial.run_id)]
    assert {"confusion_matrix.png", "learning_curve.png", "config.yaml"} <= set(files)
    assert store._client.get_metric_history(trial.run_id, "validation/accuracy")[0].step == DONE.report.step


def test_what_is_kept_of_a_trial_that_another_directory_continues_ends_nothing(store, dead, tmp_path, gone):
    run = store.begin(start_of(f"output.dir={tmp_path / '0'}", tags={SWEEP_TAG: "moved"}))
    gone()
    run.on_evaluation(DONE.report)
    run.finish(TrialResult(Status.INTERRUPTED, "interrupted", steps=20))
    gone()
    again = store.begin(start_of(f"output.dir={tmp_path / '1'}", tags={SWEEP_TAG: "moved"}, run_id=run.run_id))
    store.catch_up(tmp_path)
    assert again.run_id == run.run_id
    assert status_of(store, run.run_id) == ("RUNNING", "RUNNING")
    assert not is_any_below(tmp_path)
    assert len(store._client.get_metric_history(run.run_id, "validation/accuracy")) == 1


@pytest.mark.parametrize("away", ["never", "at the kill", "at the kill and after", "after"])
def test_steps_that_a_continued_trial_takes_again_are_in_its_run_once(store, tmp_path, gone, away, monkeypatch):
    """So are those before in its learning curve, but while the store is away."""
    drawn = []
    monkeypatch.setattr("distilbench.tracking.run.curve_figure", lambda losses, _: drawn.extend(losses) or Figure())
    given = f"output.dir={tmp_path}", "train.resume=true"
    run = store.begin(start_of(*given, tags={SWEEP_TAG: "killed"}))

    def take(run, *steps):
        for step in steps:
            run.on_step(StepRecord(step, 20, 0.1, 1 / step, 2e-5, 1.0, 30.0))
        run.on_evaluation(replace(DONE.report, step=steps[-1]))

    def switch(at):
        if away in at:
            gone()

    take(run, 1, 2)
    switch(("at the kill", "at the kill and after"))
    take(run, 3, 4)
    switch(("at the kill", "after"))
    again = store.begin(start_of(*given, tags={SWEEP_TAG: "killed"}, run_id=run.run_id))
    take(again, 2, 3, 4)
    switch(("at the kill and after", "after"))
    take(again, 5)
    again.finish(replace(DONE, history=(DONE.report,)))
    assert drawn == [(step, 1 / step) for step in (range(1, 6) if away in ("never", "at the kill") else range(2, 6))]
    for curve, steps in {"train/loss": [1, 2, 3, 4, 5], "validation/accuracy": [2, 4, 5], "epoch": [2, 4, 5]}.items():
        assert [point.step for point in store._client.get_metric_history(run.run_id, curve)] == steps

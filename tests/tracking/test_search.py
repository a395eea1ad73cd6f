"""Many runs read at once: what is found."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from distilbench.results import Status, TrialResult
from distilbench.settings import SettingsError, TrackingSettings
from distilbench.tracking import search
from distilbench.tracking.connect import find_store
from distilbench.tracking.search import SWEEP_TAG, trained_beside_others
from tests.made_store import DONE, make_store, start_of


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A store of two sweeps: ``first`` with a finished, a diverged and a deleted trial, ``empty`` without any."""
    store = make_store(tmp_path_factory.mktemp("kept"))
    parent = store.open_parent_run("first", {SWEEP_TAG: "first"}, Path("first"))
    ids = {}
    for name, result in {
        "done": DONE,
        "diverged": TrialResult(Status.DIVERGED, "the loss is nan"),
        "picked elsewhere": replace(DONE, selection=replace(DONE.report, accuracy=0.9)),
    }.items():
        tags = {SWEEP_TAG: "first", "distilbench.role": "baseline" if name == "done" else ""}
        run = store.begin(start_of("freeze.layers=1", name=name, tags=tags, parent_run_id=parent.run_id))
        run.finish(result, None)
        ids[name] = run.run_id
    store.open_parent_run("empty", {SWEEP_TAG: "empty"}, Path("empty"))
    store._client.delete_run(store.begin(start_of(name="deleted", tags={SWEEP_TAG: "first"})).run_id)
    store._client.create_run(store._client.create_experiment("another"), tags={SWEEP_TAG: "first"})
    ids["alone"] = store.begin(start_of(name="alone")).run_id
    return store, ids, parent.run_id


def test_a_sweep_is_found_by_its_name_with_all_its_trials_and_nothing_else(kept):
    store, ids, _ = kept
    found = store.search({SWEEP_TAG: "first"})
    assert [trial.name for trial in found] == ["done", "diverged", "picked elsewhere"]
    done, diverged, _ = found
    assert (done.accuracy, done.loss, done.train_seconds, done.role) == (0.75, 0.4, 12.5, "baseline")
    assert (diverged.status, diverged.error) == (Status.DIVERGED, "the loss is nan")
    assert done.url.endswith(f"/#/experiments/1/runs/{ids['done']}?workflowType=machine_learning")
    assert store.search({SWEEP_TAG: "nowhere"}) == []
    assert store.search({SWEEP_TAG: "' or 1=1 --"}) == []
    both = {SWEEP_TAG: "first", "distilbench.status": "DIVERGED"}
    assert [trial.name for trial in store.search(both)] == ["diverged"]


def test_costs_are_found_and_nan_where_an_earlier_version_logged_none(tmp_path):
    store = make_store(tmp_path)
    calibrated = replace(DONE.report, brier=0.08, ece=0.02)
    full = replace(DONE, report=calibrated, train_flops=6.9e14, train_cpu_seconds=20.5, peak_memory_bytes=3 * 2**20)
    run = store.begin(start_of())
    run.finish(full, None)
    older = store.begin(start_of())  # and no figure at all
    found = {trial.run_id: trial for trial in store.search({})}
    names = ("train_flops", "train_cpu_seconds", "peak_memory_bytes", "brier", "ece")
    assert [getattr(found[run.run_id], name) for name in names] == [6.9e14, 20.5, 3 * 2**20, 0.08, 0.02]
    assert all(math.isnan(getattr(found[older.run_id], name)) for name in names)


def test_the_score_is_the_metric_on_the_split_that_picked(kept):
    scores = {trial.name: trial.score for trial in kept[0].search({SWEEP_TAG: "first"})}
    assert (scores["done"], scores["picked elsewhere"]) == (0.75, 0.9)
    assert scores["diverged"] != scores["diverged"]


def test_runs_are_found_by_id(kept):
    store, ids, parent = kept
    assert [t.name for t in store.search({}, (ids["alone"], ids["done"]))] == ["done", "alone"]
    assert [t.name for t in store.search({SWEEP_TAG: "first"}, (ids["alone"], ids["done"]))] == ["done"]
    assert store.search({}, ("no id, it's a sentence",)) == []
    with pytest.raises(SettingsError, match="must be a distilbench trial"):
        store.search({}, (parent,))


def test_runs_are_found_on_every_page(kept, monkeypatch):
    store, ids, _ = kept
    names = [trial.name for trial in store.search({})]
    monkeypatch.setattr(search, "PAGE", 2)
    assert [trial.name for trial in store.search({})] == names == [*ids]


def test_sweeps_are_known_by_name_newest_first(kept):
    store, _, parent = kept
    assert store.sweep_names() == ["empty", "first"]
    assert store.sweep_run("first").run_id == parent
    assert store.sweep_run("nowhere") is None


def test_a_run_of_another_version_is_told_in_one_line(kept):
    store, ids, _ = kept
    store._client.delete_tag(ids["alone"], "distilbench.measured_on")
    with pytest.raises(SettingsError, match=r"of distilbench that this one reads, got .*measured_on"):
        store.search({}, (ids["alone"],))


def test_history_and_configuration_are_read_back(kept):
    store, ids, _ = kept
    assert store.history(ids["done"], "nothing") == []
    assert yaml.safe_load(store.config(ids["done"]))["seed"] == 42
    with pytest.raises(SettingsError, match=r"^run must be a trial's, with config.yaml, got .*check its id"):
        store.config("0" * 32)


def test_what_is_attached_to_a_sweep_is_there(kept, tmp_path):
    store, _, parent = kept
    (tmp_path / "report.md").write_text("# hello")
    store.attach(parent, [tmp_path / "report.md"], "**note**")
    run = store._client.get_run(parent)
    assert run.data.tags["mlflow.note.content"] == "**note**"
    assert [file.path for file in store._client.list_artifacts(parent)] == ["report.md"]


def test_looking_for_a_store_makes_none(tmp_path):
    with pytest.raises(
        SettingsError, match=r"must be a store that holds trials, got .*mlflow.db, which does not exist"
    ):
        find_store(TrackingSettings("mlflow", f"sqlite:///{tmp_path}/mlflow.db", "tests", 0))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SettingsError, match=r"tracking must be mlflow"):
        find_store(TrackingSettings("none", None, "tests", 0))


def test_an_unknown_experiment_names_those_that_are_there(kept):
    uri = kept[0].address.uri
    with pytest.raises(SettingsError, match=r"must be one of Default, another, distilbench, got 'other'"):
        find_store(TrackingSettings("mlflow", uri, "other", 0))


def test_a_store_of_another_mlflow_is_told_in_one_line(kept, tmp_path):
    import shutil
    import sqlite3

    copy = tmp_path / "other.db"
    shutil.copy(kept[0].address.file, copy)
    with sqlite3.connect(copy) as connection:
        connection.execute("update alembic_version set version_num = 'ffffffffffff'")
    connection.close()
    with pytest.raises(
        SettingsError, match=r"^tracking.uri must be a store that answers, got .*; back it up and run: mlflow db"
    ):
        find_store(TrackingSettings("mlflow", f"sqlite:///{copy}", "distilbench", 0))


def timed(name, start, end, status=Status.FINISHED, **tags):
    """A run of a process on a host, in ms."""
    told = {"host": "here", "gpus": "", "pid": "1", "status": status.value, **tags}
    data = SimpleNamespace(tags={f"distilbench.{key}": value for key, value in told.items()})
    return SimpleNamespace(info=SimpleNamespace(run_id=name, start_time=start, end_time=end), data=data)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (timed("b", 50, 70, pid="2"), {"a", "b"}),
        (timed("b", 100, 120, pid="2"), set()),
        (timed("b", 50, 120), set()),
        (timed("b", 50, 70, pid="2", host="there"), set()),
        (timed("b", 50, 70, pid="2", gpus="1"), set()),
        (timed("b", 50, 70, pid="2", status=Status.INTERRUPTED), set()),
        (timed("b", 50, None, pid="2", status=Status.RUNNING), set()),
        (timed("b", 50, 70, pid="2", status=Status.DIVERGED), {"a", "b"}),
    ],
)
def test_trials_of_two_processes_at_one_time_on_one_device_were_not_alone(other, shared):
    assert trained_beside_others([timed("c", 200, 300), other, timed("a", 0, 100)]) == shared


def test_a_trial_that_outlasts_others_was_beside_each(kept):
    runs = [timed("long", 0, 100), timed("first", 10, 20, pid="2"), timed("second", 30, 40, pid="2")]
    assert trained_beside_others(runs) == {"long", "first", "second"}
    assert all(trial.alone for trial in kept[0].search({SWEEP_TAG: "first"})), "one after the other"

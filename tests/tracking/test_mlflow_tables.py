"""What is known of MLflow's own tables is still so: its public search tells the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from distilbench.results import Status, TrialResult
from distilbench.tracking import SWEEP, RunFilter
from distilbench.tracking.mlflow_tables import search_database
from distilbench.tracking.search import METRICS, TAGS, search_server
from tests.made_store import DONE, make_store, start_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Trials of a sweep, one of them diverged, one deleted; a run of no trial; another experiment."""
    store = make_store(tmp_path_factory.mktemp("tables"))
    parent = store.open_parent_run("first", {SWEEP: "first"}, Path("first"))
    for name, result in {
        "done": DONE,
        "diverged": TrialResult(Status.DIVERGED, "nan", train_seconds=float("nan")),
    }.items():
        start = start_of("freeze.layers=1", name=name, tags={SWEEP: "first"}, parent_run_id=parent.run_id)
        store.begin(start).finish(result)
    store._client.delete_run(store.begin(start_of(name="deleted", tags={SWEEP: "first"})).run_id)
    store.begin(start_of("freeze.layers=2", name="alone"))
    store._client.create_run(store._client.create_experiment("another"))
    return store


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        (RunFilter(), 4),
        (RunFilter(tags={SWEEP: "first"}), 3),
        (RunFilter(tags={SWEEP: "first", "distilbench.status": "DIVERGED"}), 1),
        (RunFilter(params={"freeze.layers": "2"}), 1),
        (RunFilter(tags={SWEEP: "' or 1=1 --"}), 0),
    ],
    ids=["all", "sweep", "two tags", "parameter", "a quote"],
)
def test_a_database_tells_what_mlflows_own_search_tells(store, wanted, number):
    asked = [shown(run) for run in search_server(store._client, "1", wanted)]
    assert len(asked) == number
    assert sorted(asked) == sorted(shown(run) for run in search_database(store._address, "1", wanted))


def shown(run):
    """All of a run that a report may look at; NaN differs from itself, but not its text."""
    tags = {key: value for key, value in run.tags.items() if key in TAGS}
    metrics = {key: value for key, value in run.metrics.items() if key in METRICS}
    return repr(replace(run, tags=dict(sorted(tags.items())), metrics=dict(sorted(metrics.items()))))


def test_runs_of_either_kind_are_told_apart_before_they_are_read(store):
    trials = list(search_database(store._address, "1", RunFilter(are_trials=True)))
    others = list(search_database(store._address, "1", RunFilter(are_trials=False)))
    assert [run.name for run in trials] == ["done", "diverged", "alone"]
    assert [run.name for run in others] == ["first"]

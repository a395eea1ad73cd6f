"""What is known of MLflow's own tables is still so: its public search tells the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from distilbench.results import Status, TrialResult
from distilbench.tracking.mlflow_tables import search_database
from distilbench.tracking.search import SWEEP_TAG, search_runs
from tests.made_store import DONE, make_store, start_of


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Trials of a sweep, one of them diverged, one deleted; a run of no trial; another experiment."""
    store = make_store(tmp_path_factory.mktemp("tables"))
    parent = store.open_parent_run("first", {SWEEP_TAG: "first"}, Path("first"))
    for name, result in {
        "done": DONE,
        "diverged": TrialResult(Status.DIVERGED, "nan", train_seconds=float("nan")),
    }.items():
        start = start_of("freeze.layers=1", name=name, tags={SWEEP_TAG: "first"}, parent_run_id=parent.run_id)
        store.begin(start).finish(result)
    store._client.delete_run(store.begin(start_of(name="deleted", tags={SWEEP_TAG: "first"})).run_id)
    store.begin(start_of("freeze.layers=2", name="alone"))
    store._client.create_run(store._client.create_experiment("another"))
    return store


@pytest.mark.parametrize(
    ("wanted", "number"),
    [
        ({}, 4),
        ({SWEEP_TAG: "first"}, 3),
        ({SWEEP_TAG: "first", "distilbench.status": "DIVERGED"}, 1),
        ({SWEEP_TAG: "' or 1=1 --"}, 0),
    ],
    ids=["all", "sweep", "two tags", "a quote"],
)
def test_a_database_tells_what_mlflows_own_search_tells(store, wanted, number):
    asked = [shown(run) for run in search_runs(store._client, "1", wanted)]
    assert len(asked) == number
    assert asked == [shown(run) for run in search_database(store.address.uri, "1", wanted)]


def test_runs_are_found_by_their_ids(store):
    ids = [run.info.run_id for run in search_runs(store._client, "1", {})][1:3]
    assert [run.info.run_id for run in search_database(store.address.uri, "1", {}, tuple(ids))] == ids


def shown(run):
    """All of a run that a report may look at; NaN differs from itself, but not its text."""
    ours = {key: value for key, value in run.data.tags.items() if key.startswith("distilbench.") or "parent" in key}
    info = run.info
    told = (info.run_id, info.run_name, info.status, info.start_time, info.end_time, info.artifact_uri)
    return repr((told, sorted(ours.items()), sorted(run.data.metrics.items())))

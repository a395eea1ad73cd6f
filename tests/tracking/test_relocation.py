"""A store keeps its files beside itself, wherever its folder goes and whatever it is called."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest

from distilbench.settings import TrackingSettings
from distilbench.tracking.connect import find_store, open_store
from distilbench.tracking.uri import sqlite_url
from tests.made_store import DONE, add_trial, make_store, start_of

ODD = Path("why? not") / "my%20lab" / "a#b" / "größe, it's"


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A store with one trial, made in a folder whose name every URL has to escape."""
    folder = tmp_path_factory.mktemp("template") / ODD
    folder.mkdir(parents=True)
    return folder, add_trial(make_store(folder))


def settings_at(folder):
    return TrackingSettings("mlflow", sqlite_url(folder / "mlflow.db"), "distilbench", 0)


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(params=["copied", "moved"])
def carried(request, template, tmp_path):
    """The store in another folder; the first one is still there, or gone: ``(old, new, run_id)``."""
    old, new = tmp_path / "old", tmp_path / "a new %41 place"
    shutil.copytree(template[0], old)
    open_store(settings_at(old))
    (shutil.copytree if request.param == "copied" else shutil.move)(old, new)
    return old, new, template[1]


def test_a_folder_of_any_name_holds_its_store_and_nothing_beside_it(template):
    folder, run_id = template
    assert (folder / "mlruns" / "1" / run_id / "artifacts" / "predictions.parquet").is_file()
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlruns"}
    top = folder.parents[len(ODD.parts) - 1]
    assert list(top.rglob("*.db")) == [folder / "mlflow.db"]
    store = find_store(settings_at(folder))
    assert store.predictions(run_id) is not None
    shown = shlex.split(store.describe().partition("(")[2].rstrip(")"))
    assert shown == ["cd", str(folder), "&&", "mlflow", "ui"]


@pytest.mark.parametrize("opened", [open_store, find_store])
def test_a_store_that_was_copied_or_moved_keeps_its_files_beside_itself(carried, caplog, opened):
    old, new, run_id = carried
    before = files_of(old)
    opened(settings_at(new))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2  # MLflow's own experiment, and ours
    assert said[1].startswith(f"files of the experiment distilbench are from now on in {new}/mlruns/1, beside")
    assert f"what is only in {old}/mlruns/1, where" in said[1]
    store = open_store(settings_at(new))
    assert len(caplog.records) == 2, "told twice"
    again = store.begin(start_of(run_id=run_id))  # an old run, written to anew
    again.finish(DONE)
    added = add_trial(store)
    assert (new / "mlruns" / "1" / added / "artifacts" / "predictions.parquet").is_file()
    assert [trial.run_id for trial in store.search({}, (run_id,))] == [run_id]
    assert store.predictions(run_id) is not None
    assert files_of(old) == before


def test_a_folder_that_somebody_chose_and_a_link_to_another_store_stay_as_they_are(template, tmp_path, caplog):
    (tmp_path / "mlflow.db").symlink_to(template[0] / "mlflow.db")
    store = open_store(settings_at(tmp_path))
    chosen = (tmp_path / "files" / "7").as_uri()
    number = store._client.create_experiment("chosen", artifact_location=chosen)
    theirs = tmp_path / "their project" / "mlruns" / str(int(number) + 1)  # where MLflow itself puts its files
    theirs.mkdir(parents=True)
    other = store._client.create_experiment("theirs", artifact_location=theirs.as_uri())
    assert other == theirs.name
    assert open_store(settings_at(tmp_path)).predictions(template[1]) is not None
    assert store._client.get_experiment(number).artifact_location == chosen
    assert store._client.get_experiment(other).artifact_location == theirs.as_uri()
    assert not caplog.records

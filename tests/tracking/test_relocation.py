"""A store keeps its files beside itself, wherever its folder goes and whatever it is called."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distilbench.settings import SettingsError, TrackingSettings
from distilbench.tracking import RunFilter, find_store, open_store
from distilbench.tracking.__main__ import main
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
    main_with("relocate", settings_at(old).uri)
    (shutil.copytree if request.param == "copied" else shutil.move)(old, new)
    return old, new, template[1]


def main_with(*arguments):
    sys.argv[1:] = arguments
    main()


def command_in(text):
    """The arguments of the command that a line offers."""
    return shlex.split(text.split("python -m distilbench.tracking ")[1].split("), or name")[0])


def test_a_folder_of_any_name_holds_its_store_and_nothing_beside_it(template):
    folder, run_id = template
    assert (folder / "mlruns" / "1" / run_id / "artifacts" / "predictions.parquet").is_file()
    assert {path.name for path in folder.iterdir()} == {"mlflow.db", "mlruns"}
    top = folder.parents[len(ODD.parts) - 1]
    assert list(top.rglob("*.db")) == [folder / "mlflow.db"]
    store = find_store(settings_at(folder))
    assert store.foreign_folder is None
    assert store.predictions(run_id) is not None
    shown = shlex.split(store.describe().partition("(")[2].rstrip(")"))
    assert shown == ["cd", str(folder), "&&", "mlflow", "ui"]


def test_nothing_is_written_beside_another_store_and_the_line_names_the_command_that_mends_it(carried, capsys):
    old, new, run_id = carried
    before = files_of(old)
    with pytest.raises(SettingsError) as refused:
        open_store(settings_at(new))
    line = str(refused.value)
    assert line.startswith(f"tracking.experiment must keep its files beside its store, in {new}/mlruns, got 'disti")
    assert f"{old}/mlruns/1 (a copied, moved or renamed checkout?)" in line
    main_with(*command_in(line))
    assert capsys.readouterr().out == (
        f"experiment Default: files are now sought and kept in {new}/mlruns/0 (before: {old}/mlruns/0)\n"
        f"experiment distilbench: files are now sought and kept in {new}/mlruns/1 (before: {old}/mlruns/1)\n"
    )
    store = open_store(settings_at(new))
    again = store.begin(start_of(run_id=run_id))  # an old run, written to anew
    again.finish(DONE)
    added = add_trial(store)
    assert (new / "mlruns" / "1" / added / "artifacts" / "predictions.parquet").is_file()
    assert [trial.run_id for trial in store.search(RunFilter(run_ids=(run_id,)))] == [run_id]
    assert store.predictions(run_id) is not None
    assert files_of(old) == before
    main_with(*command_in(line))
    assert capsys.readouterr().out.startswith("nothing to do: ")


def test_who_only_reads_is_told_whose_files_they_are(carried, caplog):
    old, new, run_id = carried
    store = find_store(settings_at(new))
    (record,) = caplog.records
    assert f"with {old}/mlruns/1" in record.getMessage()
    assert (store.predictions(run_id) is not None) == old.exists()
    with pytest.raises(SettingsError, match="must keep its files beside its store"):
        store.begin(start_of())
    with pytest.raises(SettingsError, match="must keep its files beside its store"):
        store.open_parent_run("sweep", {"distilbench.sweep": "sweep"}, Path("sweep"))


def test_a_database_that_was_copied_alone_is_told_how_to_get_its_files(carried, capsys):
    old, new, run_id = carried
    shutil.rmtree(new / "mlruns")
    main_with("relocate", settings_at(new).uri)
    said = capsys.readouterr().out
    if old.exists():
        subprocess.run(shlex.split(said.partition("to bring them: ")[2]), check=True)
        assert find_store(settings_at(new)).predictions(run_id) is not None
    else:
        assert "files of 1 run (of 1) are in neither place" in said


def test_a_folder_that_somebody_chose_is_theirs_to_choose(template, tmp_path):
    folder = tmp_path / "store"
    shutil.copytree(template[0], folder)
    store = make_relocated(folder)
    store._client.create_experiment("chosen", artifact_location=(tmp_path / "files" / "7").as_uri())
    chosen = TrackingSettings("mlflow", settings_at(folder).uri, "chosen", 0)
    with pytest.raises(SettingsError, match="must keep its files beside its store"):
        open_store(chosen)
    (tmp_path / "files").mkdir()
    assert open_store(chosen).foreign_folder is None


def make_relocated(folder):
    main_with("relocate", settings_at(folder).uri)
    return open_store(settings_at(folder))


def test_a_link_to_another_store_is_no_store_to_mend(template, tmp_path):
    (tmp_path / "mlflow.db").symlink_to(template[0] / "mlflow.db")
    assert open_store(settings_at(tmp_path)).foreign_folder is None
    for uri, shown in ((settings_at(tmp_path).uri, "a link to"), (sqlite_url(tmp_path / "none.db"), "none.db")):
        with pytest.raises(SettingsError, match=f"must be a SQLite file with its mlruns/ beside it, got .*{shown}"):
            main_with("relocate", uri)
    assert not (tmp_path / "none.db").exists()

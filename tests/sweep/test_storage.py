"""Where a study is kept."""

from __future__ import annotations

import pytest

from distilbench.settings import SettingsError
from distilbench.sweep.storage import check_url, open_study, storage_at


@pytest.mark.parametrize("url", ["sqlite://", "sqlite+pysqlite://", "postgresql:", "sweeps.db", "oracle://me@here/db"])
def test_only_a_database_that_outlives_the_process_is_taken(url):
    with pytest.raises(SettingsError, match=r"^hydra.sweeper.storage must be the URL of a database, got "):
        check_url(url, url)
    for taken in ("sqlite:///a.db", "sqlite+pysqlite:////a.db", "postgresql+psycopg://me@here/d", "mysql://me@here/d"):
        check_url(taken, taken)


def test_a_file_is_that_of_the_directory_in_which_it_was_typed_wherever_a_job_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for typed in ("sqlite:///s.db", f"sqlite:///{tmp_path}/s.db"):
        storage = storage_at(typed, None, tmp_path)
        assert (storage.file, storage.url_template) == (tmp_path / "s.db", f"sqlite:///{tmp_path}/s.db")
    named = storage_at(f"sqlite:///{tmp_path}/s.db", "sqlite:///${oc.env:X}/s.db", tmp_path)
    assert (named.file, named.url_template) == (tmp_path / "s.db", "sqlite:///${oc.env:X}/s.db")


@pytest.mark.parametrize("typed", [None, "sqlite:///study.db"])
def test_a_study_lies_in_its_file_whatever_its_folder_is_called(tmp_path, monkeypatch, typed):
    folder = tmp_path / "why? 100%41 #1 größe"
    folder.mkdir()
    monkeypatch.chdir(folder)
    storage = storage_at(typed, typed, folder)
    assert storage.file == folder / "study.db"
    open_study(storage, "odd", ["maximize"], None, 60)
    assert storage.file.read_bytes().count(b"odd")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]

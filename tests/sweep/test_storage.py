"""Where a study is kept."""

from __future__ import annotations

from distilbench.sweep.storage import storage_at


def test_a_file_is_that_of_the_directory_in_which_it_was_typed_wherever_a_job_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for typed in ("sqlite:///s.db", f"sqlite:///{tmp_path}/s.db"):
        storage = storage_at(typed, None, tmp_path)
        assert (storage.file, storage.shown) == (tmp_path / "s.db", f"sqlite:///{tmp_path}/s.db")
    named = storage_at(f"sqlite:///{tmp_path}/s.db", "sqlite:///${oc.env:X}/s.db", tmp_path)
    assert (named.file, named.shown) == (tmp_path / "s.db", "sqlite:///${oc.env:X}/s.db")

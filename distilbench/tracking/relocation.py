"""Whose folder an experiment's files go to: MLflow fixes it, as an absolute path, when the experiment is made.

MLflow has no call that changes it: the two columns of its tables that hold such paths are known here.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.cli import counted
from distilbench.settings import SettingsError, root
from distilbench.tracking.redaction import redact
from distilbench.tracking.uri import StoreAddress, local_folder

if TYPE_CHECKING:
    from mlflow.entities import Experiment


def foreign_folder(address: StoreAddress, experiment: Experiment) -> str | None:
    """Say in one line that an experiment's files are not beside its store but beside another; None if they are fine."""
    folder = _foreign(address, experiment.artifact_location, str(experiment.experiment_id))
    if folder is None:
        return None
    store = "" if address.file == root() / "mlflow.db" else f" {shlex.quote(address.uri)}"
    mend = f"make them its own (python -m distilbench.tracking relocate{store})" if address.file else "move it back"
    return (
        f"tracking.experiment must keep its files beside its store, in {address.artifacts}, got {experiment.name!r} "
        f"with {folder} (a copied, moved or renamed checkout?); {mend}, or name another experiment"
    )


def _foreign(address: StoreAddress, location: str, experiment_id: str) -> Path | None:
    """Return the folder of an experiment's files (``location``) if it is not this store's; None if it is fine.

    A store that was copied, moved or renamed with its checkout still names the folder beside the old one. One that
    somebody chose is theirs to choose, while it is there; a server's database has no place of its own.
    """
    folder = local_folder(location)
    if folder is None or address.artifacts is None:
        return None
    own = {address.artifacts.resolve(), address.file.resolve().parent / "mlruns" if address.file else address.artifacts}
    if any(folder.resolve().is_relative_to(place) for place in own):
        return None
    is_beside_another = address.file and folder.name == experiment_id and folder.parent.name == "mlruns"
    return folder if is_beside_another or not folder.parent.is_dir() else None


def relocate(address: StoreAddress) -> Iterator[str]:
    """Have a SQLite store keep its files beside itself, those of old runs too; yield lines that say what was done.

    Files are not touched. Raises :class:`SettingsError` for a store that has no place of its own.
    """
    file = address.file
    if file is None or address.artifacts is None or not file.is_file() or file.is_symlink():
        shown = f"{file}, a link to {file.resolve()}" if file and file.is_symlink() else file or redact(address.uri)
        raise SettingsError(f"{address.setting} must be a SQLite file with its mlruns/ beside it, got {shown}")
    said = []
    with closing(sqlite3.connect(file)) as database, database:
        known = database.execute("SELECT experiment_id, name, artifact_location FROM experiments").fetchall()
        for number, name, location in known:
            old, new = _foreign(address, location or "", str(number)), address.artifacts / str(number)
            if old is None:
                continue
            moved = _relocate(database, number, new.as_uri())
            said.append(f"experiment {name}: files are now sought and kept in {new} (before: {old})")
            said += _missing_files(moved, old, new)
    yield from said or [f"nothing to do: every experiment of {file} keeps its files in {address.artifacts}"]


def _relocate(database: sqlite3.Connection, number: int, folder: str) -> list[str]:
    """Name ``folder`` as the place of an experiment and of its runs; return the ids of those that were elsewhere."""
    database.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?", (folder, number))
    known = database.execute("SELECT run_uuid, artifact_uri FROM runs WHERE experiment_id = ?", (number,)).fetchall()
    places = {run_id: f"{folder}/{run_id}/artifacts" for run_id, _ in known}
    moved = [run_id for run_id, uri in known if uri != places[run_id] and uri.endswith(f"/{number}/{run_id}/artifacts")]
    database.executemany("UPDATE runs SET artifact_uri = ? WHERE run_uuid = ?", [(places[i], i) for i in moved])
    return moved


def _missing_files(run_ids: list[str], old: Path, new: Path) -> Iterator[str]:
    """Say of which runs the files are not in the folder ``new``, and how to bring those that are in ``old``."""
    lacking = [run_id for run_id in run_ids if not (new / run_id).is_dir()]
    there = [run_id for run_id in lacking if (old / run_id).is_dir()]
    if there:
        new.mkdir(parents=True, exist_ok=True)
        copy = shlex.join(["cp", "-rn", f"{old}/.", str(new)])
        yield (
            f"  files of {counted(len(there), 'run')} (of {len(run_ids)}) are in the old place alone; "
            f"to bring them: {copy}"
        )
    if len(lacking) > len(there):
        yield f"  files of {counted(len(lacking) - len(there), 'run')} (of {len(run_ids)}) are in neither place"

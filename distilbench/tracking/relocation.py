"""Whose folder an experiment's files go to: MLflow fixes it, as an absolute path, when the experiment is made."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from distilbench.settings import SettingsError
from distilbench.tracking.mlflow_tables import relocate_experiments
from distilbench.tracking.redaction import redact
from distilbench.tracking.uri import StoreAddress

if TYPE_CHECKING:
    from mlflow.entities import Experiment


def foreign_folder(address: StoreAddress, experiment: Experiment) -> str | None:
    """Say in one line that an experiment's files are not beside its store but beside another; None if they are fine."""
    folder = address.foreign_folder(experiment.artifact_location, str(experiment.experiment_id))
    if folder is None:
        return None
    store = "" if address.is_default else f" {shlex.quote(address.uri)}"
    mend = f"make them its own (python -m distilbench.tracking relocate{store})" if address.file else "move it back"
    return (
        f"tracking.experiment must keep its files beside its store, in {address.artifacts}, got {experiment.name!r} "
        f"with {folder} (a copied, moved or renamed checkout?); {mend}, or name another experiment"
    )


def relocate(address: StoreAddress) -> Iterator[str]:
    """Have a SQLite store keep its files beside itself, those of old runs too; yield lines that say what was done.

    Files are not touched. Raises :class:`SettingsError` for a store that has no place of its own.
    """
    file = address.file
    if file is None or address.artifacts is None or not file.is_file() or file.is_symlink():
        shown = f"{file}, a link to {file.resolve()}" if file and file.is_symlink() else file or redact(address.uri)
        raise SettingsError(f"{address.setting} must be a SQLite file with its mlruns/ beside it, got {shown}")
    found = relocate_experiments(address, address.artifacts)
    for name, old, new, run_ids in found:
        yield f"experiment {name}: files are now sought and kept in {new} (before: {old})"
        lacking = [run_id for run_id in run_ids if not (new / run_id).is_dir()]
        there = [run_id for run_id in lacking if (old / run_id).is_dir()]
        if there:
            new.mkdir(parents=True, exist_ok=True)
            copy = shlex.join(["cp", "-rn", f"{old}/.", str(new)])
            yield f"  {len(there)} of its {len(run_ids)} runs have files in the old place alone; to bring them: {copy}"
        if len(lacking) > len(there):
            yield f"  {len(lacking) - len(there)} of its {len(run_ids)} runs have files in neither place"
    if not found:
        yield f"nothing to do: every experiment of {file} keeps its files in {address.artifacts}"

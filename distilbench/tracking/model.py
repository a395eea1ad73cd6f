"""The model that a run left: where it is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from distilbench.results import MODEL, read_record
from distilbench.settings import SettingsError

if TYPE_CHECKING:
    from distilbench.tracking.store import MlflowStore


def model_directory(store: MlflowStore, run_id: str) -> Path:
    """Return the directory of a trial's saved model; raises :class:`SettingsError` where the trial left none."""
    import yaml

    directory = Path(yaml.safe_load(store.config(run_id))["output"]["dir"])
    record = read_record(directory)
    if record is not None and record.run_id != run_id:
        raise SettingsError(
            f"run must have its directory to itself, got {run_id!r}, whose {directory} another trial has written to "
            "since; train it again"
        )
    if not (directory / MODEL / "config.json").is_file():
        raise SettingsError(
            f"run must have a saved model, got {run_id!r} with none in {directory / MODEL} (output.save_model=false, "
            "pruned, failed, or removed since); train it again with output.save_model=true"
        )
    return directory / MODEL

"""Run sweeps as processes in temporary folders, and read their study, records and MLflow runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from tests.commands import Process, Workspace

HERE = Path(__file__).resolve().parent
TINY = ("model=tiny", "data=synthetic", "train.epochs=1")


class SweepWorkspace(Workspace):
    """A folder in which sweeps run: over a task of milliseconds, or if ``real`` over tiny trials with MLflow."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.log = path / "finished.log"

    def start(self, *arguments: str, real: bool = False, **options: Any) -> Process:
        program = {} if real else {"program": HERE / "quick_task.py"}
        tracking = () if real else ("tracking=none",)
        defaults = {"COLUMNS": "160", "FINISHED_LOG": str(self.log)} | program
        return super().start("--multirun", *TINY, *tracking, *arguments, **defaults | options)

    def sweep(self, name: str) -> Path:
        return self.path / "outputs" / "sweeps" / name

    def study(self, name: str, suffix: str = "", url: str | None = None) -> list[optuna.trial.FrozenTrial]:
        url = url or f"sqlite:///{self.sweep(name)}/study.db"
        return optuna.load_study(study_name=name + suffix, storage=url).trials

    def states(self, name: str) -> Counter[str]:
        return Counter(trial.state.name for trial in self.study(name))

    def record(self, name: str, trial: object) -> dict:
        return json.loads((self.sweep(name) / str(trial) / "trial.json").read_text())

    def finished(self) -> list[tuple[str, str]]:
        """Return (directory, settings) of each trial that the quick task finished, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(line.split()[0], line.split()[1]) for line in lines]


@pytest.fixture
def workspace(tmp_path) -> Iterator[SweepWorkspace]:
    workspace = SweepWorkspace(tmp_path)
    yield workspace
    workspace.end()

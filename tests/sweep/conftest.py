"""Sweeps as subprocesses in folders of their own, and what they left in study, records and MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import optuna
import pytest

HERE = Path(__file__).resolve().parent
TINY = ("model=tiny", "data=synthetic", "train.epochs=1")


class Workspace:
    """A folder in which sweeps run: ``quick`` over a task of milliseconds, ``real`` over tiny trials with MLflow."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.uri = f"sqlite:///{path}/mlflow.db"
        self.log = path / "finished.log"

    def start(self, *arguments: str, real: bool = False, terminal: int | None = None,
              **environment: str) -> subprocess.Popen[str]:  # fmt: skip
        program = ["-m", "distilbench.train"] if real else [str(HERE / "quick_task.py")]
        tracking = () if real else ("tracking=none",)
        command = [sys.executable, *program, "--multirun", *TINY, *tracking, *arguments]
        env = os.environ | {"MLFLOW_TRACKING_URI": self.uri, "OMP_NUM_THREADS": "1", "COLUMNS": "160",
                            "FINISHED_LOG": str(self.log), "PYTHONPATH": str(HERE.parents[1])}  # fmt: skip
        return subprocess.Popen(
            command, cwd=self.path, env=env | environment, text=True, stdout=terminal or subprocess.PIPE,
            stderr=terminal or subprocess.PIPE,
        )  # fmt: skip

    def run(self, *arguments: str, real: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*arguments, real=real, **environment)
        out, err = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

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
        """(directory, settings) of each trial that the quick task finished, in order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [(line.split()[0], line.split()[1]) for line in lines]

    def runs(self) -> list:
        from mlflow import MlflowClient

        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("distilbench")
        return client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)

"""What a sweep tells the job of one trial.

The sweep's process writes ``job.json`` into the trial's directory and names it in the job's environment, which every
launcher carries over; the job answers through ``trial.json``. Nothing else passes between the two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from distilbench.results import Owner, read_record
from distilbench.settings import AppSettings

ENVIRONMENT = "DISTILBENCH_SWEEP_JOB"
"""Names the ``job.json`` of the trial that a job is to train."""

JOB = "job.json"

NOBODY: dict[str, object] = {"protocol": None, "treatment": None, "seed": None}
"""Identity of a trial whose sources have not been looked at yet."""

_GOES_UP = ("accuracy", "f1", "mcc")


@dataclass(frozen=True)
class SweepJob:
    """One trial as its sweep sees it."""

    sweep: str
    trial: str
    """Its directory below the sweep's, by which people call it."""
    name: str
    """What varies in the sweep."""
    overrides: tuple[str, ...]
    """The command line that makes its settings."""
    is_baseline: bool
    parent_run_id: str | None
    owner: Owner
    """The process that runs the sweep."""
    directory: Path
    objectives: tuple[str, ...]
    storage: str
    """Optuna's storage, with study and trial in it. Interpolations such as ``${oc.env:NAME}`` stand in it unresolved,
    since a password would be written to disk."""
    study: str
    trial_id: int
    grace_seconds: int
    """``sweep.grace_seconds``."""
    is_quiet: bool = False
    """Whether the job shows nothing of its own, since others run beside it."""
    prunes: bool = False
    """Whether the trial may be stopped on the way."""
    picks: bool = False
    """Whether the sweep picks one of several settings."""
    continues: Path | None = None
    """Directory of the interrupted trial that this one takes up."""

    @property
    def number(self) -> int:
        """Its number in its study."""
        return int(self.directory.name)

    @property
    def run_name(self) -> str:
        """What its runs are called, its number first; a baseline beside the space has none that tables show."""
        return f"{self.trial} {self.name}" if self.trial.isdigit() else self.name

    @property
    def sweep_directory(self) -> Path:
        """The directory of the whole sweep."""
        return self.directory.parents[len(Path(self.trial).parts) - 1]

    @property
    def tags(self) -> dict[str, str]:
        """What each run of this trial is found by."""
        role = {"distilbench.role": "baseline"} if self.is_baseline else {}
        return {"distilbench.sweep": self.sweep, "distilbench.trial": self.trial} | role

    def write(self) -> None:
        """Write ``job.json`` into the trial's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / JOB).write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def from_environment(cls) -> SweepJob | None:
        """Read the trial that this job was launched for; None outside of our sweeps."""
        path = os.environ.get(ENVIRONMENT)
        return cls.read(Path(path)) if path else None

    @classmethod
    def read(cls, path: Path) -> SweepJob:
        """Read the ``job.json`` that :meth:`write` wrote."""
        content = json.loads(path.read_text())
        lists = {name: tuple(content[name]) for name in ("objectives", "overrides")}
        paths = {name: content[name] and Path(content[name]) for name in ("directory", "continues")}
        return cls(**content | lists | paths | {"owner": Owner(**content["owner"])})

    def reached(self) -> tuple[float, ...]:
        """Return the trial's objectives as ``trial.json`` tells them at its end, NaN if it has none."""
        record = read_record(self.directory)
        assert record is not None  # written by whatever trained the trial
        return tuple(record.objective(name) for name in self.objectives)


def directions_of(objectives: Sequence[str]) -> list[str]:
    """Return ``maximize`` or ``minimize`` for each objective."""
    return ["maximize" if name in _GOES_UP else "minimize" for name in objectives]


def objectives_of(settings: AppSettings, alone: bool) -> tuple[str, ...]:
    """Return what a sweep with these settings optimises; its ``cost`` is seconds where trials run ``alone``."""
    cost = "train_seconds" if alone else "train_flops"
    return tuple(cost if name == "cost" else name for name in settings.sweep.objectives or [settings.train.metric])

"""``trial.json``: what a trial's directory says of it, to whichever process reads it, whatever became of its own."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from distilbench.results import METRICS_KEPT, Status, TrialResult

RECORD = "trial.json"
PREDICTIONS = "predictions.parquet"
_CLOCK_SECONDS = 2.0
"""How far two readings of one process's start time may lie apart: the system's clock is set now and then."""


@dataclass(frozen=True)
class Owner:
    """A process, told apart from any other by host, pid and the time at which it started (seconds since 1970)."""

    host: str
    pid: int
    started: float

    @classmethod
    def of_this_process(cls) -> Owner:
        """The process that asks."""
        import psutil

        return cls(socket.gethostname(), os.getpid(), round(psutil.Process().create_time(), 2))

    @property
    def is_local(self) -> bool:
        """Whether it ran on this host, where one can see whether it lives."""
        return self.host == socket.gethostname()

    def is_dead(self, take_over: bool = False) -> bool:
        """Whether the process is known to be gone; ``take_over`` says so of those on every other host."""
        import psutil

        if not self.is_local:
            return take_over
        try:
            process = psutil.Process(self.pid)
            reused = abs(process.create_time() - self.started) > _CLOCK_SECONDS
            return reused or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True)
class Record:
    """A trial as its directory tells of it.

    ``identity`` is protocol, treatment and seed. ``scores`` are the kept epoch's on the report split, ``selection``
    those on the split that picked it, each by name; both are empty where a trial has no result. ``figures`` is what
    else a trial amounts to: seconds, counts, rates.
    """

    identity: Mapping[str, object]
    status: Status
    owner: Owner
    run_id: str | None = None
    error: str | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    selection: Mapping[str, float] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def is_over(self) -> bool:
        """Whether the trial came to an end of its own."""
        return self.status not in (Status.RUNNING, Status.INTERRUPTED)

    def objective(self, name: str) -> float:
        """The value that a sweep optimises; NaN where there is none.

        The time of a trial that shared the device with others is what it would take alone, as far as that is known.
        """
        known = {**self.figures, **self.selection}
        if name == "train_seconds" and "solo_seconds_estimate" in known:
            return known["solo_seconds_estimate"]
        return float(known.get(name, "nan"))

    def with_result(self, result: TrialResult, figures: Mapping[str, float]) -> Record:
        """The record of a trial that ended so."""
        kept = {"scores": result.report, "selection": result.selection}
        scores = {name: {k: float(getattr(e, k)) for k in METRICS_KEPT} if e else {} for name, e in kept.items()}
        return Record(self.identity, result.status, self.owner, self.run_id, result.error, figures=figures, **scores)

    def write(self, directory: Path) -> None:
        """Replace the file at once, so that a kill leaves the old or the new one."""
        content = {**self.identity, "run_id": self.run_id, "status": self.status, "error": self.error, **self.scores,
                   "selection": self.selection, "figures": self.figures, "owner": asdict(self.owner)}  # fmt: skip
        directory.mkdir(parents=True, exist_ok=True)
        partial = directory / f"{RECORD}.{os.getpid()}.partial"
        partial.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(partial, directory / RECORD)


def read_record(directory: Path) -> Record | None:
    """What stands in ``directory``; None where no trial has begun there, or a loss of power cut its record short."""
    try:
        content: dict[str, Any] = json.loads((directory / RECORD).read_text())
        return Record(
            identity={key: content[key] for key in ("protocol", "treatment", "seed")},
            status=Status(content["status"]),
            owner=Owner(**content["owner"]),
            run_id=content["run_id"],
            error=content["error"],
            scores={key: content[key] for key in METRICS_KEPT if key in content},
            selection=content["selection"],
            figures=content["figures"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""What a sweep tells the job of one trial.

The sweep's process writes ``job.json`` into the trial's directory and names it in the job's environment, which every
launcher carries over; the job answers through ``trial.json``. Nothing else passes between the two.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from distilbench.results import Owner, Record, Status, read_record
from distilbench.settings import AppSettings
from distilbench.tracking import SWEEP, TRIAL

log = logging.getLogger(__name__)


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
    """Optuna's storage, with the trial in it. Interpolations such as ``${oc.env:NAME}`` stand in it unresolved,
    since a password would be written to disk."""
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
        return {SWEEP: self.sweep, TRIAL: self.trial} | role

    def write(self) -> None:
        """Write ``job.json`` into the trial's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / JOB).write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def from_environment(cls) -> SweepJob | None:
        """Read the trial that this job was launched for; None outside of our sweeps."""
        path = os.environ.get(ENVIRONMENT)
        if path is None:
            return None
        content = json.loads(Path(path).read_text())
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


class Orphaned(RuntimeError):
    """The sweep that launched this job is gone, or has closed its trial."""


@contextmanager
def beating(beat: Callable[[], object], seconds: float) -> Iterator[None]:
    """Call ``beat`` every so many seconds, in a thread of its own, until the block is left; a first time at once.

    The thread is not waited for: a storage that hangs would hold up the end of a trial.
    """
    left = threading.Event()

    def go_on() -> None:
        beat()
        while not left.wait(seconds):
            beat()

    threading.Thread(target=go_on, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        left.set()


class Lease:
    """A trial as the job that trains it has it: for as long as no other process has taken it over."""

    def __init__(self, job: SweepJob) -> None:
        self._job = job
        self._is_silent = False
        self.is_lost = False
        """What the study said when it was last asked."""

    def announce(self) -> None:
        """Say in ``trial.json`` that this process works on the trial.

        Raises :class:`Orphaned` where it waited for so long that its sweep is dead, or another has taken the trial.
        """
        job = self._job
        if (job.owner.pid != os.getpid() and job.owner.is_dead()) or not self.holds():
            raise Orphaned(f"the sweep {job.sweep} went on without trial {job.trial} before it began; run it again")
        found = read_record(job.directory)  # of this very job, which Slurm has put back into its queue
        begun = found if found and not found.is_over else Record(NOBODY, Status.RUNNING, job.owner)
        replace(begun, status=Status.RUNNING, owner=Owner.of_this_process(), error=None).write(job.directory)

    def holds(self) -> bool:
        """Ask the study whether the trial is still this job's; one that does not answer takes nothing away."""
        from omegaconf.errors import OmegaConfBaseException

        from distilbench.sweep.storage import UNANSWERED, storage_of
        from distilbench.tracking.retries import reason_of

        try:
            storage = storage_of(self._job.storage, self._job.grace_seconds)
            trial = storage.get_trial(self._job.trial_id)
            is_owned = trial.user_attrs.get("owner") == asdict(self._job.owner)
            self.is_lost = trial.state.is_finished() or not is_owned
            if not self.is_lost:
                storage.record_heartbeat(self._job.trial_id)
        except (*UNANSWERED, OmegaConfBaseException) as error:
            if not self._is_silent:
                log.warning("the study of trial %s does not answer here (%s): its heart can't beat",
                            self._job.trial, reason_of(error))  # fmt: skip
            self._is_silent = True
        return not self.is_lost

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Have the trial's heart beat while the block lasts."""
        from distilbench.sweep.storage import beat_seconds

        with beating(self.holds, beat_seconds(self._job.grace_seconds)):
            yield

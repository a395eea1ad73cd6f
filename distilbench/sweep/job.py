"""What a sweep passes to the job that trains one trial.

The sweep's process writes ``job.json`` into the trial's directory and its path into the job's environment, which every
launcher passes on; the job answers through ``trial.json``. Beyond that, the two share only the study.
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
from distilbench.tracking.search import PARENT_TAG, SWEEP_TAG, TRIAL_TAG

log = logging.getLogger(__name__)

JOB_VARIABLE = "DISTILBENCH_SWEEP_JOB"
"""Environment variable with the path of the job's ``job.json``."""

JOB = "job.json"

UNRESOLVED_IDENTITY: dict[str, object] = {"protocol": None, "treatment": None, "seed": None}
"""Identity of a trial whose sources have not been resolved yet."""


@dataclass(frozen=True)
class SweepJob:
    """One trial of a sweep, with all that its job needs to know."""

    sweep: str
    trial: str
    """Its directory relative to the sweep's, which also identifies it in messages."""
    name: str
    """What the sweep varies, with this trial's values: ``layers=3 scheduler=cosine``."""
    overrides: tuple[str, ...]
    """The Hydra overrides that give its settings."""
    is_baseline: bool
    parent_run_id: str | None
    owner: Owner
    """The process that runs the sweep."""
    directory: Path
    objectives: tuple[str, ...]
    storage: str
    """URL of the Optuna storage that holds the trial. Interpolations such as ``${oc.env:NAME}`` stay unresolved,
    since a password would be written to disk."""
    trial_id: int
    grace_seconds: int
    """``sweep.grace_seconds``."""
    is_quiet: bool = False
    """Whether the job prints nothing, since others run at the same time."""
    prunes: bool = False
    """Whether the trial may be pruned."""
    is_selection: bool = False
    """Whether the sweep selects one of several settings."""
    continues: Path | None = None
    """Directory of the interrupted trial that this one continues."""

    @property
    def run_name(self) -> str:
        """Name of its MLflow runs: number and name; without the number for a baseline outside of the search space."""
        return f"{self.trial} {self.name}" if self.trial.isdigit() else self.name

    @property
    def tags(self) -> dict[str, str]:
        """MLflow tags that identify the runs of this trial."""
        role = {"distilbench.role": "baseline"} if self.is_baseline else {}
        parent = {PARENT_TAG: self.parent_run_id} if self.parent_run_id else {}
        return {SWEEP_TAG: self.sweep, TRIAL_TAG: self.trial} | role | parent

    def write(self) -> None:
        """Write ``job.json`` into the trial's directory."""
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / JOB).write_text(json.dumps(asdict(self), indent=2, default=str) + "\n")

    @classmethod
    def from_environment(cls) -> SweepJob | None:
        """Read the job that this process was launched for; None outside of distilbench's own sweepers."""
        path = os.environ.get(JOB_VARIABLE)
        if path is None:
            return None
        content = json.loads(Path(path).read_text())
        lists = {name: tuple(content[name]) for name in ("objectives", "overrides")}
        paths = {name: content[name] and Path(content[name]) for name in ("directory", "continues")}
        return cls(**content | lists | paths | {"owner": Owner(**content["owner"])})

    def final_objectives(self) -> tuple[float, ...]:
        """Return the trial's final objectives from ``trial.json``, NaN if it has none."""
        record = read_record(self.directory)
        assert record is not None  # written by whatever trained the trial
        return tuple(record.objective(name) for name in self.objectives)


def directions_of(objectives: Sequence[str]) -> list[str]:
    """Return ``maximize`` or ``minimize`` for each objective."""
    return ["maximize" if name in ("accuracy", "f1", "mcc") else "minimize" for name in objectives]


def objectives_of(settings: AppSettings, alone: bool) -> tuple[str, ...]:
    """Return the objectives of a sweep; ``cost`` stands for seconds if trials run ``alone``, otherwise for FLOPs."""
    cost = "train_seconds" if alone else "train_flops"
    return tuple(cost if name == "cost" else name for name in settings.sweep.objectives or [settings.train.metric])


class Orphaned(RuntimeError):
    """The sweep that launched this job is gone, or has closed its trial."""


BEATS_PER_GRACE = 6
"""Heartbeats in the time after which a silent trial counts as dead: a single lost or late one does no harm."""


@contextmanager
def send_heartbeats(beat: Callable[[], object], grace_seconds: int) -> Iterator[None]:
    """Call ``beat`` at once and then regularly, in a thread of its own, until the block ends.

    The thread is not joined: a storage that hangs would delay the end of a trial.
    """
    left = threading.Event()

    def go_on() -> None:
        beat()
        while not left.wait(max(1, grace_seconds // BEATS_PER_GRACE)):
            beat()

    threading.Thread(target=go_on, name="heartbeat", daemon=True).start()
    try:
        yield
    finally:
        left.set()


class Lease:
    """A job's claim to its trial, which ends when another process takes the trial over."""

    def __init__(self, job: SweepJob) -> None:
        self._job = job
        self._is_silent = False
        self.is_lost = False
        """Whether the claim had ended when the study was last read."""

    def announce(self) -> None:
        """Record in ``trial.json`` that this process works on the trial.

        Raises :class:`Orphaned` if the sweep died before this job began, or if the trial was closed or taken over.
        """
        job = self._job
        if (job.owner.pid != os.getpid() and job.owner.is_dead()) or not self.holds():
            raise Orphaned(f"the sweep {job.sweep} went on without trial {job.trial} before it began; run it again")
        found = read_record(job.directory)  # by an earlier start of this job, if Slurm requeued it
        begun = found if found and not found.is_final else Record(UNRESOLVED_IDENTITY, Status.RUNNING, job.owner)
        replace(begun, status=Status.RUNNING, owner=Owner.of(), error=None).write(job.directory)

    def holds(self) -> bool:
        """Return whether the trial is still this job's, and send a heartbeat if so; an outage changes nothing."""
        from omegaconf.errors import OmegaConfBaseException

        from distilbench.sweep.storage import STORAGE_ERRORS, storage_of
        from distilbench.tracking.retries import reason_of

        try:
            storage = storage_of(self._job.storage, self._job.grace_seconds)
            trial = storage.get_trial(self._job.trial_id)
            is_owned = trial.user_attrs.get("owner") == asdict(self._job.owner)
            self.is_lost = trial.state.is_finished() or not is_owned
            if not self.is_lost:
                storage.record_heartbeat(self._job.trial_id)
        except (*STORAGE_ERRORS, OmegaConfBaseException, KeyError) as error:  # KeyError: the study was deleted
            if not self._is_silent:
                log.warning("the study of trial %s does not answer here (%s): its heart can't beat",
                            self._job.trial, reason_of(error))  # fmt: skip
            self._is_silent = True
        return not self.is_lost

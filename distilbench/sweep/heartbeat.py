"""Whose a trial is, across hosts: its heart beats in the study while somebody is at work on it.

Optuna keeps the beats and says whose heart stood still for longer than ``sweep.grace_seconds``; whoever finds such a
trial closes it and tries it again. A process that was frozen for so long finds out, before it writes anything, that
the trial is no longer its own.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from distilbench.results import Owner, Record, Status, read_record
from distilbench.sweep.job import NOBODY, SweepJob

log = logging.getLogger(__name__)


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
                            self._job.trial, " ".join(str(error).split())[:200])  # fmt: skip
            self._is_silent = True
        return not self.is_lost

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Have the trial's heart beat while the block lasts."""
        from distilbench.sweep.storage import beat_seconds

        with beating(self.holds, beat_seconds(self._job.grace_seconds)):
            yield

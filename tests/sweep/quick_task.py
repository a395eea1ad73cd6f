"""The real command line and sweeper over a task of milliseconds that behaves like a trial.

It announces itself, sleeps, and replaces ``trial.json`` at its end, as a trial does, but trains nothing. It appends
each finished trial to ``finished.log`` as one line, so that tests need not rely on study and records; the last word of
the line is the CPU time of the process in seconds.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from pathlib import Path

import hydra
from omegaconf import DictConfig

from distilbench.cli import run_command
from distilbench.results import Owner, Record, Status
from distilbench.settings import CONF, register_schema, settings_from
from distilbench.sweep.job import Lease, SweepJob, send_heartbeats

register_schema()
if host := os.environ.get("TASK_HOST"):  # simulate another host by its name
    assert ctypes.CDLL(None).unshare(0x04000000) == 0  # CLONE_NEWUTS
    socket.sethostname(host)
SECONDS = float(os.environ.get("TASK_SECONDS", "0.1"))
LOG = Path(os.environ["FINISHED_LOG"])
MEET = int(os.environ.get("TASK_MEET", "0"))
"""Number of trials that must have begun before the first of them ends."""
KILLED = os.environ.get("TASK_KILLED", "")
"""Number of frozen layers of the trials whose process is killed."""
LAST = int(os.environ.get("TASK_LAST", "0"))
"""Number of other trials that must have finished before trial 0 ends."""


def take_time(job: SweepJob) -> None:
    """Wait for as long as a trial would train."""
    time.sleep(SECONDS)
    while len(list(job.directory.parent.glob("*/trial.json"))) < MEET:
        time.sleep(0.05)
    while job.directory.name == "0" and LAST and len(LOG.read_text().splitlines() if LOG.exists() else ()) < LAST:
        time.sleep(0.05)


@hydra.main(config_path=str(CONF), config_name="config", execution_whitelist=["distilbench.composition.CheckFirst"])
def main(config: DictConfig) -> float:
    job = SweepJob.from_environment()
    assert job is not None
    lease = Lease(job)
    lease.announce()
    settings = settings_from(config)
    accuracy = 1 / (1 + settings.optim.lr) - 0.01 * settings.freeze.layers
    treatment = f"{settings.freeze.layers}/{settings.optim.lr}"
    identity = {"protocol": "quick", "treatment": treatment, "seed": settings.seed}
    record = Record(identity, Status.RUNNING, Owner.of())
    try:
        with send_heartbeats(lease.holds, job.grace_seconds):
            take_time(job)
            if str(settings.freeze.layers) == KILLED:
                os.kill(os.getpid(), signal.SIGKILL)
        if not lease.holds():
            return accuracy
        status = Status.DIVERGED if settings.optim.lr > 1 else Status.FINISHED
        scores = {"accuracy": accuracy, "loss": 1 - accuracy}
        error = "the loss was nan" if status is Status.DIVERGED else None
        figures = {"train_seconds": SECONDS, "train_flops": 1e12 * (6 - settings.freeze.layers)}
        Record(identity, status, record.owner, None, error, scores, scores, figures).write(job.directory)
    except KeyboardInterrupt:
        Record(identity, Status.INTERRUPTED, record.owner, None, "interrupted").write(job.directory)
        raise
    with LOG.open("a") as log:
        log.write(f"{job.trial} {treatment}/{settings.seed} {time.process_time():.3f}\n")
    return accuracy


if __name__ == "__main__":
    run_command(main)

"""The results of trials: the records that engines write and reports read, and ``trial.json``."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


class Status(StrEnum):
    """The state of a trial; the same words in MLflow, in the study and in tables."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    PRUNED = "PRUNED"
    DIVERGED = "DIVERGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"
    WAITING = "WAITING"
    """Queued in a sweep."""
    REUSED = "REUSED"
    """Not trained: takes the result of another trial of the sweep with the same settings."""


class Verdict(StrEnum):
    """The outcome of comparing a treatment with the baseline; the same words in MLflow and in tables."""

    BETTER = "better"
    AHEAD = "ahead"
    """Better, but on the split that also selected it: to be confirmed with fresh seeds."""
    GOOD_ENOUGH = "good enough"
    """The loss of accuracy is shown to be below the margin."""
    WORSE = "worse"
    UNDECIDED = "undecided"


MEASURES = ("accuracy", "loss", "f1", "mcc", "brier", "ece")
"""What an evaluation measures."""
STORED_METRICS = (*MEASURES, "epoch")
"""What is stored of an evaluation, besides its predictions."""


@dataclass(frozen=True)
class StepRecord:
    """The logged values of one optimisation step. ``loss`` is the mean since the previous record."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    examples_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split: mean cross-entropy, metrics in [0, 1] (MCC in [-1, 1]) and predictions.

    ``logits`` is ``(examples, labels)`` float32 in the split's order, or None if the evaluation was restored from a
    checkpoint. F1 is binary for two labels (the second is positive); for more, it is macro over those in the split.
    ``brier`` is the mean squared error of the probabilities (in [0, 1] for two labels, [0, 2] for more), ``ece`` their
    expected calibration error; both NaN if restored from a checkpoint of a version that did not measure them.
    """

    split: str
    step: int
    epoch: float
    loss: float
    accuracy: float
    f1: float
    mcc: float
    brier: float = math.nan
    ece: float = math.nan
    logits: np.ndarray | None = None

    def metric(self, name: str) -> float:
        """Return the value of one of :data:`MEASURES`."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class TrialResult:
    """What an engine returns for one trial, however it ended.

    ``selection`` is the best evaluation on the selection split, ``report`` that of the same weights on the report
    split (the same object if one split does both); both are None if the trial ended before its first evaluation.
    ``history`` holds all evaluations on the selection split in order. Seconds are wall time: ``train_seconds`` covers
    optimisation steps and the evaluations between them, without checkpoints; ``train_cpu_seconds`` is the process's
    CPU time over the same period, summed over all threads, None unless trained on a CPU; ``setup_seconds`` is the time
    before the first step, including attempts that ran out of memory. ``train_flops`` counts only the optimisation steps
    (:mod:`distilbench.models.flops`); ``peak_memory_bytes`` is that of the device or, on a CPU, the process's resident
    set. ``micro_batch_size`` is the final micro-batch size, if it was smaller than the batch.

    For trials that were trained together: ``num_trials_in_batch`` counts them, including this one; ``batch_seconds`` is
    the wall time of the whole call, including set-up; ``solo_seconds_estimate`` is what ``train_seconds`` would have
    been for this trial alone, estimated from a probe.
    """

    status: Status
    error: str | None = None
    selection: Evaluation | None = None
    report: Evaluation | None = None
    history: tuple[Evaluation, ...] = ()
    steps: int = 0
    train_seconds: float = 0.0
    train_cpu_seconds: float | None = None
    train_flops: float = 0.0
    setup_seconds: float = 0.0
    examples_per_second: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    device: str = ""
    precision: str = ""
    micro_batch_size: int | None = None
    num_trials_in_batch: int = 1
    batch_seconds: float = 0.0
    solo_seconds_estimate: float | None = None


@dataclass(frozen=True)
class Predictions:
    """A trial's predictions on the report split: true ``labels`` (examples,) and ``logits`` (examples, labels).

    ``slices`` (examples,) str holds the values by which results are also reported; None without slices.
    """

    labels: np.ndarray
    logits: np.ndarray
    slices: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether each example was classified correctly, ``(examples,)`` bool."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)


BASELINE_ROLE = "baseline"
"""``StoredTrial.role`` of a sweep's baseline."""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as read from the store; missing figures are NaN.

    ``measured_on`` combines device, engine and library versions: times of two trials are comparable only if it is equal
    and both were trained ``alone`` (not in a batch); ``train_flops`` is always comparable. ``solo_seconds_estimate`` is
    the estimated time alone of a trial of a batch. ``model`` and ``data`` describe what was really used; ``metric`` and
    the two splits belong to the protocol; ``score`` is that metric on the selection split. ``role`` is
    :data:`BASELINE_ROLE` or empty, ``number`` the trial's number in the sweep named ``sweep``, ``url`` that of its run.
    ``choices`` are the groups' choices that it was typed with, and what differs from them; empty of earlier versions.
    ``is_compared``: the run has metrics against its baseline. ``train_cpu_seconds`` is NaN unless trained on a CPU.
    """

    run_id: str
    name: str
    protocol_id: str
    treatment: dict[str, object]
    seed: int
    status: Status
    accuracy: float
    loss: float
    train_seconds: float
    trainable_parameters: int
    measured_on: str
    alone: bool = True
    predictions: Predictions | None = None
    model: str = ""
    data: str = ""
    metric: str = "accuracy"
    selection_split: str = "validation"
    report_split: str = "validation"
    role: str = ""
    score: float = math.nan
    error: str = ""
    started_ms: int = 0
    url: str = ""
    train_cpu_seconds: float = math.nan
    train_flops: float = math.nan
    peak_memory_bytes: float = math.nan
    brier: float = math.nan
    ece: float = math.nan
    sweep: str = ""
    number: str = ""
    choices: Mapping[str, object] = field(default_factory=dict)
    is_compared: bool = False
    train_examples: int = 0
    solo_seconds_estimate: float = math.nan


RECORD = "trial.json"
PREDICTIONS = "predictions.parquet"
MODEL, ADAPTER = "model", "adapter"
"""Subdirectories of a trial's directory for its model and its adapter."""

_BOOT_SECONDS = 2.0
"""Tolerance between two readings of a start time: some systems give the time of boot in whole seconds, by the clock."""


@dataclass(frozen=True)
class Owner:
    """A process, identified by host, pid and start time (seconds since boot: since 1970, it moves with the clock)."""

    host: str
    pid: int
    started: float

    @classmethod
    def of(cls, pid: int | None = None) -> Owner:
        """Return the owner that stands for a process of this host, by default for the current one."""
        import psutil

        process = psutil.Process(pid)
        return cls(socket.gethostname(), process.pid, round(process.create_time() - psutil.boot_time(), 2))

    def is_dead(self) -> bool:
        """Return whether the process is known to have ended; False for other hosts, where this can't be known."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            reused = abs(Owner.of(self.pid).started - self.started) > _BOOT_SECONDS
            return reused or psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@dataclass(frozen=True)
class Record:
    """A trial as recorded in its directory, in ``trial.json``.

    ``identity`` holds protocol, treatment and seed. ``scores`` are the kept epoch's metrics on the report split,
    ``selection`` those on the selection split, by name; both are empty without a result. ``figures`` holds all other
    numbers: seconds, counts, rates.
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
    def is_final(self) -> bool:
        """Whether the trial ended other than by an interruption."""
        return self.status not in (Status.RUNNING, Status.INTERRUPTED)

    def objective(self, name: str) -> float:
        """Return the value of an objective of a sweep; NaN if there is none.

        ``train_seconds`` of a trial that was trained with others is the estimate of its time alone, if there is one.
        """
        known = {**self.figures, **self.selection}
        if name == "train_seconds" and "solo_seconds_estimate" in known:
            return known["solo_seconds_estimate"]
        return float(known.get(name, "nan"))

    def with_result(self, result: TrialResult, figures: Mapping[str, float]) -> Record:
        """Return the record of the trial after it ended with ``result``."""
        kept = {"scores": result.report, "selection": result.selection}
        scores = {name: {k: float(getattr(e, k)) for k in STORED_METRICS} if e else {} for name, e in kept.items()}
        return Record(self.identity, result.status, self.owner, self.run_id, result.error, figures=figures, **scores)

    def write(self, directory: Path) -> None:
        """Replace the file atomically, so that a kill leaves the old or the new one.

        If there is no space for a second file, overwrite the first in place.
        """
        content = {**self.identity, "run_id": self.run_id, "status": self.status, "error": self.error, **self.scores,
                   "selection": self.selection, "figures": self.figures, "owner": asdict(self.owner)}  # fmt: skip
        text = json.dumps(content, indent=2) + "\n"
        path = directory / RECORD
        try:
            with replace_file(path) as partial:
                partial.write_text(text)
        except OSError:
            if not path.is_file():
                raise
            with path.open("r+") as file:
                file.write(text)
                file.truncate()


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which replaces ``path`` if the block ends without an exception, and is removed if not.

    So a kill or a full disk leaves the old file or the new one; the folder is created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()


def read_record(directory: Path) -> Record | None:
    """Read the record in ``directory``; None if there is none, or if a power loss truncated it."""
    try:
        content: dict[str, Any] = json.loads((directory / RECORD).read_text())
        return Record(
            identity={key: content[key] for key in ("protocol", "treatment", "seed")},
            status=Status(content["status"]),
            owner=Owner(**content["owner"]),
            run_id=content["run_id"],
            error=content["error"],
            scores={key: content[key] for key in STORED_METRICS if key in content},
            selection=content["selection"],
            figures=content["figures"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None

"""What comes out of a trial and what is kept of it: the records that engines write and reports read."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np


class Status(StrEnum):
    """How a trial stands or ended; the same words in MLflow, in a study and in tables."""

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
    """Not trained: another trial of the sweep had the same settings, and its result is this one's."""


class Verdict(StrEnum):
    """What may be claimed of a treatment against the baseline; the same words in MLflow and in tables."""

    BETTER = "better"
    AHEAD = "ahead"
    """Better on a split that also chose it: to be confirmed with fresh seeds."""
    GOOD_ENOUGH = "good enough"
    """Its loss is shown to be below the margin."""
    WORSE = "worse"
    UNDECIDED = "undecided"


MEASURES = ("accuracy", "loss", "f1", "mcc", "brier", "ece")
"""What an evaluation measures."""
METRICS_KEPT = (*MEASURES, "epoch")
"""What is kept of an evaluation, beside its predictions."""


@dataclass(frozen=True)
class StepRecord:
    """What one logged optimisation step did. ``loss`` is the mean since the last record."""

    step: int
    steps: int
    epoch: float
    loss: float
    learning_rate: float
    gradient_norm: float
    examples_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """One pass over a split: mean cross-entropy, metrics in [0, 1] (MCC in [-1, 1]) and what was predicted.

    ``logits`` is ``(examples, labels)`` float32 in the split's order, or None where an evaluation was restored from a
    checkpoint. F1 is binary for two labels (the second is positive) and macro above, over those that the split has.
    ``brier`` is the mean squared error of the probabilities (in [0, 1] for two labels, [0, 2] above), ``ece`` their
    expected calibration error; NaN where a checkpoint was written before they were measured.
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
    """What an engine returns for one trial, whatever its end.

    ``selection`` is the best evaluation on the split that picks epochs, ``report`` the same weights on the split
    that reports (the same object where one split does both); both are None where a trial ended before its first
    evaluation. ``history`` holds all evaluations on the selection split in order. Seconds are wall time:
    ``train_seconds`` covers optimisation steps and evaluations on the way, without checkpoints; ``train_cpu_seconds``
    is the process's CPU time meanwhile, all threads added up, None unless it trained on a CPU; ``setup_seconds`` is
    what came before the first step, attempts that ran out of memory included. ``train_flops`` are those of the
    optimisation steps alone (:mod:`distilbench.models.flops`), ``peak_memory_bytes`` is the device's, or the process's
    resident set on a CPU. ``micro_batch_size`` counts the examples whose gradients were computed at once in the end,
    where those were fewer than a batch.

    A trial that was trained at once with others took part in all of their seconds: ``num_trials_in_batch`` counts them,
    itself included, ``batch_seconds`` is wall time of the call that trained them all, set-up included, and
    ``solo_seconds_estimate`` what ``train_seconds`` would have been alone, estimated from a probe.
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

    @property
    def alone(self) -> bool:
        """Whether the trial had the device to itself, so that its seconds are its own."""
        return self.num_trials_in_batch == 1


@dataclass(frozen=True)
class Predictions:
    """What a trial said of every example of the report split: ``labels`` (examples,), ``logits`` (examples, labels).

    ``slices`` (examples,) str are values by which results are also reported; None where there are none.
    """

    labels: np.ndarray
    logits: np.ndarray
    slices: np.ndarray | None = None

    @property
    def correct(self) -> np.ndarray:
        """Whether each example was classified correctly, ``(examples,)`` bool."""
        return np.asarray(self.logits.argmax(axis=1) == self.labels)


BASELINE_ROLE = "baseline"
"""``StoredTrial.role`` of the trial that a sweep compares its others with."""


@dataclass(frozen=True)
class StoredTrial:
    """A trial as it stands in the store, NaN where a figure is missing.

    ``measured_on`` joins device, engine and library versions: times of two trials are comparable only where it agrees
    and both were trained ``alone`` (not in a batch), ``train_flops`` always; ``solo_seconds_estimate`` is what one of a
    batch would have taken alone. ``model`` and ``data`` describe what was really used, ``metric`` and the two splits
    belong to the protocol; ``score`` is that metric on the selection split. ``role`` is what a sweep meant the trial
    for, ``number`` is its place in the ``sweep`` of that name, ``url`` opens its run, which ``is_compared`` if
    it tells the difference to its baseline. ``train_cpu_seconds`` is NaN
    unless it trained on a CPU.
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
    is_compared: bool = False
    train_examples: int = 0
    solo_seconds_estimate: float = math.nan


RECORD = "trial.json"

PREDICTIONS = "predictions.parquet"

MODEL, ADAPTER = "model", "adapter"
"""The directories, in a trial's own, of its model, and of its adapter."""

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
        """Return the process that asks."""
        import psutil

        return cls(socket.gethostname(), os.getpid(), round(psutil.Process().create_time(), 2))

    def is_dead(self) -> bool:
        """Whether the process is known to be gone; of those on other hosts nothing is."""
        import psutil

        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            reused = abs(process.create_time() - self.started) > _CLOCK_SECONDS
            return bool(reused or process.status() == psutil.STATUS_ZOMBIE)
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
        """Return the value that a sweep optimises; NaN where there is none.

        The time of a trial that shared the device with others is what it would take alone, as far as that is known.
        """
        known = {**self.figures, **self.selection}
        if name == "train_seconds" and "solo_seconds_estimate" in known:
            return known["solo_seconds_estimate"]
        return float(known.get(name, "nan"))

    def with_result(self, result: TrialResult, figures: Mapping[str, float]) -> Record:
        """Return the record of a trial that ended so."""
        kept = {"scores": result.report, "selection": result.selection}
        scores = {name: {k: float(getattr(e, k)) for k in METRICS_KEPT} if e else {} for name, e in kept.items()}
        return Record(self.identity, result.status, self.owner, self.run_id, result.error, figures=figures, **scores)

    def write(self, directory: Path) -> None:
        """Replace the file at once, so that a kill leaves the old or the new one.

        Where there is no room for a second file, the first is written over, which needs none.
        """
        content = {**self.identity, "run_id": self.run_id, "status": self.status, "error": self.error, **self.scores,
                   "selection": self.selection, "figures": self.figures, "owner": asdict(self.owner)}  # fmt: skip
        text = json.dumps(content, indent=2) + "\n"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / RECORD
        partial = directory / f"{RECORD}.{os.getpid()}.partial"
        try:
            partial.write_text(text)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)
            if not path.is_file():
                raise
            with path.open("r+") as file:
                file.write(text)
                file.truncate()


def read_record(directory: Path) -> Record | None:
    """Return what stands in ``directory``; None where no trial began, or a loss of power cut its record short."""
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

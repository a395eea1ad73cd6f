"""What comes out of a trial and what is kept of it: the records that engines write and reports read."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from enum import StrEnum

import numpy as np

from distilbench.settings import TrialSettings


class Status(StrEnum):
    """How a trial stands or ended; the same words in MLflow, in a study and in tables."""

    RUNNING = "RUNNING"
    FINISHED = "FINISHED"
    PRUNED = "PRUNED"
    DIVERGED = "DIVERGED"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    INTERRUPTED = "INTERRUPTED"
    FAILED = "FAILED"


METRICS_KEPT = ("accuracy", "loss", "f1", "mcc", "epoch")
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
    checkpoint. F1 is binary for two labels (the second is positive) and macro above.
    """

    split: str
    step: int
    epoch: float
    loss: float
    accuracy: float
    f1: float
    mcc: float
    logits: np.ndarray | None = None

    def metric(self, name: str) -> float:
        """The value of ``accuracy``, ``f1``, ``mcc`` or ``loss``."""
        return float(getattr(self, name))


@dataclass(frozen=True)
class TrialResult:
    """What an engine returns for one trial, whatever its end.

    ``selection`` is the best evaluation on the split that picks epochs, ``report`` the same weights on the split
    that reports (the same object where one split does both); both are None where a trial ended before its first
    evaluation. ``history`` holds all evaluations on the selection split in order. Seconds are wall time:
    ``train_seconds`` covers optimisation steps and evaluations on the way, without checkpoints; ``setup_seconds`` what
    came before the first step, attempts that ran out of memory included. ``peak_memory_bytes`` is the device's, or the
    process's resident set on a CPU. ``micro_batch_size`` counts the examples whose gradients were computed at once in
    the end, where those were fewer than a batch.

    A trial that was trained at once with others took part in all of their seconds: ``batch_size`` counts them, itself
    included, ``batch_seconds`` is wall time of the call that trained them all, set-up included, and
    ``solo_seconds_estimate`` what ``train_seconds`` would have been alone, estimated from a probe.
    """

    status: Status
    error: str | None = None
    selection: Evaluation | None = None
    report: Evaluation | None = None
    history: tuple[Evaluation, ...] = ()
    steps: int = 0
    train_seconds: float = 0.0
    setup_seconds: float = 0.0
    examples_per_second: float = 0.0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    trainable_parameters: int = 0
    total_parameters: int = 0
    device: str = ""
    precision: str = ""
    micro_batch_size: int | None = None
    batch_size: int = 1
    batch_seconds: float = 0.0
    solo_seconds_estimate: float | None = None

    @property
    def alone(self) -> bool:
        """Whether the trial had the device to itself, so that its seconds are its own."""
        return self.batch_size == 1


@dataclass(frozen=True)
class SourceUsed:
    """The text or the weights that were really used.

    ``kind`` is the source's kind (hub, package, ...), ``name`` what a person calls it, ``revision`` a commit or a
    version where there is one, ``fingerprint`` a sha256 of the content itself. ``fallback_for`` names what was asked
    for where this is a fallback.
    """

    kind: str
    name: str
    fingerprint: str
    revision: str | None = None
    fallback_for: str | None = None

    def describe(self) -> str:
        """One line for people, saying so where this stands in for something else."""
        version = f" ({self.revision[:12]})" if self.revision else ""
        instead = f", FALLBACK for {self.fallback_for}" if self.fallback_for else ""
        return f"{self.name}{version}{instead}"


@dataclass(frozen=True)
class ProtocolIdentity:
    """What must be equal for two trials to be comparable at all; ``id`` names it in twelve hexadecimal digits."""

    model: SourceUsed
    data: SourceUsed
    metric: str
    selection_split: str
    report_split: str

    @property
    def id(self) -> str:
        """A digest of contents, not of names: the same text from two places is the same protocol."""
        return digest((self.model.fingerprint, self.data.fingerprint, self.metric, self.selection_split,
                       self.report_split))  # fmt: skip


_TREATMENT_OF_TRAIN = ("epochs", "batch_size", "max_length", "eval_steps")


def treatment_of(settings: TrialSettings, precision: str) -> dict[str, object]:
    """What a sweep may vary within a protocol, flat and without the seed; ``precision`` is the one really used."""
    flat = {
        f"{group}.{f.name}": getattr(getattr(settings, group), f.name)
        for group in ("freeze", "scheduler", "optim")
        for f in fields(getattr(settings, group))
    }
    flat["freeze.embeddings"] = settings.freeze.freezes_embeddings
    return (
        flat | {f"train.{k}": getattr(settings.train, k) for k in _TREATMENT_OF_TRAIN} | {"train.precision": precision}
    )


def digest(value: object) -> str:
    """Twelve hexadecimal digits of the sha256 of ``value`` as canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=asdict).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Predictions:
    """What a trial said of every example of the report split: ``labels`` (examples,), ``logits`` (examples, labels)."""

    labels: np.ndarray
    logits: np.ndarray

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
    and both were trained ``alone`` (not in a batch). ``model`` and ``data`` describe what was really used, ``metric``
    and the two splits belong to the protocol; ``score`` is that metric on the selection split. ``role`` is what a sweep
    meant the trial for, ``url`` opens its run.
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

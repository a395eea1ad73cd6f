"""The state of a trial in training, shared by all engines: evaluations, timing, observer calls and result."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, brier_score_loss, f1_score, matthews_corrcoef

from distilbench.cli import is_disk_full
from distilbench.data.hub import first_line
from distilbench.data.tokens import EncodedSplits
from distilbench.engines import checkpoints
from distilbench.engines.base import TrialObserver
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.checkpoints import TrainingState
from distilbench.engines.device import peak_memory
from distilbench.models.flops import TrainFlops
from distilbench.results import Evaluation, Status, StepRecord, TrialResult
from distilbench.settings import SettingsError, TrialSettings

log = logging.getLogger(__name__)

_MEMORY_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")

SMALLER_BATCH_MESSAGE = "out of memory: going on with train.micro_batch_size=%d, added up to the same batch"
"""Logged when a trial continues with smaller micro-batches."""


class TrialEnded(Exception):
    """Raised to end a trial before its last step; the message is one line for the user."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def outcome_of(error: Exception, settings: TrialSettings) -> tuple[Status, str]:
    """Return the trial status for an exception, and a one-line message that says what to change.

    An unexpected error means FAILED; its traceback is logged.
    """
    if isinstance(error, TrialEnded):
        return error.status, str(error)
    if isinstance(error, SettingsError):
        return Status.FAILED, str(error)
    # CUDA has an exception class for it; the CPU's allocator and MPS raise a RuntimeError
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_MESSAGES)
    if said or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return Status.OUT_OF_MEMORY, (
            f"out of memory ({first_line(error)}); lower train.max_length (now "
            f"{settings.train.max_length}), freeze more layers, or take a smaller model"
        )
    if is_disk_full(error):
        return Status.FAILED, "the disk is full; make room, then add train.resume=true to continue"
    log.error("the trial failed", exc_info=error)
    return Status.FAILED, f"{type(error).__name__}: {first_line(error)}"


class Lap(NamedTuple):
    """Wall time, and CPU time of all threads of this process; both in seconds."""

    seconds: float
    cpu_seconds: float


class Stopwatch:
    """Measure consecutive laps."""

    def __init__(self, began: float) -> None:
        """Start the first lap: wall time from ``began``, a value of ``time.perf_counter``, CPU time from now."""
        self._seconds, self._cpu_seconds = began, time.process_time()

    def lap(self) -> Lap:
        """Return the time since the last call, and start the next lap."""
        seconds, cpu_seconds = time.perf_counter(), time.process_time()
        lap = Lap(seconds - self._seconds, cpu_seconds - self._cpu_seconds)
        self._seconds, self._cpu_seconds = seconds, cpu_seconds
        return lap

    def exclude(self, seconds: float) -> None:
        """Exclude ``seconds`` of wall time from the current lap."""
        self._seconds += seconds


CALIBRATION_BINS = 15
"""As in Guo et al. (2017, arXiv 1706.04599)."""


def evaluate_logits(name: str, logits: np.ndarray, labels: np.ndarray, step: int, epoch: float) -> Evaluation:
    """Return the measures of ``logits`` (examples, labels) float32 against ``labels`` (examples,)."""
    predicted = logits.argmax(axis=1)
    # macro-average over the classes that occur in the split, also if others are predicted
    average, classes = ("binary", None) if logits.shape[1] == 2 else ("macro", np.unique(labels))
    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)  # (examples, labels)
    probabilities = np.exp(log_probabilities)
    names = np.arange(logits.shape[1])
    is_finite = bool(np.isfinite(probabilities).all())  # otherwise the loss shows that the trial diverged
    return Evaluation(
        split=name,
        step=step,
        epoch=epoch,
        loss=float(-log_probabilities[np.arange(len(labels)), labels].mean()),
        accuracy=float(accuracy_score(labels, predicted)),
        f1=float(f1_score(labels, predicted, labels=classes, average=average, zero_division=0.0)),
        mcc=float(matthews_corrcoef(labels, predicted)),
        brier=float(brier_score_loss(labels, probabilities, labels=names)) if is_finite else math.nan,
        ece=expected_calibration_error(probabilities, labels) if is_finite else math.nan,
        logits=logits,
    )


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean gap between the predicted label's probability and its accuracy over bins, 0 to 1.

    ``probabilities`` is (examples, labels). The measure is that of Naeini et al. (2015, AAAI), but with bins of equally
    many examples by rank of confidence, as Nixon et al. (2019, arXiv 1904.01685) advise: with bins of equal width,
    nearly all examples of a fine-tuned model fall into the last.
    """
    confidence = probabilities.max(axis=1)  # (examples,)
    excess = confidence - (probabilities.argmax(axis=1) == labels)
    bins = np.array_split(excess[np.argsort(confidence, kind="stable")], CALIBRATION_BINS)
    return float(sum(abs(part.sum()) for part in bins) / len(labels))


@dataclass
class RunningTrial:
    """The state of a trial in training, except its weights.

    ``about`` holds fields of :class:`TrialResult`: device, precision and parameter counts. ``flops`` holds the FLOPs
    by the step from which they apply, empty until the model is built. ``report`` is the evaluation of the best weights
    on the report split, if that is not the selection split.
    """

    index: int
    settings: TrialSettings
    splits: EncodedSplits
    observer: TrialObserver
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    about: dict[str, Any] = field(default_factory=dict)
    flops: Mapping[int, TrainFlops] = field(default_factory=dict)
    progress: TrainingState = field(default_factory=TrainingState)
    identity: dict[str, object] = field(default_factory=dict)
    report: Evaluation | None = None
    setup_seconds: float = 0.0

    @cached_property
    def schedule(self) -> BatchSchedule:
        """Its batch schedule."""
        return BatchSchedule.of(self.settings.train, len(self.splits.train))

    @property
    def folder(self) -> Path:
        """The directory of its checkpoints."""
        return Path(self.settings.output.dir) / checkpoints.DIRECTORY

    @property
    def best_index(self) -> int:
        """The index in the history of the best evaluation by ``train.metric``, the first one in case of ties."""
        history, train = self.progress.history, self.settings.train
        sign = -1 if train.metric == "loss" else 1
        return max(range(len(history)), key=lambda i: sign * history[i].metric(train.metric))

    @property
    def best(self) -> Evaluation:
        """The best evaluation so far."""
        return self.progress.history[self.best_index]

    @property
    def is_over(self) -> bool:
        """Whether no step is left, or none of the last ``train.patience`` evaluations was better than those before."""
        history, patience = self.progress.history, self.settings.train.patience
        is_out_of_patience = patience and history and len(history) - 1 - self.best_index >= patience
        return self.progress.step == self.schedule.steps or bool(is_out_of_patience)

    def resume_or_start(self, weights: str) -> Path | None:
        """Return the checkpoint to resume from and load its progress, or remove old checkpoints and return None.

        ``weights`` is the fingerprint of the initial weights.
        """
        self.identity = checkpoints.identity_of(self.settings, self.splits, weights, self.about["precision"])
        resume = self.settings.train.resume
        found = checkpoints.find_latest(self.folder, self.identity) if resume else None
        if found is None:
            if resume:
                log.info("nothing to resume in %s: starting from scratch", self.folder.parent)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None
        path, self.progress = found
        log.info("continuing after step %d of %d", self.progress.step, self.schedule.steps)
        return path

    def record(self, step: int, lap: Lap, loss: float, learning_rate: float, gradient_norm: float) -> None:
        """Report the steps since the last record to the observer; raises :class:`TrialEnded` for a non-finite loss."""
        progress, schedule = self.progress, self.schedule
        before, progress.step = progress.step, step
        progress.step_seconds += lap.seconds
        self._add_lap(lap)
        self._require_finite(loss, "training")
        rate = (schedule.num_examples_seen(step) - schedule.num_examples_seen(before)) / lap.seconds
        epoch = step / schedule.steps_per_epoch
        told = StepRecord(step, schedule.steps, epoch, loss, learning_rate, gradient_norm, rate)
        self.observer.on_step(self.index, told)

    def evaluate(self, logits: np.ndarray, lap: Lap) -> bool:
        """Evaluate the selection split's ``logits``, report it, and return whether it is the best so far.

        Raises :class:`TrialEnded` for a non-finite loss, and if the observer prunes the trial.
        """
        step, splits = self.progress.step, self.splits
        self._add_lap(lap)
        name = "validation" if splits.selection is splits.report else "selection"
        epoch = step / self.schedule.steps_per_epoch
        evaluation = evaluate_logits(name, logits, splits.selection.labels, step, epoch)
        self._require_finite(evaluation.loss, "validation")
        self.progress.history.append(evaluation)
        if self.observer.on_evaluation(self.index, evaluation):
            raise TrialEnded(Status.PRUNED, f"pruned after step {step} of {self.schedule.steps}")
        return self.best is evaluation

    def _add_lap(self, lap: Lap) -> None:
        self.progress.train_seconds += lap.seconds
        self.progress.train_cpu_seconds += lap.cpu_seconds
        self.sample_memory()

    def _require_finite(self, loss: float, kind: str) -> None:
        if not math.isfinite(loss):
            raise TrialEnded(
                Status.DIVERGED,
                f"the {kind} loss was {loss} at step {self.progress.step} of {self.schedule.steps}; lower optim.lr "
                f"(now {self.settings.optim.lr:g}), or warm up with scheduler.warmup_ratio=0.1",
            )

    def store_best(self, selection: np.ndarray | None, report: np.ndarray | None) -> None:
        """Store the best weights' logits: on the selection split if a checkpoint lacked them, and the report split."""
        if selection is not None:
            self.progress.history[self.best_index] = replace(self.best, logits=selection)
        if report is not None:
            labels, at = self.splits.report.labels, self.best
            self.report = evaluate_logits("validation", report, labels, at.step, at.epoch)

    def sample_memory(self) -> None:
        """Update the peak with the memory used now."""
        self.progress.peak_memory_bytes = max(self.progress.peak_memory_bytes, peak_memory(self.device))

    def end(self, status: Status, error: str | None, micro_batch: int) -> TrialResult:
        """Return the trial's result; ``micro_batch`` is the number of examples per forward pass.

        Checkpoints are removed unless the trial may be resumed.
        """
        checkpoints.remove_stale(self.folder, status)
        progress, train, lengths = self.progress, self.settings.train, np.diff(self.splits.train.offsets)
        best = self.best if progress.history else None
        ends = sorted({progress.step, *(step for step in self.flops if step < progress.step)})
        seen = {step: self.schedule.example_counts(self.settings.seed, step) for step in ends}
        flops = sum(self.flops[start].total(lengths, seen[stop] - seen[start]) for start, stop in pairwise(ends))
        trained = max((self.flops[start].trained for start in ends[:-1]), default=0)
        about = self.about | ({"trainable_parameters": trained} if trained else {})
        times, seconds = seen[progress.step], progress.step_seconds
        return TrialResult(
            status,
            error,
            selection=best,
            report=best if self.splits.selection is self.splits.report else self.report,
            history=tuple(progress.history),
            steps=progress.step,
            train_seconds=progress.train_seconds,
            train_cpu_seconds=progress.train_cpu_seconds if self.device.type == "cpu" else None,
            train_flops=flops,
            setup_seconds=self.setup_seconds,
            examples_per_second=float(times.sum()) / seconds if seconds else 0.0,
            tokens_per_second=float(times @ lengths) / seconds if seconds else 0.0,
            peak_memory_bytes=progress.peak_memory_bytes,
            micro_batch_size=micro_batch if micro_batch < train.batch_size else None,
            **about,
        )

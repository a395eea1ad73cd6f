"""How a trial ends, in the same words and figures from every engine."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import torch

from distilbench.data.tokens import EncodedSplits
from distilbench.engines.checkpoints import Progress
from distilbench.engines.evaluation import best_of
from distilbench.engines.steps import BatchSchedule
from distilbench.models.flops import TrainFlops
from distilbench.results import Evaluation, Status, TrialResult
from distilbench.settings import SettingsError, TrialSettings

log = logging.getLogger(__name__)

_MEMORY_MESSAGES = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")

SMALLER = "out of memory: going on with train.micro_batch_size=%d, added up to the same batch"
"""Said where a trial goes on with fewer rows at once."""


class TrialEnded(Exception):
    """A trial is over before its last step; the message is one line for the user."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def require_finite(loss: float, kind: str, step: int, steps: int, settings: TrialSettings) -> None:
    """Raise :class:`TrialEnded` with DIVERGED where the ``kind`` loss (training or validation) is not finite."""
    if not math.isfinite(loss):
        raise TrialEnded(
            Status.DIVERGED,
            f"the {kind} loss was {loss} at step {step} of {steps}; lower optim.lr (now {settings.optim.lr:g}), "
            "or warm up with scheduler.warmup_ratio=0.1",
        )


def outcome_of(error: Exception, settings: TrialSettings) -> tuple[Status, str]:
    """Return the status that an exception inside a trial stands for, and one line that says what to change.

    An error that nobody foresaw is FAILED; its traceback goes to the log.
    """
    if isinstance(error, TrialEnded):
        return error.status, str(error)
    if isinstance(error, SettingsError):
        return Status.FAILED, str(error)
    first_line = (str(error).splitlines() or [""])[0]
    # CUDA has a class for it; the CPU's allocator and MPS say it in a RuntimeError
    said = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _MEMORY_MESSAGES)
    if said or isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        train = settings.train
        return Status.OUT_OF_MEMORY, (
            f"out of memory ({first_line or type(error).__name__}); lower train.max_length (now {train.max_length}), "
            "freeze more layers, or take a smaller model"
        )
    log.error("the trial failed", exc_info=error)
    return Status.FAILED, f"{type(error).__name__}: {first_line}"


def result_of(
    progress: Progress,
    outcome: tuple[Status, str | None],
    settings: TrialSettings,
    splits: EncodedSplits,
    report: Evaluation | None,
    flops: Mapping[int, TrainFlops],
) -> TrialResult:
    """Return what a trial's ``progress`` amounts to, but for what belongs to the device, which the engine adds.

    ``report`` is the kept weights' evaluation on a report split of its own, ``flops`` what an example costs from a step
    on, nothing for a trial that ended before its model was there.
    """
    train, lengths = settings.train, np.diff(splits.train.offsets)
    best = progress.history[best_of(progress.history, train)] if progress.history else None
    schedule = BatchSchedule(len(lengths), train.batch_size, train.epochs)
    ends = sorted({progress.step, *(step for step in flops if step < progress.step)})
    seen = {step: schedule.times_seen(settings.seed, step) for step in ends}
    times = seen[progress.step]
    seconds = progress.step_seconds
    return TrialResult(
        *outcome,
        selection=best,
        report=best if splits.selection is splits.report else report,
        history=tuple(progress.history),
        steps=progress.step,
        train_seconds=progress.train_seconds,
        train_flops=sum(flops[start].total(lengths, seen[stop] - seen[start]) for start, stop in pairwise(ends)),
        examples_per_second=float(times.sum()) / seconds if seconds else 0.0,
        tokens_per_second=float(times @ lengths) / seconds if seconds else 0.0,
        peak_memory_bytes=progress.peak_memory_bytes,
    )

"""How a trial ends, in the same words from every engine."""

from __future__ import annotations

import logging
import math

import torch

from distilbench.results import Status
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

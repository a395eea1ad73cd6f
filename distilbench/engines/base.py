"""The protocols of an engine and of the observer that follows its trials."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distilbench.data.tokens import EncodedSplits
from distilbench.results import Evaluation, StepRecord, TrialResult
from distilbench.settings import TrialSettings


class TrialObserver(Protocol):
    """Callbacks during training; ``trial`` is the position in the sequence given to the engine."""

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Receive a logged optimisation step."""

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Receive an evaluation on the selection split; return whether to stop the trial here (PRUNED)."""

    def wants_checkpoint(self) -> bool:
        """Return, after every step, whether to write a checkpoint now because the process is about to end."""

    def on_checkpoint(self) -> None:
        """Continue once the requested checkpoint is written, or checkpoints are off; usually raises to end training."""


class Engine(Protocol):
    """Train trials. Engines may differ in speed, but in results only by rounding.

    An exception inside one trial becomes the status and error of its result and does not affect the others;
    KeyboardInterrupt propagates.
    """

    def train(
        self, trials: Sequence[TrialSettings], splits: EncodedSplits, observer: TrialObserver
    ) -> list[TrialResult]:
        """Train every trial on ``splits``; results keep the order of ``trials``."""
        ...

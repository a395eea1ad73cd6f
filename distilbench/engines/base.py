"""The seam between what is to be trained and what trains it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distilbench.data.tokens import EncodedSplits
from distilbench.results import Evaluation, StepRecord, TrialResult
from distilbench.settings import TrialSettings


class TrialObserver(Protocol):
    """Receives what happens, as it happens; ``trial`` is the position in the sequence given to the engine."""

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Learn of a logged optimisation step."""

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Learn of an evaluation on the selection split; return whether the trial is to stop here (PRUNED)."""

    def wants_checkpoint(self) -> bool:
        """Say, after every step, whether to leave a checkpoint now, since the process is to end."""

    def on_checkpoint(self) -> None:
        """Learn that the checkpoint asked for is written, or unwanted; as a rule, end the training by an exception."""


class Engine(Protocol):
    """What trains trials. It may change speed, never results beyond rounding.

    Results keep the order of ``trials``. What goes wrong inside one trial becomes its result's status and error and
    leaves the others alone; KeyboardInterrupt passes through.
    """

    def train(
        self, trials: Sequence[TrialSettings], splits: EncodedSplits, observer: TrialObserver
    ) -> list[TrialResult]:
        """Train every trial on ``splits``; results keep the order of ``trials``."""
        ...

"""How long a trial will take, from its first steps; keeps nothing of them."""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace

from distilbench.engines import engine_for
from distilbench.results import Evaluation, Status, StepRecord
from distilbench.settings import AppSettings, SettingsError
from distilbench.trials import prepare

STEPS = 20
"""Steps that a prediction rests on: the first half warms up, the second is timed."""


def predicted_seconds(settings: AppSettings) -> float:
    """Predict a trial's ``train_seconds`` from its first steps and one evaluation.

    Raises :class:`SettingsError` for what a person can mend in its sources, and where those steps failed.
    """
    prepared = prepare(settings)
    steps = math.ceil(len(prepared.splits.train) / settings.train.batch_size)
    first = min(STEPS, steps)
    train = replace(settings.train, eval_steps=first, logging_steps=math.ceil(first / 2), checkpoints=False)
    probe = _Probe(settings.train.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        output = replace(settings.output, dir=folder, save_model=False)
        trial = replace(settings, train=train, output=output, model=prepared.model.settings).trial
        (result,) = engine_for(settings.engine).train([trial], prepared.splits, probe)
    if result.status is not Status.PRUNED:
        raise SettingsError(f"sweep.dry_run needs a trial that can begin, got {result.status}: {result.error}")
    every = settings.train.eval_steps or steps
    evaluation = max(0.0, result.train_seconds - probe.seconds)
    return settings.train.epochs * (steps * probe.seconds_per_step + math.ceil(steps / every) * evaluation)


class _Probe:
    """Times the first steps, and stops the trial at its first evaluation."""

    def __init__(self, batch_size: int) -> None:
        self._batch_size = batch_size
        self._step = 0
        self.seconds = 0.0
        """What all steps took."""
        self.seconds_per_step = 0.0
        """What the newest ones took, each."""

    def on_step(self, trial: int, record: StepRecord) -> None:
        """Take the time since the last record."""
        self.seconds_per_step = self._batch_size / record.examples_per_second
        self.seconds += (record.step - self._step) * self.seconds_per_step
        self._step = record.step

    def on_evaluation(self, trial: int, evaluation: Evaluation) -> bool:
        """Stop the trial."""
        return True

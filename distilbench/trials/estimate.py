"""Estimate how long a trial takes alone: a short run of the real training, scaled up."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np

from distilbench.data.tokens import EncodedSplits, random_part
from distilbench.engines import engine_for
from distilbench.engines.base import Engine, TrialObserver
from distilbench.engines.batches import BatchSchedule
from distilbench.engines.device import resolve_device
from distilbench.engines.moving_freeze import planned_levels
from distilbench.results import Status
from distilbench.settings import AppSettings, FreezeSettings, SettingsError, TrialSettings
from distilbench.trials.prepared import Prepared, prepared_trial

STEPS, GPU_STEPS = 8, 512
"""Optimisation steps of a probe. On two cores, a step of MiniLM takes 0.1-0.3 s. On a GPU, a step takes milliseconds
once it is recorded, which only a run with many steps does: a probe of eight steps predicted fifteen times too much.
"""


_STOP_AT_EVALUATION = cast(TrialObserver, SimpleNamespace(
    on_step=lambda *_: None, on_evaluation=lambda *_: True, wants_checkpoint=lambda: False, on_checkpoint=lambda: None
))  # fmt: skip
"""Ends a probe at its only evaluation, before the report split is evaluated."""


def estimate_alone(settings: AppSettings, prepared: Prepared) -> float:
    """Predict ``train_seconds`` of a trial that has the device to itself.

    With a freeze policy that changes what is frozen, the most and the fewest frozen levels are probed, and the estimate
    is interpolated at the mean; if gradients decide, nothing is assumed frozen. Raises :class:`SettingsError` if such a
    trial fails within its first steps.
    """
    engine, trial, splits = engine_for(prepared.engine), prepared_trial(settings, prepared), prepared.splits
    if not trial.freeze.is_dynamic:
        return solo_seconds(engine, trial, splits)
    schedule = BatchSchedule.of(trial.train, len(splits.train))
    planned = planned_levels(trial.freeze, schedule, top=prepared.model.depth + 1)
    mean = sum(np.diff([*planned, schedule.steps]) * [*planned.values()]) / schedule.steps
    ends = [min(planned.values()), max(planned.values())]
    still = [FreezeSettings(max(0, levels - 1), levels > 0, dropout=True, policy="depth") for levels in ends]
    return float(np.interp(mean, ends, [solo_seconds(engine, replace(trial, freeze=f), splits) for f in still]))


def solo_seconds(engine: Engine, settings: TrialSettings, splits: EncodedSplits) -> float:
    """Estimate ``train_seconds`` of a trial that ``engine`` trains alone.

    The probe trains on a few random batches and evaluates a proportional share of the selection split. It runs twice,
    and the second run counts: the first warms up libraries and caches. Raises :class:`SettingsError` if it fails.
    """
    probed, scale = _share_of(splits, settings)
    with tempfile.TemporaryDirectory() as directory:
        train = replace(settings.train, epochs=1, eval_steps=None, checkpoints=False, resume=False)
        output = replace(settings.output, dir=directory, save_model=False)
        short = replace(settings, train=train, output=output)
        for _ in range(2):
            (result,) = engine.train([short], probed, _STOP_AT_EVALUATION)
    if result.status is not Status.PRUNED:
        raise SettingsError(f"an estimate needs a trial that can begin, got {result.status}: {result.error}")
    return result.train_seconds * scale


def _share_of(splits: EncodedSplits, settings: TrialSettings) -> tuple[EncodedSplits, float]:
    """Return the splits of a probe, and the factor from its work to that of the whole trial."""
    train, rng = settings.train, np.random.default_rng(0)
    most = GPU_STEPS if resolve_device(settings.engine.device).type == "cuda" else STEPS
    examples = min(most * train.batch_size, len(splits.train))
    scale = train.epochs * len(splits.train) / examples
    evaluations = len(BatchSchedule.of(train, len(splits.train)).part_start_steps)
    evaluated = min(max(1, round(evaluations * len(splits.selection) / scale)), len(splits.selection))
    probed = replace(
        splits,
        train=random_part(splits.train, examples, rng),
        selection=random_part(splits.selection, evaluated, rng),
        # never evaluated, since the probe stops before: gives the model the vocabulary of the whole training text
        report=splits.train,
    )
    return probed, scale

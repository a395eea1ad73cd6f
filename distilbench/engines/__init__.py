"""Engines, which train trials: selection by the settings."""

from __future__ import annotations

from dataclasses import replace

from distilbench.engines.base import Engine
from distilbench.engines.fused.compatibility import check_fusable
from distilbench.models.resolve import ResolvedModel
from distilbench.settings import EngineSettings, SettingsError, TrialSettings


def engine_for(settings: EngineSettings) -> Engine:
    """Return the engine of ``settings``, whose name is no longer auto; only here are its libraries imported."""
    if settings.name == "fused":
        from distilbench.engines.fused.engine import FusedEngine

        return FusedEngine()
    from distilbench.engines.trainer import TrainerEngine

    return TrainerEngine()


def check_engine(trial: TrialSettings, model: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` if the trial's engine does not support its settings, model or precision.

    ``precision`` is the resolved one or the setting. Does not import torch.
    """
    if trial.engine.name == "fused":
        check_fusable(trial, model, precision)


def resolve_engine(trial: TrialSettings, model: ResolvedModel, precision: str, device: str) -> EngineSettings:
    """Return the engine's settings with auto resolved; raises as :func:`check_engine`.

    On MPS, auto means the reference engine: the fused one has been measured only on CPUs and CUDA devices.
    """
    check_engine(trial, model, precision)
    if trial.engine.name != "auto":
        return trial.engine
    try:
        check_fusable(trial, model, precision)
    except SettingsError:
        return replace(trial.engine, name="trainer")
    return replace(trial.engine, name="trainer" if device == "mps" else "fused")

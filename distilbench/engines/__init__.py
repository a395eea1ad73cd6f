"""What trains trials: one protocol, several engines."""

from __future__ import annotations

from dataclasses import replace

from distilbench.engines.base import Engine
from distilbench.engines.fused.compatibility import check_fusable
from distilbench.models.resolve import ResolvedModel
from distilbench.settings import EngineSettings, SettingsError, TrialSettings


def engine_for(settings: EngineSettings) -> Engine:
    """Return the engine that ``engine.name`` names, auto resolved; its libraries are imported here and not before."""
    if settings.name == "fused":
        from distilbench.engines.fused.engine import FusedEngine

        return FusedEngine()
    from distilbench.engines.trainer import TrainerEngine

    return TrainerEngine()


def check_engine(trial: TrialSettings, model: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` for a trial, a model or a precision that its engine does not train; needs no torch.

    ``precision`` is the one really used, or the one asked for.
    """
    if trial.engine.name == "fused":
        check_fusable(trial, model, precision)


def resolve_engine(trial: TrialSettings, model: ResolvedModel, precision: str, device: str) -> EngineSettings:
    """Return the engine with auto resolved for trial, model and kind of device; raises as :func:`check_engine`.

    On MPS, auto is the reference engine: the fused one has been measured on CPUs and on a CUDA device.
    """
    check_engine(trial, model, precision)
    if trial.engine.name != "auto":
        return trial.engine
    try:
        check_fusable(trial, model, precision)
    except SettingsError:
        return replace(trial.engine, name="trainer")
    return replace(trial.engine, name="trainer" if device == "mps" else "fused")

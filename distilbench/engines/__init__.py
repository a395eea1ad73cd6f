"""What trains trials: one protocol, several engines."""

from __future__ import annotations

from dataclasses import replace

from distilbench.engines.base import Engine
from distilbench.models.resolve import ResolvedModel
from distilbench.settings import EngineSettings, SettingsError


def _trainer() -> Engine:
    from distilbench.engines.trainer import TrainerEngine

    return TrainerEngine()


def _fused() -> Engine:
    from distilbench.engines.fused.engine import FusedEngine

    return FusedEngine()


_ENGINES = {"trainer": _trainer, "fused": _fused}


def engine_for(settings: EngineSettings) -> Engine:
    """Return the engine that ``engine.name`` names, auto resolved; its libraries are imported here and not before."""
    return _ENGINES[settings.name]()


def check_engine(settings: EngineSettings, model: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` for a model or a precision that the engine does not train; needs no torch."""
    if settings.name == "fused":
        from distilbench.engines.fused.compatibility import check_fusable

        check_fusable(model, precision)


def resolve_engine(settings: EngineSettings, model: ResolvedModel, precision: str, device: str) -> EngineSettings:
    """Return ``settings`` with auto resolved for model, precision and kind of device; raises as :func:`check_engine`.

    On other devices than a CPU, auto is the reference engine: the fused one has been measured on CPUs alone.
    """
    if settings.name != "auto":
        check_engine(settings, model, precision)
        return settings
    fused = replace(settings, name="fused")
    try:
        check_engine(fused, model, precision)
    except SettingsError:
        return replace(settings, name="trainer")
    return fused if device == "cpu" else replace(settings, name="trainer")

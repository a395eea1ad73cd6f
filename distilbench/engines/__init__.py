"""What trains trials: one protocol, several engines."""

from __future__ import annotations

from collections.abc import Hashable

from distilbench.engines.base import Engine
from distilbench.model import ResolvedModel
from distilbench.settings import EngineSettings, TrialSettings


def _trainer() -> Engine:
    from distilbench.engines.trainer import TrainerEngine

    return TrainerEngine()


def _fused() -> Engine:
    from distilbench.engines.fused import FusedEngine

    return FusedEngine()


_ENGINES = {"trainer": _trainer, "fused": _fused}


def engine_for(settings: EngineSettings) -> Engine:
    """The engine that ``engine.name`` names; its libraries are imported here and not before."""
    return _ENGINES[settings.name]()


def check_engine(settings: EngineSettings, model: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` for a model or a precision that the engine does not train; needs no torch."""
    if settings.name == "fused":
        from distilbench.engines.fusion import check_fusable

        check_fusable(model, precision)


def batch_key(settings: TrialSettings) -> Hashable | None:
    """What must be equal for trials to be trained at once; None where the engine trains one after another."""
    if settings.engine.name != "fused":
        return None
    from distilbench.engines.fusion import fusion_key

    return fusion_key(settings)

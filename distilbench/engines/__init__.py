"""What trains trials: one protocol, several engines."""

from __future__ import annotations

from distilbench.engines.base import Engine
from distilbench.settings import EngineSettings


def _trainer() -> Engine:
    from distilbench.engines.trainer import TrainerEngine

    return TrainerEngine()


_ENGINES = {"trainer": _trainer}


def engine_for(settings: EngineSettings) -> Engine:
    """The engine that ``engine.name`` names; its libraries are imported here and not before."""
    return _ENGINES[settings.name]()

"""Which trials the fused engine takes, and which of them may train at once; needs no torch."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from distilbench.identity import digest
from distilbench.models.resolve import ResolvedModel
from distilbench.settings import SettingsError, TrialSettings

ARCHITECTURES = ("distilbert", "bert")
"""Values of ``model_type`` whose encoder the fused engine knows."""

_REMEDY = "use engine=trainer"


def fusion_key(settings: TrialSettings) -> Hashable:
    """What must be equal for trials to train at once.

    That is model, data, freezing, optimizer's kind and all of ``train`` that shapes the loop. Free within a group are
    learning rate, weight decay, clipping and the optimizer's other numbers, the schedule, the seed (of head, dropout
    and order), the metric that keeps an epoch, and where the trial writes.
    """
    loop = replace(settings.train, metric="accuracy", checkpoints=False, resume=False)
    return digest((settings.model, settings.data, settings.freeze, settings.engine, loop, settings.optim.name))


def check_fusable(resolved: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` for a model or a precision that only the reference engine trains."""
    config = resolved.config
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise SettingsError(
            f"engine.name=fused needs an encoder of type {' or '.join(ARCHITECTURES)}, got {kind!r} "
            f"({resolved.used.name}); {_REMEDY}"
        )
    unusual = {
        "is_decoder": config.get("is_decoder") is True,
        "add_cross_attention": config.get("add_cross_attention") is True,
        "position_embedding_type": config.get("position_embedding_type") not in (None, "absolute"),
    }
    for name, present in unusual.items():
        if present:
            raise SettingsError(
                f"engine.name=fused needs a plain encoder, got {name}={config[name]!r} ({resolved.used.name}); "
                + _REMEDY
            )
    if precision == "fp16":
        raise SettingsError(f"train.precision must be fp32 or bf16 with engine.name=fused, got 'fp16'; {_REMEDY}")

"""Which trials the fused engine takes; needs no torch."""

from __future__ import annotations

from distilbench.models.resolve import ResolvedModel
from distilbench.settings import SettingsError, TrialSettings, require

ARCHITECTURES = ("distilbert", "bert")
"""Values of ``model_type`` whose encoder the fused engine knows."""

_REMEDY = "use engine=trainer"


def check_fusable(trial: TrialSettings, resolved: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` for a trial, a model or a precision that only the reference engine trains."""
    adapter, policy = trial.adapter.name, trial.freeze.policy
    require(policy != "auto", "freeze.policy", "any but auto with engine.name=fused", policy, _REMEDY)
    require(adapter == "none", "adapter.name", "none with engine.name=fused", adapter, _REMEDY)
    config = resolved.config
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise SettingsError(
            f"engine.name=fused needs an encoder of type {' or '.join(ARCHITECTURES)}, got {kind!r} "
            f"({resolved.used.name}); {_REMEDY}"
        )
    usual = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    for name, value in usual.items():
        if config.get(name) not in (None, value):
            raise SettingsError(
                f"engine.name=fused needs a plain encoder, got {name}={config[name]!r} ({resolved.used.name}); "
                + _REMEDY
            )
    if precision == "fp16":
        raise SettingsError(f"train.precision must be fp32 or bf16 with engine.name=fused, got 'fp16'; {_REMEDY}")

"""Which trials the fused engine supports; does not import torch."""

from __future__ import annotations

from distilbench.models.resolve import ResolvedModel
from distilbench.settings import TrialSettings, require

ARCHITECTURES = ("distilbert", "bert")
"""Values of ``model_type`` that the fused engine supports."""


def check_fusable(trial: TrialSettings, resolved: ResolvedModel, precision: str) -> None:
    """Raise :class:`SettingsError` if only the reference engine supports the trial, model or precision."""
    config, name = resolved.config, resolved.used.name

    def check(holds: bool, setting: str, allowed: str, value: str) -> None:
        require(holds, setting, f"{allowed} with engine.name=fused", value, "use engine=trainer")

    policy, adapter, kind = trial.freeze.policy, trial.adapter.name, config["model_type"]
    check(policy != "auto", "freeze.policy", "any but auto", policy)
    check(adapter == "none", "adapter.name", "none", adapter)
    check(kind in ARCHITECTURES, "model.checkpoint", f"of type {' or '.join(ARCHITECTURES)}", f"{kind} ({name})")
    usual = {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"}
    for key, value in usual.items():
        given = config.get(key)
        check(given in (None, value), "model.checkpoint", "a plain encoder", f"{key}={given!r} ({name})")
    check(precision != "fp16", "train.precision", "fp32 or bf16", precision)

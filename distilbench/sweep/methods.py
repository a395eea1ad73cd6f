"""The search space of ``search=methods``: one experiment per method, each with its own range of learning rates."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from distilbench.settings import SettingsError

RATES = {
    "full": (1e-5, 2e-4),
    "layer_freezing": (1e-5, 3e-4),
    "head": (3e-4, 1e-2),
    "bias": (2e-4, 5e-3),
    "lora": (2e-4, 5e-3),
    "ia3": (1e-3, 2e-2),
}
"""Experiment -> lowest and highest learning rate: few trained parameters need rates ten to a hundred times higher."""


def suggest_lr(config: DictConfig, trial: Any) -> None:
    """Suggest ``optim.lr`` in the range of the trial's experiment: Hydra's sweep syntax has no conditional ranges."""
    method = trial.params.get("experiment")
    if method not in RATES:
        raise SettingsError(
            f"experiment must be a choice of {', '.join(RATES)} with search=methods, got {method!r}; give what else is "
            "to hold as values, such as data.max_train_examples=2000"
        )
    trial.suggest_float("optim.lr", *RATES[method], log=True)

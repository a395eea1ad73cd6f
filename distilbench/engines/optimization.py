"""The loss, parameter groups, optimizers, and learning-rate factors as pure functions of the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from distilbench.models.freezing import parameter_levels
from distilbench.settings import OptimSettings, SchedulerSettings, TrainSettings, require

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

POLYNOMIAL_END_LR = 1e-7
"""The default ``lr_end`` of ``transformers.get_polynomial_decay_schedule_with_warmup``."""


def build_loss(
    settings: TrainSettings, labels: np.ndarray, num_labels: int, device: torch.device, dtype: torch.dtype
) -> nn.CrossEntropyLoss:
    """Return the loss of each example for a trial with training ``labels``; ``dtype`` is that of the logits.

    The loss of a batch is the mean over its examples, whatever their labels; torch's own would divide by the sum of the
    weights. Balanced weights are those of scikit-learn.
    """
    weight = None
    if settings.class_weights == "balanced":
        counts = np.bincount(labels, minlength=num_labels).clip(1)
        weight = torch.tensor(len(labels) / (num_labels * counts), dtype=dtype, device=device)
    return nn.CrossEntropyLoss(weight, reduction="none", label_smoothing=settings.label_smoothing)


def decay_parameter_names(model: nn.Module) -> set[str]:
    """Return the names of the parameters with weight decay: all but biases and normalisation layers.

    Mirrors ``transformers.Trainer.get_decay_parameter_names``.
    """
    return set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))


def lr_scale(level: int, top: int, layer_decay: float) -> float:
    """Return the learning-rate factor of parameters at ``level``, counted from the input; the head is at ``top``.

    As in BEiT (Bao et al., 2021, arXiv 2106.08254), each level below the head multiplies it by ``layer_decay`` again.
    """
    return float(layer_decay ** (top - level))


def parameter_groups(model: PreTrainedModel, settings: OptimSettings) -> list[dict[str, Any]]:
    """Return the trainable parameters by level, the head first, each level with and without weight decay.

    Parameters keep the model's order. Without layer decay, all are on one level.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed, groups = decay_parameter_names(model), []
    level_of = dict.fromkeys(dict(trainable), 0) if settings.layer_decay == 1 else parameter_levels(model)
    top = max(level_of.values())
    for level in sorted({level_of[name] for name, _ in trainable}, reverse=True):
        lr = settings.lr * lr_scale(level, top, settings.layer_decay)
        for decay in (True, False):
            own = [p for name, p in trainable if level_of[name] == level and (name in decayed) is decay]
            groups.append({"params": own, "lr": lr, "weight_decay": settings.weight_decay if decay else 0.0})
    return groups


def build_optimizer(model: PreTrainedModel, settings: OptimSettings) -> torch.optim.Optimizer:
    """Return an optimizer of the trainable parameters; the model must already be on its device."""
    groups, lr, betas = parameter_groups(model, settings), settings.lr, (settings.beta1, settings.beta2)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.eps, fused=True)


def lr_factors(settings: SchedulerSettings, steps: int, lr: float) -> np.ndarray:
    """Return the factor on the peak learning rate ``lr`` at each step, ``(steps,)`` float64.

    The values are those of ``transformers.get_scheduler``, with warm-up steps rounded as in
    ``TrainingArguments.get_warmup_steps``. Only ``polynomial`` depends on ``lr``: it ends at the absolute rate 1e-7;
    raises :class:`SettingsError` for an ``lr`` not above that.
    """
    if settings.name == "polynomial":
        require(lr > POLYNOMIAL_END_LR, "optim.lr", "above 1e-07 with scheduler=polynomial", lr, "raise optim.lr")
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_scheduler(settings.name, stand_in, settings.warmup(steps), steps)
    return np.array([schedule.lr_lambdas[0](step) for step in range(steps)], dtype=np.float64)

"""What training minimises, parameter groups, optimizers, and learning-rate factors as pure functions of the step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from distilbench.models.freezing import levels
from distilbench.settings import OptimSettings, SchedulerSettings, TrainSettings, require

_NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]

POLYNOMIAL_END_LR = 1e-7
"""Where ``transformers.get_polynomial_decay_schedule_with_warmup`` ends unless told otherwise."""


@dataclass(frozen=True)
class Loss:
    """Cross-entropy with smoothed targets (Szegedy et al., 2016, section 7) and ``class_weights`` (labels,)."""

    label_smoothing: float
    class_weights: torch.Tensor | None

    @classmethod
    def of(cls, settings: TrainSettings, labels: np.ndarray, num_labels: int, device: torch.device) -> Loss:
        """Return that of a trial on training ``labels``; balanced weights are those of scikit-learn.

        They stand on ``device``: a step that is recorded there may copy nothing from the host.
        """
        weights = None
        if settings.class_weights == "balanced":
            counts = np.bincount(labels, minlength=num_labels).clip(1)
            dtype = torch.float32 if device.type == "mps" else torch.float64
            weights = torch.tensor(len(labels) / (num_labels * counts), dtype=dtype, device=device)
        return cls(settings.label_smoothing, weights)

    @property
    def is_plain(self) -> bool:
        """Whether it is what Transformers' models compute by themselves."""
        return not self.label_smoothing and self.class_weights is None

    def of_each(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return what each example of ``logits`` (examples, labels) loses, ``(examples,)``.

        A batch's loss is the mean over its examples, so that each batch counts as much as its examples, whatever their
        labels; torch's own mean would divide by the sum of their weights.
        """
        weights = None if self.class_weights is None else self.class_weights.to(logits)
        return F.cross_entropy(logits, labels, weights, reduction="none", label_smoothing=self.label_smoothing)


def decay_parameter_names(model: nn.Module) -> set[str]:
    """Name the parameters that weight decay applies to: neither biases nor inside a normalisation layer.

    The rule is that of ``transformers.Trainer.get_decay_parameter_names``.
    """
    return set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY))


def lr_scale(level: int, top: int, layer_decay: float) -> float:
    """Return the factor on the learning rate of a parameter ``level`` steps from the input, where the head is ``top``.

    As in BEiT (Bao et al., 2021, arXiv 2106.08254): ``layer_decay`` for the last layer, and once more for each below.
    """
    return float(layer_decay ** (top - level))


def parameter_groups(model: PreTrainedModel, settings: OptimSettings) -> list[dict[str, Any]]:
    """Return the trainable parameters by level, the head's first, with weight decay and without, in the model's order.

    Without layer decay all are of one level.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed, groups = decay_parameter_names(model), []
    level_of = dict.fromkeys(dict(trainable), 0) if settings.layer_decay == 1 else levels(model)
    top = max(level_of.values())
    for level in sorted({level_of[name] for name, _ in trainable}, reverse=True):
        lr = settings.lr * lr_scale(level, top, settings.layer_decay)
        for decay in (True, False):
            own = [p for name, p in trainable if level_of[name] == level and (name in decayed) is decay]
            groups.append({"params": own, "lr": lr, "weight_decay": settings.weight_decay if decay else 0.0})
    return groups


def build_optimizer(model: PreTrainedModel, settings: OptimSettings) -> torch.optim.Optimizer:
    """Make the optimizer over the trainable parameters of a model that is on its device already."""
    groups, lr, betas = parameter_groups(model, settings), settings.lr, (settings.beta1, settings.beta2)
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=settings.eps, fused=True)


def lr_factors(settings: SchedulerSettings, steps: int, lr: float) -> np.ndarray:
    """Return the factor on the peak learning rate ``lr`` at each step, ``(steps,)`` float64.

    The values are those of ``transformers.get_scheduler``, warm-up rounded as ``TrainingArguments.get_warmup_steps``
    does. Only ``polynomial`` depends on ``lr``: it ends at 1e-7, not at a share of the peak; raises
    :class:`SettingsError` for a peak that is not above that.
    """
    if settings.name == "polynomial":
        require(lr > POLYNOMIAL_END_LR, "optim.lr", "above 1e-07 with scheduler=polynomial", lr, "raise optim.lr")
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_scheduler(settings.name, stand_in, settings.warmup(steps), steps)
    return np.array([schedule.lr_lambdas[0](step) for step in range(steps)], dtype=np.float64)

"""AdamW and SGD for stacked trials: each trial with its own settings, in the same kernels as torch's optimizers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.optimization import lr_scale
from distilbench.settings import OptimSettings


class StackedOptimizer:
    """An optimizer for all trials of ``weights``, each with its own ``settings``.

    ``moments``, as many as :func:`num_moments` returns, are ``(trials, size)`` each.

    Parameters are updated as by ``torch.optim.AdamW`` (decoupled weight decay) or ``torch.optim.SGD`` (an L2 term);
    weight decay excludes biases and norms.
    """

    def __init__(
        self, weights: StackedWeights, moments: Sequence[torch.Tensor], settings: Sequence[OptimSettings],
        first_steps: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """``first_steps`` is the first step that trains each level; empty if that is step 0 for all."""
        self.weights, self.moments, self.settings, self.first_steps = weights, moments, settings, first_steps

    @torch.no_grad()
    def step(self, number: int, lrs: Sequence[float]) -> torch.Tensor:
        """Clip each trial's gradient, take step ``number`` (from 1) with its lr, and return the norms (trials,).

        Clipping mirrors ``torch.nn.utils.clip_grad_norm_``: the factor is ``limit / (norm + 1e-6)`` if below 1.
        """
        norms = []
        for trial, (settings, lr) in enumerate(zip(self.settings, lrs, strict=True)):
            grads = (self.weights.grad_of(trial, chunk) for chunk, _ in self.weights.chunks())
            norms.append(torch.stack([grad.dot(grad) for grad in grads]).sum().sqrt())
            factor = _clipped(norms[-1], settings.max_grad_norm)
            for chunk, scale, before in self._chunks(settings):
                grad, divisor = self.weights.grad_of(trial, chunk), None
                if factor is not None and grad.dtype == torch.float32:
                    divisor = 1 / factor  # torch's kernels support grad_scale only in float32
                elif factor is not None:
                    grad.mul_(factor)
                decay = settings.weight_decay if chunk.start < self.weights.layout.decayed_end else 0.0
                moments = [moment[trial, chunk] for moment in self.moments]
                row = self.weights.flat_params[trial, chunk]
                _update(row, grad, moments, settings, number - before, lr * scale, decay, divisor)
                self.weights.refresh_compute_params(trial, chunk)
        return torch.stack(norms)

    def _chunks(self, settings: OptimSettings) -> Iterator[tuple[slice, float, int]]:
        """Yield parts of the parameters, each with its learning-rate factor and the first step that trains it."""
        layered = settings.layer_decay != 1
        for chunk, level in self.weights.chunks(by_level=layered or bool(self.first_steps)):
            scale = lr_scale(level, self.weights.layout.top, settings.layer_decay) if layered else 1.0
            yield chunk, scale, self.first_steps[level] if self.first_steps else 0


def _clipped(norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """Return the factor that clips a gradient of this ``norm``, or None for no clipping."""
    if not limit:
        return None
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if norm.device.type == "cpu" and not factor < 1:  # on a GPU, the test would synchronize
        return None
    return factor


def num_moments(settings: Sequence[OptimSettings]) -> int:
    """Return how many moments the optimizer of a group has."""
    return 2 if settings[0].name == "adamw" else int(any(s.momentum for s in settings))


def _update(
    flat_params: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor], settings: OptimSettings,
    number: int, lr: float, decay: float, divisor: torch.Tensor | None,
) -> None:  # fmt: skip
    """Take step ``number`` (from 1) with ``grad``, which torch's kernel first divides by ``divisor``."""
    common: dict[str, Any] = {
        "fused": True, "grad_scale": divisor, "lr": lr, "weight_decay": decay, "maximize": False,
    }  # fmt: skip
    if settings.name == "sgd":
        velocity = moments[0] if settings.momentum else None
        sgd([flat_params], [grad], [velocity], momentum=settings.momentum, dampening=0.0, nesterov=False, **common)
        return
    common |= {"beta1": settings.beta1, "beta2": settings.beta2, "eps": settings.eps, "amsgrad": False}
    mean, square = moments
    taken = torch.tensor(number - 1.0, device=flat_params.device)
    adamw([flat_params], [grad], [mean], [square], [], [taken], **common)


def untouched_factor(settings: OptimSettings, lrs: Sequence[float]) -> float:
    """Return the factor by which steps at ``lrs`` change a decayed weight that never has a gradient.

    AdamW multiplies by ``1 - lr * decay``. With SGD, the L2 term is chunk of the gradient and gathers momentum.
    """
    value, velocity = 1.0, 0.0
    for lr in lrs:
        if settings.name == "adamw":
            value *= 1 - lr * settings.weight_decay
        else:
            velocity = settings.momentum * velocity + settings.weight_decay * value
            value -= lr * velocity
    return value

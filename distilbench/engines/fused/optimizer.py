"""AdamW and SGD on the rows of a stack: each trial with its own numbers, in the same kernels as torch's optimizers."""

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
    """One step for all trials of ``weights``, each with ``settings`` of its own.

    ``moments`` are what it remembers, as many as :func:`num_moments` says, each like the rows ``(trials, size)``.

    A trial's row is updated as ``torch.optim.AdamW`` or ``torch.optim.SGD`` would: decoupled decay for the former, an
    L2 term for the latter, on all but biases and norms.
    """

    def __init__(
        self, weights: StackedWeights, moments: Sequence[torch.Tensor], settings: Sequence[OptimSettings],
        first_steps: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """``first_steps`` are those from which on each level is trained, where that is not 0 for all."""
        self.weights, self.moments, self.settings, self.first_steps = weights, moments, settings, first_steps

    @torch.no_grad()
    def step(self, number: int, lrs: Sequence[float]) -> torch.Tensor:
        """Clip each trial's gradient, take its step ``number`` (from 1) at its rate, and return the norms (trials,).

        Clipping mirrors ``torch.nn.utils.clip_grad_norm_``: by ``limit / (norm + 1e-6)`` where that is below 1.
        """
        norms = []
        for trial, (settings, lr) in enumerate(zip(self.settings, lrs, strict=True)):
            grads = (self.weights.grad_of(trial, part) for part, _ in self.weights.parts())
            norms.append(torch.stack([grad.dot(grad) for grad in grads]).sum().sqrt())
            factor = _clipped(norms[-1], settings.max_grad_norm)
            for part, scale, before in self._parts(settings):
                grad, divisor = self.weights.grad_of(trial, part), None
                if factor is not None and grad.dtype == torch.float32:
                    divisor = 1 / factor  # torch takes one in this precision alone
                elif factor is not None:
                    grad.mul_(factor)
                decay = settings.weight_decay if part.start < self.weights.layout.decayed_end else 0.0
                moments = [moment[trial, part] for moment in self.moments]
                row = self.weights.flat_params[trial, part]
                _update(row, grad, moments, settings, number - before, lr * scale, decay, divisor)
                self.weights.updated(trial, part)
        return torch.stack(norms)

    def _parts(self, settings: OptimSettings) -> Iterator[tuple[slice, float, int]]:
        """Yield parts of a flat vector, each with the factor on its learning rate and the steps before its first."""
        layered = settings.layer_decay != 1
        for part, level in self.weights.parts(by_level=layered or bool(self.first_steps)):
            scale = lr_scale(level, self.weights.layout.top, settings.layer_decay) if layered else 1.0
            yield part, scale, self.first_steps[level] if self.first_steps else 0


def _clipped(norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """Return what clipping multiplies a gradient of this ``norm`` by, or None where it does not."""
    if not limit:
        return None
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if norm.device.type == "cpu" and not factor < 1:  # elsewhere, asking would wait for the device
        return None
    return factor


def num_moments(settings: Sequence[OptimSettings]) -> int:
    """How many vectors like a row the optimizer of a group remembers."""
    return 2 if settings[0].name == "adamw" else int(any(s.momentum for s in settings))


def _update(
    flat_params: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor], settings: OptimSettings,
    number: int, lr: float, decay: float, divisor: torch.Tensor | None,
) -> None:  # fmt: skip
    """Take step ``number`` (from 1) with ``grad``, which torch's kernel divides by ``divisor`` on its way."""
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
    """Return what steps at ``lrs`` make of a decayed weight that never has a gradient, as a factor.

    AdamW multiplies by ``1 - lr * decay``. For SGD the L2 term is a gradient of its own and gathers momentum.
    """
    value, velocity = 1.0, 0.0
    for lr in lrs:
        if settings.name == "adamw":
            value *= 1 - lr * settings.weight_decay
        else:
            velocity = settings.momentum * velocity + settings.weight_decay * value
            value -= lr * velocity
    return value

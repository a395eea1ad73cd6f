"""AdamW and SGD on the rows of a stack: each trial with its own numbers, in the same kernels as torch's optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distilbench.engines.stacked import StackedWeights
from distilbench.settings import OptimSettings


class RowOptimizer:
    """One step for all trials of ``weights``, each with ``settings`` of its own.

    ``moments`` are what it remembers, as many as :func:`moments_needed` says, each like the rows ``(trials, size)``.

    A trial's row is updated as ``torch.optim.AdamW`` or ``torch.optim.SGD`` would: decoupled decay for the former, an
    L2 term for the latter, on all but biases and norms.
    """

    def __init__(
        self, weights: StackedWeights, moments: Sequence[torch.Tensor], settings: Sequence[OptimSettings]
    ) -> None:
        self.weights, self.moments, self.settings = weights, moments, settings

    @torch.no_grad()
    def step(self, number: int, rates: Sequence[float]) -> torch.Tensor:
        """Clip each trial's gradient, take its step ``number`` (from 1) at its rate, and return the norms (trials,).

        Clipping mirrors ``torch.nn.utils.clip_grad_norm_``: by ``limit / (norm + 1e-6)`` where that is below 1.
        """
        norms = []
        for trial, (settings, rate) in enumerate(zip(self.settings, rates, strict=True)):
            parts = self.weights.gradient_of(trial)
            norms.append(torch.stack([gradient.dot(gradient) for _, gradient in parts]).sum().sqrt())
            divisor = _clip(parts, norms[-1], settings.max_grad_norm)
            update = _adamw if settings.name == "adamw" else _sgd
            for decays, decay in ((True, settings.weight_decay), (False, 0.0)):
                state = [self._state(trial, *part) for part in parts if self._decays(part[0]) == decays]
                if state:
                    kinds = [list(kind) for kind in zip(*state, strict=True)]
                    update(kinds, settings, number, rate, decay, divisor)
            self.weights.updated(trial)
        return torch.stack(norms)

    def _decays(self, part: slice) -> bool:
        return bool(part.start < self.weights.rowmap.decayed)

    def _state(self, trial: int, part: slice, gradient: torch.Tensor) -> list[torch.Tensor]:
        """A part of a trial's row, its gradient and its moments, ``(elements,)`` each."""
        return [self.weights.rows[trial, part], gradient, *(moment[trial, part] for moment in self.moments)]


def _clip(parts: Sequence[tuple[slice, torch.Tensor]], norm: torch.Tensor, limit: float) -> torch.Tensor | None:
    """Clip the gradient, or return what torch's kernel is to divide it by, which saves a pass; that is in float32."""
    if not limit:
        return None
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if norm.device.type == "cpu" and not factor < 1:  # elsewhere, asking would wait for the device
        return None
    if norm.dtype == torch.float32:
        return 1 / factor
    for _, gradient in parts:
        gradient.mul_(factor)
    return None


def moments_needed(settings: Sequence[OptimSettings]) -> int:
    """How many vectors like a row the optimizer of a group remembers."""
    return 2 if settings[0].name == "adamw" else int(any(s.momentum for s in settings))


def _adamw(
    state: Sequence[list[torch.Tensor]], settings: OptimSettings, number: int, rate: float, decay: float,
    divisor: torch.Tensor | None,
) -> None:  # fmt: skip
    rows, gradients, means, squares = state
    adamw(
        rows,
        gradients,
        means,
        squares,
        [],
        [torch.tensor(number - 1.0, device=row.device) for row in rows],
        fused=True,
        grad_scale=divisor,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=rate,
        weight_decay=decay,
        eps=settings.eps,
        maximize=False,
    )


def _sgd(
    state: Sequence[list[torch.Tensor]], settings: OptimSettings, number: int, rate: float, decay: float,
    divisor: torch.Tensor | None,
) -> None:  # fmt: skip
    rows, gradients, *momentum = state
    sgd(
        rows,
        gradients,
        list(momentum[0]) if settings.momentum else [None] * len(rows),
        fused=True,
        grad_scale=divisor,
        weight_decay=decay,
        momentum=settings.momentum,
        lr=rate,
        dampening=0.0,
        nesterov=False,
        maximize=False,
    )


def untouched_factor(settings: OptimSettings, rates: Sequence[float]) -> float:
    """Return what steps at ``rates`` make of a decayed weight that never has a gradient, as a factor.

    AdamW multiplies by ``1 - rate * decay``. For SGD the L2 term is a gradient of its own and gathers momentum.
    """
    value, velocity = 1.0, 0.0
    for rate in rates:
        if settings.name == "adamw":
            value *= 1 - rate * settings.weight_decay
        else:
            velocity = settings.momentum * velocity + settings.weight_decay * value
            value -= rate * velocity
    return value

"""AdamW and SGD on the rows of a stack: each trial with its own numbers, in the same kernels as torch's optimizers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from distilbench.engines.stacked import StackedWeights
from distilbench.settings import OptimSettings


class RowOptimizer:
    """One step for all trials; ``moments`` are what it remembers, each like the rows ``(trials, size)``.

    A trial's row is updated as ``torch.optim.AdamW`` or ``torch.optim.SGD`` would: decoupled decay for the former, an
    L2 term for the latter, on all but biases and norms.
    """

    def __init__(self, weights: StackedWeights) -> None:
        self.weights = weights
        self.settings: list[OptimSettings] = []
        self.moments: list[torch.Tensor] = []

    def load(self, moments: Sequence[torch.Tensor], settings: Sequence[OptimSettings]) -> None:
        """Go on with ``moments``, as many as :func:`moments_needed` says, and the ``settings`` of each trial."""
        self.moments, self.settings = list(moments), list(settings)

    @torch.no_grad()
    def step(self, number: int, rates: Sequence[float]) -> torch.Tensor:
        """Clip each trial's gradient, take its step ``number`` (from 1) at its rate, and return the norms (trials,).

        Clipping mirrors ``torch.nn.utils.clip_grad_norm_``: by ``limit / (norm + 1e-6)`` where that is below 1.
        """
        norms = torch.linalg.vector_norm(self.weights.gradient, dim=1)
        self._clip(norms)
        for trial, (settings, rate) in enumerate(zip(self.settings, rates, strict=True)):
            for part, decay in self._parts(settings):
                row = (t[trial, part] for t in (self.weights.rows, self.weights.gradient, *self.moments))
                update = _adamw_row if settings.name == "adamw" else _sgd_row
                update(list(row), settings, number, rate, decay)
        self.weights.updated()
        return norms

    def _clip(self, norms: torch.Tensor) -> None:
        limits = torch.tensor([s.max_grad_norm or torch.inf for s in self.settings], dtype=norms.dtype)
        factors = (limits.to(norms.device) / (norms + 1e-6)).clamp(max=1.0)
        if norms.device.type != "cpu" or bool((factors < 1).any()):  # elsewhere, asking would wait for the device
            self.weights.gradient.mul_(factors[:, None])

    def _parts(self, settings: OptimSettings) -> list[tuple[slice, float]]:
        """The decayed and the undecayed part of a row, each with its weight decay."""
        rowmap = self.weights.rowmap
        return [
            (slice(rowmap.decayed), settings.weight_decay),
            (slice(rowmap.decayed, rowmap.size), 0.0),
        ]


def moments_needed(settings: Sequence[OptimSettings]) -> int:
    """How many vectors like a row the optimizer of a group remembers."""
    return 2 if settings[0].name == "adamw" else int(any(s.momentum for s in settings))


def _adamw_row(tensors: list[torch.Tensor], settings: OptimSettings, number: int, rate: float, decay: float) -> None:
    row, gradient, mean, square = tensors
    adamw(
        [row],
        [gradient],
        [mean],
        [square],
        [],
        [torch.tensor(number - 1.0, device=row.device)],
        fused=True,
        amsgrad=False,
        beta1=settings.beta1,
        beta2=settings.beta2,
        lr=rate,
        weight_decay=decay,
        eps=settings.eps,
        maximize=False,
    )


def _sgd_row(tensors: list[torch.Tensor], settings: OptimSettings, number: int, rate: float, decay: float) -> None:
    row, gradient, *momentum = tensors
    sgd(
        [row],
        [gradient],
        list(momentum) if settings.momentum else [None],
        fused=True,
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

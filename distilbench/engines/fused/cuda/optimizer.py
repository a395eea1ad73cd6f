"""AdamW and SGD on stacked rows from tensors alone: learning rates and clipping never pass through the host.

What :class:`~distilbench.engines.fused.optimizer.RowOptimizer` does row by row, done for all trials at once, with
tables where it has numbers. Norms are sums in a fixed order, so that a step is the same whenever it is repeated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distilbench.engines.fused import kernels
from distilbench.engines.fused.optimizer import RowOptimizer
from distilbench.engines.fused.params import StackedWeights
from distilbench.settings import OptimSettings

NUMBERS = 4
"""What changes with the step: the rate; the share that decay takes; AdamW's step size, rate / (1 - beta1^t); and
1 / sqrt(1 - beta2^t)."""


class TabledOptimizer:
    """The rule of ``optimizer`` for rates ``(steps, trials)``; its moments stay that optimizer's."""

    def __init__(self, optimizer: RowOptimizer, rates: np.ndarray) -> None:
        weights, settings = optimizer.weights, optimizer.settings
        self.weights, self.moments, self.adaptive = weights, optimizer.moments, settings[0].name == "adamw"
        self.table = torch.from_numpy(numbers_of(settings, rates)).to(weights.rows)
        self.constants = torch.tensor([_constants(s) for s in settings], dtype=torch.float64).to(weights.rows)
        self.limits = torch.tensor([s.max_grad_norm or torch.inf for s in settings], dtype=torch.float64).to(
            weights.rows
        )

    @torch.no_grad()
    def step(self, numbers: torch.Tensor, norms: torch.Tensor) -> None:
        """Clip each gradient, take a step with ``numbers`` (trials, NUMBERS), and write the norms (trials,)."""
        weights = self.weights
        decayed, low = weights.rowmap.decayed, slice(weights.rowmap.tables, weights.rowmap.low)
        norms.copy_(gradient_norms(weights))
        factors = (self.limits / (norms + 1e-6)).clamp(max=1.0)
        if self.adaptive and kernels.usable(norms):
            state = weights.rows, weights.gradient, weights.low_gradient, self.moments, weights.copy
            kernels.adamw(*state, numbers, self.constants, factors, decayed, low)
            return
        if weights.low_gradient is not None:
            weights.gradient[:, low] = weights.low_gradient
        rule = adamw if self.adaptive else sgd
        rule(weights.rows, weights.gradient, self.moments, numbers, self.constants, factors, decayed)
        weights.updated()


def gradient_norms(weights: StackedWeights) -> torch.Tensor:
    """The norm of each trial's gradient, ``(trials,)`` in the precision of the rows."""
    parts = [weights.gradient]
    if weights.low_gradient is not None:
        rowmap = weights.rowmap
        parts = [weights.gradient[:, : rowmap.tables], weights.low_gradient, weights.gradient[:, rowmap.low :]]
    each = [torch.linalg.vector_norm(part, dim=1, dtype=weights.rows.dtype) for part in parts]
    return torch.linalg.vector_norm(torch.stack(each), dim=0)


def numbers_of(settings: Sequence[OptimSettings], rates: np.ndarray) -> np.ndarray:
    """The table ``(steps, trials, NUMBERS)`` float64 for ``rates`` (steps, trials)."""
    steps = np.arange(1, len(rates) + 1)[:, None]
    decay, beta1, beta2 = (np.array([getattr(s, n) for s in settings]) for n in ("weight_decay", "beta1", "beta2"))
    pace, root = rates / (1 - beta1**steps), 1 / np.sqrt(1 - beta2**steps)
    return np.stack([rates, rates * decay, pace, root], axis=2)


def _constants(settings: OptimSettings) -> list[float]:
    """1 - beta1, beta2, 1 - beta2 and eps of AdamW; momentum and decay of SGD."""
    decay = 0.0 if settings.name == "adamw" else settings.weight_decay
    return [1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps, settings.momentum, decay]


def adamw(
    rows: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor],
    numbers: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor, decayed: int,
) -> None:  # fmt: skip
    """``torch.optim.AdamW`` on ``rows`` (trials, size), whose first ``decayed`` columns decay."""
    _, shrink, pace, root = numbers[:, :, None].unbind(1)
    to_mean, keep_square, to_square, eps = constants[:, :4, None].unbind(1)
    mean, square = moments
    gradient = gradient * factors[:, None]
    mean.add_((gradient - mean) * to_mean)
    square.mul_(keep_square).add_(gradient.square() * to_square)
    rows[:, :decayed].sub_(rows[:, :decayed] * shrink)
    rows.sub_(pace * mean / (square.sqrt() * root + eps))


def sgd(
    rows: torch.Tensor, gradient: torch.Tensor, moments: Sequence[torch.Tensor],
    numbers: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor, decayed: int,
) -> None:  # fmt: skip
    """``torch.optim.SGD`` on ``rows`` (trials, size); decay is an L2 term on the first ``decayed`` columns."""
    momentum, decay = constants[:, 4:, None].unbind(1)
    gradient = gradient * factors[:, None]
    gradient[:, :decayed].add_(rows[:, :decayed] * decay)
    velocity = moments[0].mul_(momentum).add_(gradient) if moments else gradient
    rows.sub_(numbers[:, 0, None] * velocity)

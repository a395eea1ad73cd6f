"""AdamW and SGD for stacked trials with all values in tensors: learning rates and clipping never pass through the host.

The update is that of :class:`~distilbench.engines.fused.optimizer.StackedOptimizer`, for all trials at once instead of
one by one. Norms are summed in a fixed order, so that a step is reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from distilbench.engines.fused import kernels
from distilbench.engines.fused.optimizer import StackedOptimizer
from distilbench.engines.fused.params import StackedWeights
from distilbench.engines.optimization import lr_scale
from distilbench.settings import OptimSettings


class CapturableOptimizer:
    """Apply the update rule of ``optimizer`` with ``lrs`` (steps, trials); the moments stay shared with it."""

    def __init__(self, optimizer: StackedOptimizer, lrs: np.ndarray) -> None:
        weights, settings = optimizer.weights, optimizer.settings
        self.weights, self.moments, self.adaptive = weights, optimizer.moments, settings[0].name == "adamw"
        is_by_level = optimizer.first_steps or weights.trained_from or any(s.layer_decay != 1 for s in settings)
        top = weights.layout.top if is_by_level else 0
        scales = np.array([[lr_scale(level, top, s.layer_decay) for s in settings] for level in range(top + 1)])
        first_steps = optimizer.first_steps or [0] * len(scales)
        each = [step_scalars_of(settings, lrs * own, first) for own, first in zip(scales, first_steps, strict=True)]
        table, limits = np.stack(each, axis=1), [s.max_grad_norm or np.inf for s in settings]
        self.table, self.constants, self.limits = (
            torch.as_tensor(numbers, dtype=torch.float64).to(weights.flat_params)
            for numbers in (table, [_constants(s) for s in settings], limits)
        )
        self.chunks = [*weights.chunks(by_level=True)] if is_by_level else [(slice(0, weights.layout.size), 0)]
        for grad in (weights.grad, weights.compute_grad):
            if weights.trained_from and grad is not None:
                grad.zero_()  # so that frozen parameters add nothing to the norm

    @torch.no_grad()
    def step(self, step_scalars: torch.Tensor, norms: torch.Tensor) -> None:
        """Clip, take a step with ``step_scalars`` (levels or 1, trials, 4), and write ``norms``."""
        weights = self.weights
        decayed, compute = weights.layout.decayed_end, slice(weights.layout.tables_end, weights.layout.compute_end)
        by_kernel = kernels.can_run("adamw", norms.device, weights.compute_dtype)
        if by_kernel:
            factors = kernels.clip(weights.grad, weights.compute_grad, compute, self.limits, norms)
        else:
            norms.copy_(gradient_norms(weights))
            factors = (self.limits / (norms + 1e-6)).clamp(max=1.0)
        if by_kernel and self.adaptive and len(step_scalars) == 1:
            compute_part = weights.compute_grad, weights.compute_params
            state = weights.flat_params, weights.grad, compute_part, self.moments
            kernels.adamw(*state, (step_scalars[0], self.constants, factors), (decayed, compute)).run()
            return
        if weights.compute_grad is not None:
            weights.grad[:, compute] = weights.compute_grad
        update = adamw if self.adaptive else sgd
        for chunk, level in self.chunks:
            moments = [moment[:, chunk] for moment in self.moments]
            params, grad = weights.flat_params[:, chunk], weights.grad[:, chunk]
            rule = step_scalars[level], self.constants, factors
            update(params, grad, moments, *rule, max(0, decayed - chunk.start))
        weights.refresh_compute_params()


def gradient_norms(weights: StackedWeights) -> torch.Tensor:
    """Return the norm of each trial's gradient, ``(trials,)`` in the dtype of ``flat_params``."""
    parts = [weights.grad]
    if weights.compute_grad is not None:
        layout = weights.layout
        parts = [weights.grad[:, : layout.tables_end], weights.compute_grad, weights.grad[:, layout.compute_end :]]
    each = [torch.linalg.vector_norm(chunk, dim=1, dtype=weights.flat_params.dtype) for chunk in parts]
    norms: torch.Tensor = torch.linalg.vector_norm(torch.stack(each), dim=0)
    return norms


def step_scalars_of(settings: Sequence[OptimSettings], lrs: np.ndarray, first: int = 0) -> np.ndarray:
    """Return the values that change with the step, ``(steps, trials, 4)`` float64, for ``lrs`` (steps, trials).

    They are lr; lr * weight_decay; AdamW's step size, lr / (1 - beta1^t); and 1 / sqrt(1 - beta2^t), where t counts
    steps from ``first``, the first step that trains the parameters.
    """
    steps = np.arange(1 - first, len(lrs) + 1 - first).clip(1)[:, None]
    decay, beta1, beta2 = (np.array([getattr(s, n) for s in settings]) for n in ("weight_decay", "beta1", "beta2"))
    step_size, root = lrs / (1 - beta1**steps), 1 / np.sqrt(1 - beta2**steps)
    return np.stack([lrs, lrs * decay, step_size, root], axis=2)


def _constants(settings: OptimSettings) -> list[float]:
    """Return AdamW's 1 - beta1, beta2, 1 - beta2 and eps, then SGD's momentum and weight decay."""
    decay = 0.0 if settings.name == "adamw" else settings.weight_decay
    return [1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps, settings.momentum, decay]


def adamw(
    flat_params: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor],
    step_scalars: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor, decayed: int,
) -> None:  # fmt: skip
    """Mirror ``torch.optim.AdamW`` on ``flat_params`` (trials, size); weight decay applies to the first ``decayed``."""
    _, lr_times_weight_decay, step_size, root = step_scalars[:, :, None].unbind(1)
    to_mean, keep_square, to_square, eps = constants[:, :4, None].unbind(1)
    mean, square = moments
    grad = grad * factors[:, None]
    mean.add_((grad - mean) * to_mean)
    square.mul_(keep_square).add_(grad.square() * to_square)
    flat_params[:, :decayed].sub_(flat_params[:, :decayed] * lr_times_weight_decay)
    flat_params.sub_(step_size * mean / (square.sqrt() * root + eps))


def sgd(
    flat_params: torch.Tensor, grad: torch.Tensor, moments: Sequence[torch.Tensor],
    step_scalars: torch.Tensor, constants: torch.Tensor, factors: torch.Tensor, decayed: int,
) -> None:  # fmt: skip
    """Mirror ``torch.optim.SGD`` on ``flat_params`` (trials, size); the first ``decayed`` columns get the L2 term."""
    momentum, decay = constants[:, 4:, None].unbind(1)
    grad = grad * factors[:, None]
    grad[:, :decayed].add_(flat_params[:, :decayed] * decay)
    velocity = moments[0].mul_(momentum).add_(grad) if moments else grad
    flat_params.sub_(step_scalars[:, 0, None] * velocity)

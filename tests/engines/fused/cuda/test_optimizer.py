"""The optimizer that reads its numbers from tables, against torch's own."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distilbench.engines.fused.cuda.optimizer import CapturableOptimizer
from distilbench.engines.fused.optimizer import StackedOptimizer
from distilbench.settings import OptimSettings

SIZE, DECAYED, STEPS = 300, 200, 12
TRIALS = {
    "adamw": [
        OptimSettings("adamw", 2e-2, 0.3, 1.0, 0.9, 0.999, 1e-8, 0.0, 1.0),
        OptimSettings("adamw", 1e-3, 0.0, 0.5, 0.8, 0.99, 1e-6, 0.0, 1.0),
        OptimSettings("adamw", 5e-3, 0.01, 0.0, 0.9, 0.95, 1e-8, 0.0, 1.0),
    ],
    "sgd": [
        OptimSettings("sgd", 2e-2, 0.3, 1.0, 0.9, 0.999, 1e-8, 0.9, 1.0),
        OptimSettings("sgd", 1e-1, 0.0, 0.0, 0.9, 0.999, 1e-8, 0.0, 1.0),
    ],
}
RATES = np.linspace(1, 0.1, STEPS)


class Weights:
    """As much of :class:`StackedWeights` as an optimizer sees."""

    def __init__(self, rows):
        self.flat_params, self.grad = rows, torch.empty_like(rows)
        self.compute_params = self.compute_grad = None
        self.compute_dtype, self.trained_from = rows.dtype, 0
        self.layout = SimpleNamespace(decayed_end=DECAYED, size=SIZE, tables_end=0, compute_end=0)

    def refresh_compute_params(self):
        pass


def torchs(settings, row, gradients):
    """Train a row with torch's optimizer: the row, and the norms."""
    parts = [torch.nn.Parameter(row[:DECAYED].clone()), torch.nn.Parameter(row[DECAYED:].clone())]
    groups = [{"params": parts[:1], "weight_decay": settings.weight_decay}, {"params": parts[1:], "weight_decay": 0.0}]
    if settings.name == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(settings.beta1, settings.beta2), eps=settings.eps)
    else:
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=settings.momentum)
    norms = []
    for factor, gradient in zip(RATES, gradients, strict=True):
        parts[0].grad, parts[1].grad = gradient[:DECAYED].clone(), gradient[DECAYED:].clone()
        norms.append(torch.nn.utils.clip_grad_norm_(parts, settings.max_grad_norm or torch.inf))
        for group in optimizer.param_groups:
            group["lr"] = settings.lr * factor
        optimizer.step()
    return torch.cat([part.detach() for part in parts]), torch.stack(norms)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("name", TRIALS)
def test_it_takes_the_steps_of_torchs_optimizer(name, dtype, tolerance):
    torch.manual_seed(0)
    trials = TRIALS[name]
    start = torch.randn(len(trials), SIZE, dtype=torch.float64).to(dtype)
    gradients = torch.randn(STEPS, len(trials), SIZE, dtype=torch.float64).to(dtype)
    weights = Weights(start.clone())
    rows = StackedOptimizer(weights, [torch.zeros_like(start) for _ in range(2 if name == "adamw" else 1)], trials)
    optimizer = CapturableOptimizer(rows, RATES[:, None] * np.array([t.lr for t in trials]))
    seen = []
    for step in range(STEPS):
        weights.grad.copy_(gradients[step])
        norms = torch.empty(len(trials), dtype=dtype)
        optimizer.step(optimizer.table[step], norms)
        seen.append(norms)
    for t, settings in enumerate(trials):
        row, norms = torchs(settings, start[t], gradients[:, t])
        torch.testing.assert_close(weights.flat_params[t], row, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(torch.stack(seen)[:, t], norms, rtol=tolerance, atol=0)


def test_a_trial_that_diverges_leaves_its_neighbours_alone():
    trials = TRIALS["adamw"][:2]
    weights = Weights(torch.ones(2, SIZE))
    rows = StackedOptimizer(weights, [torch.zeros(2, SIZE), torch.zeros(2, SIZE)], trials)
    optimizer = CapturableOptimizer(rows, np.full((STEPS, 2), 1e-3))
    weights.grad.fill_(1.0)
    weights.grad[0, 3] = torch.nan
    optimizer.step(optimizer.table[0], torch.empty(2))
    assert weights.flat_params[0].isnan().all()
    assert weights.flat_params[1].isfinite().all()

"""What the optimizer makes of weights that never had a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distilbench.engines.fused.optimizer import untouched_factor

RATES = [1e-3, 5e-3, 2e-2, 1e-2]


@pytest.mark.parametrize(
    "overrides",
    [
        ("optim.weight_decay=0.3",),
        ("optim=sgd", "optim.weight_decay=0.3"),
        ("optim=sgd", "optim.weight_decay=0.3", "optim.momentum=0.9"),
        ("optim.weight_decay=0",),
    ],
)
def test_an_untouched_weight_ends_where_torchs_optimizer_takes_it(settings, overrides):
    from distilbench.engines.optimization import build_optimizer

    optim = settings(*overrides).optim
    table = torch.nn.Embedding(3, 2, dtype=torch.float64)
    before = table.weight.detach().clone()
    optimizer = build_optimizer(table, replace(optim, lr=1.0))
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        table.weight.grad = torch.zeros_like(table.weight)
        optimizer.step()
    torch.testing.assert_close(table.weight.detach(), before * untouched_factor(optim, RATES), rtol=1e-13, atol=0)

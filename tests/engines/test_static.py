"""Steps through static buffers: the same training as ever, and nothing in a step that a recording could not repeat."""

from __future__ import annotations

import pytest
import torch

from distilbench.engines.fused import FusedEngine
from distilbench.results import Status
from tests.engines.test_fused import (  # the ladder, and the loop that it is compared with
    LADDER,
    LAST_EPOCH,
    exported,
    models,
    one_thread,
    reference,
    trial,
)

__all__ = ["models", "one_thread", "trial"]


@pytest.mark.parametrize("kind", ["distilbert", "bert"])
@pytest.mark.parametrize("case", LADDER)
def test_static_steps_equal_a_plain_loop_in_float64(trial, splits_of, recorder, kind, case):
    settings = trial(*LADDER[case], LAST_EPOCH, kind=kind)
    splits, seen = splits_of(settings), recorder()
    model, losses, norms = reference(settings, splits)
    [result] = FusedEngine(torch.float64, static=True).train([settings], splits, seen)
    assert result.status is Status.FINISHED, result.error
    assert seen.losses() == pytest.approx(losses, rel=1e-11)
    assert [r.gradient_norm for r in seen.steps[0]] == pytest.approx(norms, rel=1e-9)
    for name, values in exported(settings).items():
        torch.testing.assert_close(values.double(), model.state_dict()[name].float().double(), rtol=0, atol=1e-7)

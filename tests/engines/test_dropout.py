"""Masks that belong to a trial."""

from __future__ import annotations

import pytest
import torch

from distilbench.engines.dropout import Dropout, keep_scale

CPU = torch.device("cpu")


def mask(seeds, shapes, whole, step=0, stage="step", rate=0.1):
    return Dropout(seeds, stage, step, CPU).keep(rate, shapes, whole, torch.float32)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.5])
def test_the_share_that_is_dropped_is_the_rate(rate):
    kept = mask([1], [(1000, 1000)], (1000, 1000), rate=rate)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate)) ** 0.5 / 1000)
    assert kept.mean().item() * keep_scale(rate) == pytest.approx(1, abs=5e-3)


def test_every_place_is_dropped_as_often():
    """A draw yields four places; one whose top bit were always zero would show here."""
    kept = mask([1], [(4, 250_000)], (4, 250_000), rate=0.5).view(-1, 4)
    for place in range(4):
        assert kept[:, place].mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 500)
    assert torch.corrcoef(kept.T).fill_diagonal_(0).abs().max() < 0.01


def test_the_same_seed_and_step_draw_the_same_and_others_do_not():
    first = mask([1], [(30, 30)], (30, 30))
    assert torch.equal(first, mask([1], [(30, 30)], (30, 30)))
    for other in (mask([2], [(30, 30)], (30, 30)), mask([1], [(30, 30)], (30, 30), step=1),
                  mask([1], [(30, 30)], (30, 30), stage="prefix")):  # fmt: skip
        assert not torch.equal(first, other)


def test_sites_of_a_step_draw_differently():
    dropout = Dropout([1], "step", 0, CPU)
    masks = [dropout.keep(0.1, [(30, 30)], (30, 30), torch.float32) for _ in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_a_trials_mask_does_not_depend_on_its_neighbours():
    alone = mask([5], [(7, 11)], (7, 11))
    together = mask([4, 5], [(9, 13), (7, 11)], (16, 13))
    assert torch.equal(together[1, :7, :11], alone[0])
    assert together[1, 7:].sum() == together[1, :, 11:].sum() == 0

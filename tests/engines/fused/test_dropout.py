"""Masks that belong to a trial."""

from __future__ import annotations

import pytest
import torch

from distilbench.engines.fused.dropout import CounterDropout, Dropout, dropout_scale, key_of, philox

CPU = torch.device("cpu")


def mask(seeds, shapes, whole, step=0, stage="step", rate=0.1):
    return Dropout(seeds, stage, step, CPU).draw(rate, shapes, whole, torch.float32)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.5])
def test_the_share_that_is_dropped_is_the_rate(rate):
    kept = mask([1], [(1000, 1000)], (1000, 1000), rate=rate)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate)) ** 0.5 / 1000)
    assert kept.mean().item() * dropout_scale(rate) == pytest.approx(1, abs=5e-3)


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
    masks = [dropout.draw(0.1, [(30, 30)], (30, 30), torch.float32) for _ in range(3)]
    assert not torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[1], masks[2])


def test_a_trials_mask_does_not_depend_on_its_neighbours():
    alone = mask([5], [(7, 11)], (7, 11))
    together = mask([4, 5], [(9, 13), (7, 11)], (16, 13))
    assert torch.equal(together[1, :7, :11], alone[0])
    assert together[1, 7:].sum() == together[1, :, 11:].sum() == 0


def counted(seeds, whole, step=0, stage="step", rate=0.1, site=1):
    dropout = CounterDropout(torch.tensor([key_of(seed, stage, step) for seed in seeds]))
    return [dropout.draw(rate, [], whole, torch.float32) for _ in range(site)][-1]


def words(counter, site, key):
    return [int(word) for word in philox(torch.tensor([counter]), site, torch.tensor([key]))]


@pytest.mark.parametrize(
    ("counter", "site", "key", "expected"),
    [
        (0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0xFFFFFFFF, 0xFFFFFFFF, -1, None),
        (0x243F6A88, 0x85A308D3, 0x299F31D0A4093822, None),
    ],
)
def test_philox_gives_the_numbers_of_its_authors(counter, site, key, expected):
    """The known answer for zeros is in Random123's ``kat_vectors``; the others are checked with Python's integers."""
    assert words(counter, site, key) == (
        [int(word, 16) for word in expected.split()] if expected else plain_philox(counter, site, key)
    )
    assert words(counter, site, key) == plain_philox(counter, site, key)


def plain_philox(c0, c1, key):
    c2 = c3 = 0
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & 0xFFFFFFFF, a >> 32 ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2, 0.5])
def test_the_share_that_counted_draws_drop_is_the_rate(rate):
    kept = counted([1], (1000, 1000), rate=rate)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    assert kept.mean().item() == pytest.approx(1 - rate, abs=5 * (rate * (1 - rate)) ** 0.5 / 1000)


def test_counted_draws_are_even_over_their_range_and_over_their_lanes():
    """Chi-square over 64 ranges of the 16 bits in each of the eight lanes: below the 1 - 1e-6 quantile."""
    key = torch.tensor([[key_of(1, "step", 0)]])
    drawn = torch.stack(philox(torch.arange(1 << 16)[None], 1, key), dim=-1).view(-1, 4)
    for word in drawn.T:
        for half in (word & 0xFFFF, word >> 16):
            seen = torch.bincount(half >> 10, minlength=64).double()
            expected = (1 << 16) / 64
            assert ((seen - expected) ** 2 / expected).sum().item() < 131  # 63 degrees of freedom


@pytest.mark.parametrize("other", [{"seeds": [2]}, {"step": 1}, {"stage": "prefix"}, {"site": 2}])
def test_counted_draws_of_other_seeds_steps_stages_and_sites_are_independent(other):
    """Two masks of 250,000 places at rate 0.5 agree in half of them, within five standard deviations."""
    given = {"seeds": [1], "whole": (500, 500), "rate": 0.5}
    first, second = counted(**given), counted(**given | other)
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 500)


def test_neighbouring_places_are_independent():
    kept = counted([1], (500, 512), rate=0.5)[0]
    for shift in (1, 2, 3, 4, 7, 8, 16):
        for moved in (kept.roll(shift, 0), kept.roll(shift, 1)):
            assert (kept == moved).double().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 506)


def test_counted_draws_do_not_depend_on_neighbours_nor_on_filler():
    hidden, attention = (23, 36), (5, 2, 17, 24)
    for site in (1, 2):
        alone = counted([5], hidden, site=site)
        assert torch.equal(alone[0], counted([4, 5], (64, 36), site=site)[1, :23])
        alone = counted([5], attention, site=site)
        assert torch.equal(alone[0], counted([4, 5], (8, 2, 40, 48), site=site)[1, :5, :, :17, :24])


def test_heads_queries_and_sentences_draw_differently():
    kept = counted([1], (2, 2, 512, 512), rate=0.5)[0].flatten(0, 1)
    assert len(kept.flatten(0, 1).unique(dim=0)) == 4 * 512

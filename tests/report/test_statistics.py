"""Published and hand-computed cases, and simulations of what the tests and intervals promise."""

import math
from itertools import pairwise

import numpy as np
import pytest
from scipy import stats

from distilbench.report.statistics import (
    compare_over_seeds,
    critical_difference,
    holm,
    mcnemar_exact,
    p_of_difference,
    paired_accuracy_interval,
    spread_over_seeds,
    verdict,
)

ALPHA = 0.05


def bits(text):
    return np.array([c == "1" for c in text])


def compared(a, b):
    return compare_over_seeds(spread_over_seeds(a, b))


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (1, 7, 2 * (1 + 8) / 2**8),  # Bentur et al. 2009 in Fagerland, Lydersen and Laake 2013: 0.0703
        (11, 1, 2 * (1 + 12) / 2**12),
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 6, 2 / 2**6),
    ],
)
def test_mcnemar_is_the_two_sided_binomial_tail(only_a, only_b, p):
    assert mcnemar_exact(only_a, only_b) == pytest.approx(p, rel=1e-12)
    assert mcnemar_exact(only_b, only_a) == pytest.approx(p, rel=1e-12)


def test_interval_equals_the_published_one_of_the_airway_data():
    # Fagerland, Lydersen and Laake 2014, Wald with Bonett and Price's adjustment: -0.508 to -0.013.
    difference, low, high = paired_accuracy_interval(1, 7, 21)
    assert difference == pytest.approx(-6 / 21)
    assert (low, high) == pytest.approx((-0.508, -0.013), abs=5e-4)


def test_interval_keeps_a_width_where_nothing_is_discordant():
    half = stats.norm.isf(0.025) * math.sqrt(2) / 100
    assert paired_accuracy_interval(0, 0, 98) == pytest.approx((0.0, -half, half))


def test_interval_mirrors_and_stays_within_one():
    _, low, high = paired_accuracy_interval(30, 12, 500)
    assert paired_accuracy_interval(12, 30, 500)[1:] == pytest.approx((-high, -low))
    assert paired_accuracy_interval(3, 0, 3)[2] == 1.0
    assert paired_accuracy_interval(0, 3, 3)[1] == -1.0
    assert paired_accuracy_interval(1, 0, 1)[0] == 1.0
    with pytest.raises(ValueError, match="do not fit"):
        paired_accuracy_interval(3, 2, 4)


def test_interval_excludes_zero_wherever_the_exact_test_rejects():
    for discordant_examples in range(1, 60):
        for only_a in range(discordant_examples // 2 + 1, discordant_examples + 1):
            only_b = discordant_examples - only_a
            if mcnemar_exact(only_a, only_b) < ALPHA:
                assert paired_accuracy_interval(only_a, only_b, 872)[1] > 0


@pytest.mark.parametrize("examples", [20, 50, 100])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.4])
@pytest.mark.parametrize("lean", [0.5, 0.8])
def test_interval_covers_by_enumeration(examples, share, lean):
    true, covered = share * (2 * lean - 1), 0.0
    for m in range(examples + 1):
        weight = stats.binom.pmf(m, examples, share)
        if weight < 1e-6:
            continue
        for only_a, p in enumerate(stats.binom.pmf(np.arange(m + 1), m, lean)):
            _, low, high = paired_accuracy_interval(only_a, m - only_a, examples)
            covered += weight * p * (low <= true <= high)
    assert covered >= 1 - ALPHA


def test_the_interval_of_one_seed_each_agrees_with_mcnemar():
    a, b = bits("1" * 12 + "0" * 8), bits("1" * 5 + "0" * 15)
    result = compared({1: a}, {2: b})
    assert result.p == pytest.approx(2 / 2**7)
    assert (result.difference, result.low, result.high) == paired_accuracy_interval(7, 0, 20)
    spread = spread_over_seeds({1: a}, {2: b})
    assert (spread.num_seeds, spread.seed_components, spread.interaction_variance) == (1, (), 0), (
        "one pair tells nothing of seeds"
    )


def blocks(*sizes):
    """Seeds that are right on neighbouring blocks, so that every example was right equally often: no example spread."""
    edges = np.cumsum([0, *sizes])
    return {s: np.isin(np.arange(edges[-1]), np.arange(*ends)) for s, ends in enumerate(pairwise(edges))}


def test_without_example_spread_paired_seeds_give_the_one_sample_t_test():
    right = blocks(20, 30, 50)
    result = compared(right, {s: np.zeros(100, bool) for s in right})
    expected = stats.ttest_1samp([0.2, 0.3, 0.5], 0)
    assert result.p == pytest.approx(expected.pvalue, rel=1e-6)
    assert (result.low, result.high) == pytest.approx(tuple(expected.confidence_interval()))


def test_without_example_spread_independent_seeds_give_cochran_and_cox():
    a, b = blocks(200, 300, 500), blocks(100, 150, 300, 450)
    b = {seed + 10: right for seed, right in b.items()}
    result = compared(a, b)
    w_a, w_b = (np.var([right.mean() for right in side.values()], ddof=1) / len(side) for side in (a, b))

    def half(p: float) -> float:
        return (w_a * stats.t.isf(p / 2, 2) + w_b * stats.t.isf(p / 2, 3)) / math.sqrt(w_a + w_b)

    assert (result.low, result.high) == pytest.approx((1 / 12 - half(0.05), 1 / 12 + half(0.05)))
    assert half(result.p) == pytest.approx(1 / 12)
    assert spread_over_seeds(a, b).num_seeds == 3


def test_paired_seeds_weigh_the_mean_squares_of_the_two_way_layout():
    a = np.stack([bits(t * 20) for t in ("1111111100", "1111110000", "1110111011")]).astype(int)
    b = np.stack([bits(t * 20) for t in ("0011101100", "1111010000", "1010011010")]).astype(int)
    d = a - b
    seeds, examples = d.shape
    ms_seeds = examples * sum((row.mean() - d.mean()) ** 2 for row in d) / (seeds - 1)
    ms_examples = seeds * sum((column.mean() - d.mean()) ** 2 for column in d.T) / (examples - 1)
    total = sum((x - d.mean()) ** 2 for x in d.ravel())
    ms_rest = (total - (seeds - 1) * ms_seeds - (examples - 1) * ms_examples) / ((seeds - 1) * (examples - 1))
    from_seeds, from_examples = ms_seeds / d.size, (ms_examples - ms_rest) / d.size
    assert from_examples > 0
    weighted = from_seeds * stats.t.isf(0.025, 2) + from_examples * stats.norm.isf(0.025)
    half = weighted / math.sqrt(from_seeds + from_examples)
    result = compared(by_seed(a == 1), by_seed(b == 1))
    assert (result.low, result.high) == pytest.approx((d.mean() - half, d.mean() + half))


def test_independent_seeds_weigh_the_examples_by_what_seeds_and_noise_leave_of_their_scatter():
    a = np.stack([bits(t * 5) for t in ("1111111100", "1111110000", "1110111011")]).astype(int)
    b = np.stack([bits(t * 5) for t in ("0000011100", "0000011001")]).astype(int)

    def parts_of(values):
        residual = values - values.mean(axis=1, keepdims=True) - values.mean(axis=0) + values.mean()
        degrees = (values.shape[0] - 1) * (values.shape[1] - 1)
        return values.mean(axis=1).var(ddof=1) / len(values), (residual**2).sum() / degrees / values.size

    (from_a, noise_a), (from_b, noise_b) = parts_of(a), parts_of(b)
    by_example = a.mean(axis=0) - b.mean(axis=0)
    from_examples = by_example.var(ddof=1) / 50 - noise_a - noise_b
    assert from_examples > 0
    spread = spread_over_seeds(by_seed(a == 1), {9 + s: row == 1 for s, row in enumerate(b)})
    assert spread.by_example == pytest.approx(by_example)
    assert spread.example_variance == pytest.approx(from_examples)
    assert spread.seed_components == ((pytest.approx(from_a), 2), (pytest.approx(from_b), 1))


def test_two_examples_have_one_degree_of_freedom_for_their_noise():
    spread = spread_over_seeds({1: bits("10"), 2: bits("01")}, {1: bits("00"), 2: bits("00")})
    assert spread.interaction_variance == pytest.approx(1 / 4)


def test_limits_over_seeds_stay_within_one():
    few = {s: bits("111") for s in (1, 2)}, {s: bits("000") for s in (1, 2)}
    assert compared(*few).high == 1.0
    assert compared(*reversed(few)).low == -1.0


def test_p_is_that_of_given_seeds_where_those_are_less_sure():
    better, worse = bits("1" * 84 + "0" * 16), bits("1" * 80 + "0" * 20)
    result = compared({1: better, 2: better}, {1: worse, 2: worse})
    error = math.sqrt(((4 + 2) / 102 - (4 / 102) ** 2) / 102)
    assert result.p == pytest.approx(2 * stats.norm.sf(0.04 / error))


@pytest.mark.parametrize("p", [0.9, 0.05, 1e-6, 1e-150])
def test_p_of_a_difference_is_that_whose_critical_difference_it_is(p):
    parts = [(0.5, 2), (0.25, 7), (0.125, math.inf)]
    assert p_of_difference(parts, critical_difference(parts, p)) == pytest.approx(p, rel=1e-6)


def test_p_of_no_difference_is_one_and_of_one_beyond_measure_zero():
    assert p_of_difference([(0.1, 3)], 0.0) == 1.0
    assert p_of_difference([(1e-8, math.inf)], 1.0) == 0.0
    assert p_of_difference([(1.0, math.inf)], 1.0) == pytest.approx(2 * stats.norm.sf(1))


def test_equal_predictions_show_no_difference_and_no_certainty():
    same = {s: bits("1101" * 50) for s in (1, 2, 3)}
    result = compared(same, same)
    half = stats.norm.isf(0.025) * math.sqrt(2) / 202
    assert (result.difference, result.p) == (0.0, 1.0)
    assert (result.low, result.high) == pytest.approx((-half, half))


def test_more_agreement_between_seeds_than_chance_gives_no_more_certainty_than_given_seeds():
    # Both seeds are better by 4 of 100 examples: no spread over seeds, yet the examples alone leave p near 0.06.
    worse = bits("1" * 80 + "0" * 20)
    better = bits("1" * 84 + "0" * 16)
    result = compared({1: better, 2: better}, {1: worse, 2: worse})
    assert 0.01 < result.p < 0.1
    assert result.low == pytest.approx(0.04 - 1.96 * math.sqrt((6 / 102 - (4 / 102) ** 2) / 102), abs=1e-4)


def test_shared_seeds_are_paired_and_others_left_aside():
    rng = np.random.default_rng(0)
    a = {s: rng.random(200) < 0.9 for s in (1, 2, 3, 4)}
    b = {s: rng.random(200) < 0.8 for s in (3, 2, 9)}
    result = compared(a, b)
    assert result == compared({s: a[s] for s in (2, 3)}, {s: b[s] for s in (2, 3)})
    assert spread_over_seeds(a, b).num_seeds == 2
    assert spread_over_seeds(a, {2: b[2]}).num_seeds == 1


def test_seeds_that_cannot_be_compared_are_refused():
    one = bits("1100")
    with pytest.raises(ValueError, match=r"got \[1, 2\] and \[3\]"):
        compared({1: one, 2: one}, {3: one})
    with pytest.raises(ValueError, match="same examples"):
        compared({1: one, 2: one}, {1: one[:3], 2: one[:3]})
    with pytest.raises(ValueError, match=r"same examples, got \[3, 4\]"):
        compared({1: one, 2: one}, {3: one[:3], 4: one[:3]})
    with pytest.raises(ValueError, match=r"same examples, got \[0\]"):
        compared({1: one[:0]}, {1: one[:0]})
    assert compared({1: one[:1]}, {1: one[2:3]}).difference == 1.0


NOISE = {  # how far examples, seeds and chance move a treatment, beside a difficulty of 1 that all share
    "chance only": {"example": 0.0, "seed": 0.0, "chance": 0.3},
    "examples differ": {"example": 0.3, "seed": 0.0, "chance": 0.3},
    "seeds differ": {"example": 0.0, "seed": 0.3, "chance": 0.3},
    "all differ": {"example": 0.2, "seed": 0.1, "chance": 0.3},
}


def simulate(rng, draws, ease, seeds, examples, example, seed, chance):
    """``(draws, treatments, seeds, examples)`` bool: right where ease + difficulty + shifts + chance is above 0."""
    shape = (draws, len(ease), seeds, examples)
    score = np.array(ease)[None, :, None, None] + rng.standard_normal((draws, 1, 1, examples))
    score = score + example * rng.standard_normal((draws, len(ease), 1, examples))
    score = score + seed * rng.standard_normal((draws, len(ease), seeds, 1))
    return score + chance * rng.standard_normal(shape) > 0


def by_seed(rows, first=0):
    return dict(enumerate(rows, start=first))


def at_most(share, draws):
    """The largest count that ``draws`` draws of probability ``share`` reach but once in a thousand times."""
    return stats.binom.isf(1e-3, draws, share)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_under_no_difference_the_level_holds_paired_and_independent(noise, seeds):
    draws = 300
    right = simulate(np.random.default_rng(seeds), draws, (1.3, 1.3), seeds, 200, **NOISE[noise])
    for first in (0, 100):
        rejected = sum(compared(by_seed(a), by_seed(b, first)).p < ALPHA for a, b in right)
        assert rejected <= at_most(ALPHA, draws)


@pytest.mark.parametrize("noise", NOISE)
@pytest.mark.parametrize("seeds", [2, 5])
def test_interval_over_seeds_covers_a_true_difference(noise, seeds):
    draws, ease, moves = 300, (1.5, 1.2), NOISE[noise]
    scale = math.sqrt(1 + sum(v**2 for v in moves.values()))
    true = float(np.diff(stats.norm.cdf(np.array(ease[::-1]) / scale))[0])
    right = simulate(np.random.default_rng(seeds), draws, ease, seeds, 200, **moves)
    results = [compared(by_seed(a), by_seed(b)) for a, b in right]
    assert sum(not r.low <= true <= r.high for r in results) <= at_most(ALPHA, draws)


def test_a_large_difference_is_found():
    right = simulate(np.random.default_rng(1), 100, (1.6, 1.2), 5, 800, **NOISE["all differ"])
    found = [compared(by_seed(a), by_seed(b)) for a, b in right]
    assert sum(verdict(r.low, r.high, r.p) == "better" for r in found) >= 80


def test_among_treatments_that_do_not_differ_sweeps_with_a_false_verdict_stay_at_the_level():
    sweeps, false = 500, 0
    right = simulate(np.random.default_rng(7), sweeps, (1.3,) * 5, 3, 200, **NOISE["all differ"])
    for baseline, *others in right:
        results = [compared(by_seed(other), by_seed(baseline)) for other in others]
        corrected = holm([r.p for r in results])
        verdicts = [verdict(r.low, r.high, p) for r, p in zip(results, corrected, strict=True)]
        false += any(v in ("better", "worse") for v in verdicts)
    assert false <= at_most(ALPHA, sweeps)


def test_holms_correction_is_that_computed_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("low", "high", "p", "word"),
    [
        (0.01, 0.03, 0.01, "better"),
        (-0.03, -0.01, 0.01, "worse"),
        (-0.01, 0.03, 0.2, "undecided"),
        (0.01, 0.03, 0.08, "undecided"),
        (-0.01, 0.03, 0.01, "undecided"),
        (0.01, 0.03, 1 - 0.95, "undecided"),
        (0.0, 0.03, 0.01, "undecided"),
        (-0.03, 0.0, 0.01, "undecided"),
    ],
)
def test_verdict_needs_a_small_p_and_an_interval_on_one_side(low, high, p, word):
    assert verdict(low, high, p) == verdict(low, high, p, 0.9) == word


@pytest.mark.parametrize(
    ("low", "high", "p", "p_loss", "word"),
    [
        (0.01, 0.03, 0.01, 0.001, "better"),
        (-0.008, 0.004, 0.3, 0.01, "good enough"),
        (-0.008, -0.001, 0.01, 0.01, "good enough"),  # it loses, and less than the margin
        (0.01, 0.03, 0.08, 0.01, "good enough"),
        (-0.008, 0.004, 0.3, 0.025, "undecided"),
    ],
)
def test_a_loss_shown_to_be_below_the_margin_is_good_enough_but_for_what_leads(low, high, p, p_loss, word):
    assert verdict(low, high, p, p_loss) == word

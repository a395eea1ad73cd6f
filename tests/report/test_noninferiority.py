"""The exact test against brute force, its level by enumeration, and what the test over seeds promises, simulated."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from distilbench.report import noninferiority as ni
from distilbench.report.noninferiority import (
    ALPHA,
    BETA,
    effective_counts,
    noninferiority_exact,
    noninferiority_over_seeds,
)
from distilbench.report.statistics import compare_over_seeds, holm, spread_over_seeds
from tests.report import margin_tables as tables


def pair(gains, losses, examples):
    """Two ``(examples,)`` bool arrays with those counts of examples that only one got right."""
    a, b = np.ones(examples, bool), np.ones(examples, bool)
    a[:losses], b[losses : losses + gains] = False, False
    return a, b


def by_seed(difference, first=0):
    """Seed -> bool for A and for B, from ``(seeds, examples)`` of -1, 0 and 1; B's seeds start at ``first``."""
    return dict(enumerate(difference >= 0)), dict(enumerate(difference <= 0, start=first))


def test_a_single_example_is_computed_by_hand():
    # A alone right: at a loss of m that has probability (1 - m) / 2 at most, and the bound is where this is 2.5 %.
    found = noninferiority_exact(1, 0, 1, margin=0.1)
    assert found.p == pytest.approx(0.45 + BETA)
    assert found.bound == pytest.approx(1 - 2 * (ALPHA - BETA), abs=1e-6)
    assert noninferiority_exact(0, 1, 1, margin=0.1).bound == 1.0


def test_p_is_the_largest_chance_of_an_outcome_with_as_low_a_limit():
    examples, margin = 7, 0.2
    outcomes = [(b, c) for b, c in product(range(examples + 1), repeat=2) if b + c <= examples]
    limits = {outcome: ni._region(*outcome, examples).upper_limit for outcome in outcomes}
    for observed in outcomes:
        low, high = stats.binomtest(sum(observed), examples).proportion_ci(1 - BETA, "exact")
        discordance = np.linspace(max(low, margin), high, 2_000)
        as_low = [o for o in outcomes if limits[o] <= limits[observed] + 1e-9]
        chance = sum(
            stats.multinomial.pmf(
                [[b, c, examples - b - c]] * 2_000,
                examples,
                np.stack([(discordance - margin) / 2, (discordance + margin) / 2, 1 - discordance], 1),
            )
            for b, c in as_low
        )
        assert noninferiority_exact(*observed, examples, margin).p == pytest.approx(
            min(chance.max() + BETA, 1), abs=1e-5
        )


def test_the_limit_of_a_loss_is_that_of_tangos_score_interval():
    # The airway data in Fagerland, Lydersen and Laake 2014: 1 and 7 of 21, score interval of the difference
    # -0.517 to -0.026; the other end by exchanging the sides.
    assert ni._region(1, 7, 21).upper_limit == pytest.approx(0.517, abs=5e-4)
    assert ni._region(7, 1, 21).upper_limit == pytest.approx(-0.026, abs=5e-4)


@pytest.mark.parametrize("differ", [0, 3, 40])
def test_the_discordance_is_searched_within_its_exact_interval(differ):
    region = ni._region(differ, 0, 40)
    assert region.low == (0.0 if not differ else pytest.approx(stats.beta.ppf(ni.BETA / 2, differ, 41 - differ)))
    assert region.high == (1.0 if differ == 40 else pytest.approx(stats.beta.isf(ni.BETA / 2, differ + 1, 40 - differ)))


@pytest.mark.parametrize("examples", [20, 64, 200])
def test_at_a_loss_of_the_margin_at_most_its_level_is_called_good_enough_whatever_the_discordance(examples):
    margin = tables.COMPARED[examples]
    assert tables.largest_chance(tables.is_claimed, examples, margin) <= ALPHA


def test_other_fast_tests_do_not_hold_the_level_as_the_guide_says():
    for examples, points, *cells in table_rows("Sidik")[:2]:
        margin = tables.COMPARED[int(examples)]
        assert float(points) == 100 * margin
        for test, cell in zip((tables.tango, tables.bonett_price, tables.is_claimed), cells[:3], strict=True):
            assert f"{100 * tables.largest_chance(test, int(examples), margin):.2f}" == cell.split()[0]


def test_p_is_below_the_level_exactly_where_the_bound_is_below_the_margin():
    for gains, losses, margin in product((0, 2, 9), (0, 1, 6, 20), (0.005, 0.03, 0.1)):
        found = noninferiority_exact(gains, losses, 150, margin)
        assert (found.p < ALPHA) == (found.bound < margin)
        assert noninferiority_exact(gains, losses, 150, found.bound).p == pytest.approx(ALPHA, abs=1e-4)


def test_more_gains_fewer_losses_and_a_wider_margin_speak_for_good_enough():
    bounds = [[noninferiority_exact(b, c, 60, 0.05).bound for b in range(6)] for c in range(6)]
    assert (np.diff(bounds, axis=1) <= 1e-8).all()
    assert (np.diff(bounds, axis=0) >= -1e-8).all()
    p = [noninferiority_exact(5, 8, 200, margin).p for margin in np.linspace(-0.05, 0.2, 30)]
    assert (np.diff(p) <= 1e-12).all()


def test_a_loss_beyond_the_margin_over_seeds_has_a_p_above_a_half():
    rng = np.random.default_rng(4)
    difference = -(rng.random((3, 400)) < [[0.10], [0.12], [0.14]]).astype(int)
    a, b = by_seed(difference)
    spread = spread_over_seeds(a, b)
    beyond, inside = (ni._p_over_seeds(spread, -spread.difference + shift) for shift in (-0.02, 0.02))
    assert 0 < inside < 0.5 < beyond < 1
    parts, scale = spread.variance_components, ni._standard_error_ratio(spread, -spread.difference - 0.02)
    assert beyond == pytest.approx(1 - ni.p_of_difference(parts, 0.02 * scale) / 2)


def test_few_examples_that_differ_are_given_the_variance_of_the_loss_in_question():
    difference = np.zeros((2, 200))
    difference[:, :2] = -1
    spread = spread_over_seeds(*by_seed(difference))
    observed = spread.by_example.var(ddof=1) / 200
    expected = float(ni.variance_at_loss(0, 2, 200, 0.05))
    assert observed < expected
    assert ni._standard_error_ratio(spread, 0.05) == pytest.approx(math.sqrt(observed / expected))
    assert ni._standard_error_ratio(spread, 0.001) == 1.0


def test_nothing_discordant_still_leaves_a_loss_possible():
    assert 0.003 < noninferiority_exact(0, 0, 872, 0.01).bound < 0.005
    assert noninferiority_exact(0, 0, 20, 0.01).p > 0.5


def test_a_discordance_that_is_surely_below_the_margin_leaves_the_smallest_p():
    assert noninferiority_exact(30, 30, 100_000, 0.01).p == BETA


def test_a_hundred_thousand_examples_agree_with_the_normal_limit():
    found = noninferiority_exact(3_000, 3_010, 100_000, 0.002)
    assert found.bound == pytest.approx(0.0001 + 1.96 * math.sqrt(6_010) / 100_000, abs=1e-5)


def test_impossible_counts_are_refused():
    for counts in ((3, 2, 4), (-1, 2, 9), (0, 0, 0)):
        with pytest.raises(ValueError, match="do not fit"):
            noninferiority_exact(*counts, 0.01)


def test_effective_counts_of_one_pair_are_its_own():
    assert effective_counts(np.array([1.0, 0, 0, -1, -1, 0])) == (1, 2, 6)
    assert effective_counts(np.zeros(5)) == (0, 0, 5)
    assert effective_counts(np.array([1.0, 0, -1, 0])) == (1, 1, 4)


def test_effective_counts_keep_mean_and_variance_and_round_to_the_careful_side():
    by_example = np.random.default_rng(0).integers(-3, 4, 3_000) / 3
    only_a, only_b, examples = effective_counts(by_example)
    loss, squares = (only_b - only_a) / examples, (only_a + only_b) / examples**2
    assert loss == pytest.approx(-by_example.mean(), abs=1e-3)
    assert loss >= -by_example.mean()
    assert squares == pytest.approx(np.sum(by_example**2) / 3_000**2, rel=1e-2)


def test_one_seed_on_each_side_and_seeds_that_agree_are_the_exact_test():
    a, b = pair(6, 3, 400)
    expected = noninferiority_exact(6, 3, 400, 0.02)
    assert noninferiority_over_seeds(spread_over_seeds({1: a}, {2: b}), 0.02) == expected
    found = noninferiority_over_seeds(spread_over_seeds(dict.fromkeys((1, 2, 3), a), dict.fromkeys((1, 2, 3), b)), 0.02)
    assert found.p == expected.p
    assert found.bound == expected.bound


@pytest.mark.parametrize("first", [0, 100], ids=["paired", "independent"])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_over_seeds_test_and_bound_belong_together_and_are_no_surer_than_the_two_sided_interval(seeds, first):
    rng = np.random.default_rng(seeds)
    for noise in (tables.MIXTURES["noise"], tables.MIXTURES["all three"]):
        for difference in tables.simulate(rng, 6, 200, noise, 0.02, seeds):
            seen = spread_over_seeds(*by_seed(difference, first))
            found = noninferiority_over_seeds(seen, 0.08)
            assert (found.p < ALPHA) == (found.bound < 0.08)
            at_bound = noninferiority_over_seeds(seen, found.bound).p
            assert at_bound == pytest.approx(ALPHA, abs=1e-4) or found.bound == 1
            compared = compare_over_seeds(seen)
            assert found.bound >= -compared.difference
            assert found.bound >= -compared.low - 0.004  # which the exact test may undercut by its rounding


@pytest.mark.parametrize("name", tables.MIXTURES)
def test_a_treatment_that_loses_the_margin_is_rarely_called_good_enough(name):
    for examples, margin, draws in ((64, 0.1, 1_000), (400, 0.03, 200)):
        found = tables.shares(draws, examples, tables.MIXTURES[name], margin, margin)
        assert (found * draws <= stats.binom.isf(1e-3, draws, ALPHA)).all()


def test_the_simulation_decides_as_the_test_does():
    for name in ("noise", "all three", "losses only"):
        difference = tables.simulate(np.random.default_rng(3), 25, 150, tables.MIXTURES[name], 0.02, 3)
        decided = [noninferiority_over_seeds(spread_over_seeds(*by_seed(d)), 0.09).p < ALPHA for d in difference]
        assert list(tables.good_enough(difference, 0.09)) == decided
        assert sum(decided) > 0


def test_the_level_table_is_what_the_simulation_gives():
    rows = table_rows("mixture")
    assert len(rows) == len(tables.LEVELS) * len(tables.MIXTURES)
    for examples, margin, name, *shown in rows:
        assert tables.LEVELS[int(examples.replace(",", ""))][0] == pytest.approx(float(margin) / 100)
        assert name in tables.MIXTURES
        assert max(map(float, shown)) < 3
    examples, margin, name, *shown = rows[2]
    found = tables.shares(tables.LEVELS[64][1], 64, tables.MIXTURES[name], 0.1, 0.1)
    assert [f"{100 * x:.1f}" for x in found] == shown


def table_rows(column):
    """The rows of the table in docs/statistics.md that has this column."""
    lines = (Path(__file__).parents[2] / "docs" / "statistics.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| examples") and column in line)
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def test_among_rows_that_lose_the_margin_reports_with_a_false_claim_stay_at_the_level():
    rng, false, reports = np.random.default_rng(1), 0, 150
    fewest = tables.boundary(tables.is_claimed, 300, 0.03)[1]
    for _ in range(reports):
        losses, gains = rng.multinomial(300, [0.04, 0.01, 0.95], size=5).T[:2]
        near = [(g, c) for g, c in zip(gains, losses, strict=True) if g >= fewest[c] - 2]
        p = [noninferiority_exact(int(g), int(c), 300, 0.03).p for g, c in near] + [1.0] * (5 - len(near))
        false += any(x < ALPHA for x in holm(p))
    assert false <= stats.binom.isf(1e-3, reports, ALPHA)

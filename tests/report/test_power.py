"""Power against closed forms and against the table that was simulated; what is needed is the least that suffices."""

import math

import numpy as np
import pytest
from scipy import stats

from distilbench.report.noninferiority import ALPHA, noninferiority_over_seeds
from distilbench.report.power import (
    DISCORDANCE,
    EXAMPLE_SHARE,
    MOST_SEEDS,
    PLANNED_SEEDS,
    POWER,
    Spread,
    assume_spread,
    estimate_spread,
    needed,
    needed_to_decide,
    plan_power,
    power,
)
from distilbench.report.statistics import spread_over_seeds
from distilbench.report.words import what_decides
from tests.report import margin_tables as tables
from tests.report.test_noninferiority import by_seed, pair, table_rows


def test_power_of_one_seed_is_the_normal_one_of_a_paired_difference():
    # Discordance of 5 %, 10,000 examples, a margin of 0.6 points: 1.96 standard errors and what is left of the margin.
    error = math.sqrt(0.05 / 10_000)
    expected = stats.norm.cdf(0.006 / error - stats.norm.isf(ALPHA))
    assert power(assume_spread(0.05), 1, 10_000, 0.006) == pytest.approx(expected, abs=0.01)


def test_power_of_many_seeds_that_shift_all_examples_is_that_of_a_t_test():
    seeds, shift = 12, 0.01
    spread, away = Spread(0.0, 0.0, shift**2), 0.01 * math.sqrt(seeds) / shift
    expected = stats.nct.sf(stats.t.isf(ALPHA, seeds - 1), seeds - 1, away)
    assert power(spread, seeds, 10**9, 0.01) == pytest.approx(expected, abs=0.01)


def test_planned_power_is_near_the_simulated_one_in_the_table():
    for examples, margin, discordance, *cells in table_rows("discordance"):
        for seeds, cell in zip(tables.SEEDS, cells, strict=True):
            simulated, planned = cell.rstrip(")").split(" (")
            design = int(examples.replace(",", "")), float(margin) / 100
            found = 100 * power(assume_spread(float(discordance) / 100), seeds, *design)
            assert f"{found:.0f}" == planned
            assert found == pytest.approx(float(simulated), abs=5)


def test_a_slice_of_the_simulated_table_comes_out_again():
    row = next(row for row in table_rows("discordance") if row[:3] == ["872", "2", "4"])
    found = tables.shares(300, 872, tables.noise_of(0.04, EXAMPLE_SHARE), 0.0, 0.02)
    for share, cell in zip(found, row[3:], strict=True):
        shown = float(cell.split()[0]) / 100
        assert share == pytest.approx(shown, abs=4 * math.sqrt(shown * (1 - shown) * (1 / 300 + 1 / 4_000)) + 0.005)


def test_a_loss_beyond_the_margin_is_decided_as_worse():
    spread = assume_spread(0.05)
    assert power(spread, 5, 5_000, 0.01, loss=0.03) > 0.99
    assert power(spread, 5, 5_000, 0.01, loss=0.005) < power(spread, 5, 5_000, 0.01)


def test_without_any_spread_everything_is_shown():
    assert power(Spread(0.0, 0.0), 3, 872, 0.01) == 1.0


def test_where_nothing_differed_few_examples_are_few_whatever_the_seeds():
    found = needed(Spread(0.0, 0.0), seeds=2, examples=32, margin=0.01)
    assert found.seeds is None
    assert found.examples is not None
    seen = [spread_over_seeds(*[{seed: np.ones(n, bool) for seed in (1, 2)}] * 2) for n in (32, found.examples)]
    assert [noninferiority_over_seeds(one, 0.01).p < ALPHA for one in seen] == [False, True], "as the test will say"


@pytest.mark.parametrize(("discordance", "examples"), [(0.04, 5_000), (0.10, 5_000), (0.06, 20_000)])
def test_needed_seeds_are_the_fewest_that_suffice(discordance, examples):
    spread = assume_spread(discordance)
    found = needed(spread, 1, examples, 0.01)
    assert power(spread, found.seeds, examples, 0.01) >= POWER
    assert found.seeds == 2 or power(spread, found.seeds - 1, examples, 0.01) < POWER
    assert found.examples is None
    assert needed(spread, 1, examples, 0.1).seeds == 2


def test_where_no_number_of_seeds_will_do_the_fewest_examples_are_counted():
    spread = assume_spread()
    found = needed(spread, 3, 872, 0.01)
    assert found.seeds is None
    assert found.floor == pytest.approx(1.96 * math.sqrt(EXAMPLE_SHARE * DISCORDANCE / 872), rel=1e-3)
    assert power(spread, 10**6, 872, 0.01) < POWER
    assert found.with_seeds == PLANNED_SEEDS
    assert power(spread, PLANNED_SEEDS, found.examples, 0.01) >= POWER
    assert power(spread, PLANNED_SEEDS, found.examples - 1, 0.01) < POWER


def test_where_very_many_seeds_are_needed_the_examples_are_counted_too():
    spread = Spread(example_variance=0.02, interaction_variance=0.4)
    found = needed(spread, 8, 2_000, 0.01)
    assert found.seeds > MOST_SEEDS
    assert found.examples > 2_000
    assert found.with_seeds == 8


def test_where_seeds_shift_too_much_more_examples_come_with_more_seeds():
    spread = Spread(example_variance=0.2, interaction_variance=0.03, seed_variance=0.02**2)
    found = needed(spread, 2, 872, 0.01)
    assert found.seeds is None
    assert found.with_seeds > PLANNED_SEEDS
    assert power(spread, found.with_seeds, found.examples, 0.01) >= POWER


def test_where_seeds_alone_are_too_far_apart_no_more_examples_are_asked_for():
    found = needed(Spread(example_variance=0.0, interaction_variance=0.03, seed_variance=0.1**2), 3, 872, 0.01)
    assert found.seeds > MOST_SEEDS
    assert found.examples is None


def test_more_settings_to_correct_for_need_more_seeds():
    alone, among = (needed(assume_spread(), 3, 5_000, 0.01, rows=rows) for rows in (1, 10))
    assert among.seeds > alone.seeds
    assert among.floor > alone.floor


def test_spread_seen_finds_the_parts_it_was_made_with():
    noise = tables.noise_of(0.08, 0.4)
    difference = tables.simulate(np.random.default_rng(2), 1, 40_000, noise, 0.0, 6)[0]
    seen = estimate_spread(spread_over_seeds(*by_seed(difference)))
    assert seen.example_variance == pytest.approx(0.4 * 0.08, rel=0.1)
    assert seen.interaction_variance == pytest.approx(0.6 * 0.08, rel=0.1)
    assert seen.seed_variance < 0.003**2
    shifted = tables.Noise(noise.example, 0.3, noise.chance)
    difference = tables.simulate(np.random.default_rng(2), 1, 40_000, shifted, 0.0, 40)[0]
    accuracy = (difference.mean(1, dtype=float)).std(ddof=1)
    assert estimate_spread(spread_over_seeds(*by_seed(difference))).seed_variance == pytest.approx(
        accuracy**2, rel=0.05
    )


def test_one_pair_shows_its_discordance_and_half_of_it_is_supposed_to_last():
    a, b = pair(20, 29, 1_000)
    assert estimate_spread(spread_over_seeds({1: a}, {1: b})) == assume_spread(0.05)
    assert estimate_spread(spread_over_seeds({1: a}, {2: a})).interaction_variance > 0


def test_needed_to_decide_supposes_no_loss_while_that_leaves_something_to_do():
    a, b = pair(20, 29, 872)
    seen = spread_over_seeds({1: a}, {1: b})
    assert needed_to_decide(seen, 0.01) == needed(assume_spread(50 / 872), 1, 872, 0.01)
    assert needed_to_decide(seen, 0.03) == needed(assume_spread(50 / 872), 1, 872, 0.03)
    assert needed_to_decide(seen, 0.03).seeds > 1


def test_needed_to_decide_supposes_the_loss_seen_where_the_seeds_at_hand_should_have_decided():
    difference = np.zeros((4, 5_000), int)
    difference[:, :120], difference[:, 120:215] = -1, 1  # all seeds agree: half a point lost, give or take 0.6
    seen = spread_over_seeds(*by_seed(difference))
    undecided, found = noninferiority_over_seeds(seen, 0.01), needed_to_decide(seen, 0.01)
    assert undecided.p > ALPHA
    assert power(estimate_spread(seen), 4, 5_000, 0.01) > POWER
    assert found == needed(estimate_spread(seen), 4, 5_000, 0.01, loss=0.005)
    assert found.seeds is None
    assert power(estimate_spread(seen), found.with_seeds, found.examples, 0.01, loss=0.005) >= POWER


def test_needed_to_decide_asks_for_one_more_seed_at_least():
    rng = np.random.default_rng(0)
    a, b = by_seed(rng.choice([-1, 0, 1], (4, 5_000), p=[0.002, 0.996, 0.002]))
    assert needed_to_decide(spread_over_seeds(a, b), 0.05).seeds == 5


def test_a_plan_says_whether_a_setting_without_loss_would_be_shown():
    assert plan_power(5_000, 5, 0.01)[0] >= POWER
    chance, told = plan_power(872, 3, 0.01, rows=7)
    assert chance < POWER
    assert told == needed(assume_spread(), 3, 872, 0.01, rows=7)
    assert plan_power(5_000, 5, 0.01, rows=20)[0] < plan_power(5_000, 5, 0.01)[0]


def test_examples_that_never_differed_are_too_few_rather_than_leaving_nothing():
    told = what_decides(needed_to_decide(spread_over_seeds(*2 * [dict.fromkeys((1, 2), np.ones(120))]), 0.01), 120)
    assert told.startswith("no number of seeds would decide it, because the 120 examples alone are too few; about ")

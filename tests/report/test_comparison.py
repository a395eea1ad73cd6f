"""What may be claimed of a row against the baseline, when it may not, and that claims keep their level together."""

from dataclasses import replace

import numpy as np
import pytest

from distilbench.report.comparison import compare_with_baseline, needed_to_confirm
from distilbench.report.noninferiority import ALPHA, noninferiority_exact
from distilbench.report.power import PLANNED_SEEDS, estimate_spread, needed, needed_to_decide
from distilbench.report.rows import find_baseline, rows_from
from distilbench.report.statistics import compare_over_seeds, mcnemar_exact, spread_over_seeds
from distilbench.report.tables import notes_of
from distilbench.report.words import describe_loss, describe_verdict
from distilbench.results import Predictions, Status, Verdict
from tests.report.made_trials import EXAMPLES, USUAL, failed, report_of, treatment, trial

FROZEN = treatment(freeze_layers=3)
COSINE = treatment(scheduler_name="cosine", optim_lr=3e-5)


def right(*wrong: range) -> np.ndarray:
    """All examples right but those in the ranges."""
    correct = np.ones(EXAMPLES, dtype=bool)
    for part in wrong:
        correct[list(part)] = False
    return correct


def test_one_seed_is_mcnemars_exact_test_and_says_that_it_is_one_seed():
    report = report_of(
        [trial(right=right(range(100))), trial(right=right(range(40)), place=1, settings=FROZEN)],
        selected_on_report_split=False,
    )
    (row,) = report.candidates
    assert row.difference.points == pytest.approx(100 * 60 / EXAMPLES)
    assert row.difference.p == mcnemar_exact(60, 0)
    assert (row.verdict, describe_verdict(row)) == (Verdict.BETTER, "better with this seed (n = 1)")


def test_several_seeds_are_paired_over_seeds_and_examples():
    trials = [trial(0.90, seed) for seed in (1, 2, 3)] + [trial(0.88, seed, 1, FROZEN) for seed in (1, 2, 3)]
    (row,) = report_of(trials).candidates
    correct = [{t.seed: t.predictions.correct for t in trials if t.started_ms == n} for n in (1, 0)]
    found = compare_over_seeds(spread_over_seeds(*correct))
    assert (row.difference.low, row.difference.high) == pytest.approx((100 * found.low, 100 * found.high))
    assert (row.difference.p, row.difference.num_seeds) == (found.p, 3)


def test_the_correction_counts_every_comparison():
    settings = [treatment(optim_lr=lr) for lr in (1e-4, 2e-4, 3e-4)]
    base = trial(right=right(range(100)))
    others = [trial(right=right(range(100 - gain)), place=i, settings=s)
              for i, (gain, s) in enumerate(zip((20, 6, 2), settings, strict=True), start=1)]  # fmt: skip
    report = report_of([base, *others], selected_on_report_split=False)
    p = [mcnemar_exact(gain, 0) for gain in (20, 6, 2)]
    assert [row.difference.p_holm for row in report.candidates] == pytest.approx([3 * p[0], 2 * p[1], p[2]])
    assert [row.verdict for row in report.candidates] == [Verdict.BETTER, Verdict.GOOD_ENOUGH, Verdict.GOOD_ENOUGH]


def test_rows_beyond_those_shown_are_counted_but_not_tested():
    base = trial(right=right(range(100)))
    others = [trial(right=right(range(95 - i)), place=i + 1, settings=treatment(optim_lr=i + 1.0)) for i in range(30)]
    rows = rows_from([base, *others])
    shown, _ = compare_with_baseline(rows, find_baseline(rows, USUAL), 1.0, shown=2)
    p = mcnemar_exact(34, 0)
    assert shown[0].difference.p_holm == pytest.approx(30 * p)
    assert (shown[2].verdict, describe_verdict(shown[2])) == (None, "not tested: beyond the rows asked for")
    assert shown[2].points == pytest.approx(100 * 32 / EXAMPLES)
    (asked, *_), _ = compare_with_baseline(rows, find_baseline(rows, USUAL), 1.0, num_settings=50)
    assert asked.difference.p_holm == pytest.approx(50 * p)


def test_the_correction_counts_what_was_pruned_or_failed_too():
    base = trial(right=right(range(100)))
    better = trial(right=right(range(80)), place=1, settings=FROZEN)
    stopped = [
        failed(status, n, treatment(optim_lr=float(n))) for n, status in enumerate((Status.PRUNED, Status.FAILED), 2)
    ]
    report = report_of([base, better, *stopped], selected_on_report_split=False)
    (row,) = report.candidates
    assert row.difference.p_holm == pytest.approx(3 * mcnemar_exact(20, 0))
    assert [(one.untested, one.verdict) for one in report.rows[2:]] == [(None, None)] * 2


def test_leads_on_a_split_that_also_chose_are_all_yet_to_be_confirmed():
    trials = [
        t for seed in (1, 2, 3) for t in (trial(0.85, seed), trial(0.95, seed, 1, FROZEN), trial(0.94, seed, 2, COSINE))
    ]
    picked = report_of(trials, selected_on_report_split=True)
    assert [row.verdict for row in picked.candidates] == [Verdict.AHEAD, Verdict.AHEAD]
    assert [describe_verdict(row) for row in picked.candidates] == ["ahead, to be confirmed (n = 3)"] * 2
    elsewhere = report_of(trials, selected_on_report_split=False)
    assert [describe_verdict(row) for row in elsewhere.candidates] == ["better (n = 3)"] * 2


def test_a_single_setting_beside_the_baseline_was_chosen_by_nobody():
    (row,) = report_of([trial(0.85), trial(0.95, 1, 1, FROZEN)], selected_on_report_split=True).candidates
    assert row.verdict is Verdict.BETTER


def test_worse_is_said_of_the_frozen_encoder():
    trials = [t for seed in (1, 2, 3) for t in (trial(0.95, seed), trial(0.85, seed, 1, FROZEN))]
    assert describe_verdict(report_of(trials).candidates[0]) == "worse (n = 3)"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"predictions": None}, "not tested: predictions are missing"),
        (
            {"predictions": Predictions(np.arange(600) % 2, np.eye(2)[np.arange(600) % 2])},
            "not tested: predictions are of other examples",
        ),
    ],
)
def test_what_cannot_be_tested_says_why(changes, why):
    (row,) = report_of([trial(0.9), trial(0.95, 1, 1, FROZEN, **changes)]).candidates
    assert (row.verdict, row.difference, describe_verdict(row)) == (None, None, why)
    assert row.points == pytest.approx(5, abs=0.1)


def test_seeds_that_the_baseline_lacks_are_named():
    trials = [trial(0.9, 42), trial(0.95, 1, 1, FROZEN), trial(0.95, 2, 1, FROZEN)]
    assert describe_verdict(report_of(trials).candidates[0]) == "not tested: the baseline lacks seeds 1, 2"


def test_a_difference_over_fewer_seeds_than_the_accuracy_says_so():
    trials = [trial(0.9, 1), trial(0.9, 2), *(trial(a, s, 1, FROZEN) for s, a in ((1, 0.91), (2, 0.93), (5, 0.99)))]
    report = report_of(trials)
    (row,) = report.candidates
    assert (row.num_seeds, row.difference.num_seeds) == (3, 2)
    assert row.points == row.difference.points
    said = "Differences are over the seeds (n) that the baseline has as well, accuracies over all."
    assert said in notes_of(report)
    assert said not in notes_of(report_of(trials[:-1]))
    assert said in notes_of(report_of([trial(0.8, 3), *trials[:-1]])), "the baseline has more"
    assert said not in notes_of(report_of([*trials[2:], *(trial(0.9, s) for s in (7, 8))])), "unpaired: all count"


def test_with_a_baseline_that_failed_rows_are_shown_untested():
    (row,) = report_of([failed(Status.DIVERGED, 0, treatment()), trial(0.9, 1, 1, FROZEN)]).candidates
    assert describe_verdict(row) == "not tested: the baseline did not finish"
    assert np.isnan(row.points)


def pair(gains: int, losses: int, margin: float = 1.0, **terms):
    """A row that alone is right on ``gains`` examples, and whose baseline is on ``losses``."""
    base = trial(right=right(range(gains)))
    ours = trial(right=right(range(gains, gains + losses)), place=1, settings=FROZEN)
    (row,) = report_of([base, ours], selected_on_report_split=False, margin=margin, **terms).candidates
    return row


def test_a_loss_shown_to_be_below_the_margin_is_good_enough():
    row = pair(2, 3, margin=2.0)
    found = noninferiority_exact(2, 3, EXAMPLES, 0.02)
    assert (row.verdict, row.difference.needed) == (Verdict.GOOD_ENOUGH, None)
    assert row.difference.loses_at_most == pytest.approx(100 * found.bound)
    assert row.difference.p_loss == found.p
    assert describe_verdict(row) == "good enough (n = 1)"


def test_a_row_that_loses_but_less_than_the_margin_is_good_enough():
    row = pair(0, 9, margin=5.0)
    assert describe_loss(row.difference).startswith("loses 1.03 points, at most ")
    assert row.verdict is Verdict.GOOD_ENOUGH
    assert pair(0, 9, margin=0.5).verdict is Verdict.WORSE


def test_an_undecided_row_says_what_would_decide():
    row = pair(30, 30, margin=1.0)
    assert row.verdict is Verdict.UNDECIDED
    seen = spread_over_seeds({1: right(range(30, 60))}, {1: right(range(30))})
    assert row.difference.needed == needed_to_decide(seen, 0.01)
    assert (row.difference.needed.seeds, row.difference.needed.examples > EXAMPLES) == (None, True)
    assert pair(20, 24, margin=2.0).difference.needed.seeds > 1


def test_largest_losses_hold_for_whichever_setting_is_picked():
    base = trial(right=right(range(40)))
    losses = (0, 2, 30)
    rows = [trial(right=right(range(40 + loss)), place=i, settings=treatment(optim_lr=float(i)))
            for i, loss in enumerate(losses, start=1)]  # fmt: skip
    alone, together = (
        [100 * noninferiority_exact(0, loss, EXAMPLES, 0.01, level).bound for loss in losses]
        for level in (ALPHA, ALPHA / 3)
    )
    found = report_of([base, *rows], selected_on_report_split=False, margin=0.7).candidates
    assert [row.difference.loses_at_most for row in found] == pytest.approx(together)
    assert alone[1] < 1 < together[1], "Holm shows what the bounds of all settings together can't"
    found = report_of([base, *rows], selected_on_report_split=False, margin=1.0).candidates
    assert (found[1].verdict, found[1].difference.loses_at_most) == (Verdict.GOOD_ENOUGH, 1.0)


@pytest.mark.parametrize("status", [Status.DIVERGED, Status.PRUNED])
def test_the_seeds_that_were_lucky_do_not_speak_for_those_that_were_stopped(status):
    trials = [trial(0.90, seed) for seed in (1, 2, 3)] + [trial(0.95, seed, 1, FROZEN) for seed in (1, 3)]
    stopped = replace(failed(status, 4, FROZEN), seed=2)
    (row,) = report_of([*trials, stopped], selected_on_report_split=False).candidates
    assert describe_verdict(row) == "not judged: other seeds diverged or were pruned"
    assert (row.verdict, row.difference.num_seeds) == (None, 2)
    worse = [*trials[:3], *(trial(0.85, seed, 1, FROZEN) for seed in (1, 3)), stopped]
    assert report_of(worse, selected_on_report_split=False).candidates[0].verdict is Verdict.WORSE
    again = [*trials, stopped, trial(0.95, 2, 5, FROZEN)]
    assert report_of(again, selected_on_report_split=False).candidates[0].verdict is Verdict.BETTER
    assert report_of([*trials, replace(stopped, status=Status.OUT_OF_MEMORY)]).candidates[0].verdict is Verdict.BETTER


def test_both_corrections_count_what_was_tried():
    base = trial(right=right(range(40)))
    rows = [trial(right=right(range(40 - gain)), place=i, settings=treatment(optim_lr=float(i)))
            for i, gain in enumerate((3, 1), start=1)]  # fmt: skip
    stopped = failed(Status.PRUNED, 3, treatment(optim_lr=3.0))
    first, second = report_of([base, *rows, stopped], selected_on_report_split=False).candidates
    p = [noninferiority_exact(gain, 0, EXAMPLES, 0.01).p for gain in (3, 1)]
    assert (first.difference.p_loss, second.difference.p_loss) == tuple(p)
    assert first.difference.p_loss_holm == pytest.approx(3 * p[0])
    assert second.difference.p_loss_holm == pytest.approx(max(2 * p[1], 3 * p[0]))


def test_a_confirmation_is_planned_for_the_row_that_needs_most_seeds_then_most_examples():
    base, *rows = rows_from(
        [trial(right=right(range(40)))]
        + [trial(right=right(range(n, n + 41)), place=n, settings=treatment(optim_lr=float(n))) for n in (10, 20, 40)]
    )

    def alone(row, margin: float):
        spread = spread_over_seeds(*({1: one.predictions[1].correct} for one in (row, base)))
        return needed(estimate_spread(spread), PLANNED_SEEDS, EXAMPLES, margin / 100, rows=7)

    near, middle, far = (alone(row, 2.5) for row in rows)
    assert near.seeds < middle.seeds
    assert far.seeds is None
    assert needed_to_confirm(rows[:2], base, 2.5, 7) == middle
    assert needed_to_confirm([rows[2], *rows[:2]], base, 2.5, 7) == far
    assert needed_to_confirm([rows[0], rows[2]], base, 1.0, 7) == alone(rows[2], 1.0)
    assert needed_to_confirm([rows[0], replace(rows[1], trials=(trial(predictions=None),))], base, 2.5, 7) is None

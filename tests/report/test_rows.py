"""One row per setting: how seeds come together, who is the baseline, what may be claimed and when it may not."""

from dataclasses import replace

import numpy as np
import pytest

from distilbench.report.rows import against_baseline, find_baseline, label_rows, rows_from
from distilbench.report.statistics import compare_over_seeds, mcnemar_exact
from distilbench.report.words import said
from distilbench.results import Predictions, Status, Verdict
from distilbench.settings import SettingsError
from tests.report.made_trials import EXAMPLES, USUAL, failed, report_of, sweep, treatment, trial

FROZEN = treatment(freeze_layers=3)
COSINE = treatment(scheduler_name="cosine", optim_lr=3e-5)


def right(*wrong: range) -> np.ndarray:
    """All examples right but those in the ranges."""
    correct = np.ones(EXAMPLES, dtype=bool)
    for part in wrong:
        correct[list(part)] = False
    return correct


def test_seeds_of_a_setting_are_one_row_with_mean_and_deviation():
    rows = rows_from([trial(0.90, 1), trial(0.92, 2), trial(0.91, 3, train_seconds=1000.0), trial(0.8, 1, 9, FROZEN)])
    assert [row.n for row in rows] == [3, 1]
    values = [trial(a).accuracy for a in (0.90, 0.92, 0.91)]
    assert rows[0].accuracy == pytest.approx(np.mean(values))
    assert rows[0].accuracy_deviation == pytest.approx(np.std(values, ddof=1))
    assert rows[0].cost.seconds == pytest.approx((1371 + 1371 + 1000) / 3)
    assert rows[0].seeds == (1, 2, 3)
    assert rows[1].accuracy_deviation is None


def test_the_best_comes_first_and_what_did_not_finish_last_but_is_there():
    rows = rows_from([failed(Status.DIVERGED, 1, COSINE), trial(0.8, 1, 2, FROZEN), trial(0.9)])
    assert [row.status for row in rows] == ["FINISHED", "FINISHED", "DIVERGED"]
    assert rows[0].accuracy > rows[1].accuracy
    assert np.isnan(rows[2].accuracy)
    assert rows[2].other_trials[0].error.startswith("the loss is nan")


def test_a_setting_with_a_failed_seed_says_so():
    (row,) = rows_from([trial(0.9), replace(failed(Status.OUT_OF_MEMORY, 1, treatment()), seed=2)])
    assert (row.n, row.status) == (1, "1 FINISHED, 1 OUT_OF_MEMORY")


def test_of_a_seed_trained_twice_the_newest_counts():
    (row,) = rows_from([trial(0.95, 1, 7), trial(0.90, 1, 3)])
    assert (row.n, len(row.other_trials), row.trials[0].started_ms) == (1, 1, 7)


def test_labels_are_what_tells_a_row_from_the_baseline_the_most_telling_first():
    report = report_of([trial(0.9), trial(0.89, 1, 1, FROZEN), trial(0.91, 1, 2, COSINE)])
    labels = {row.label for row in report.rows}
    assert labels == {
        "baseline: layers=0 scheduler=linear lr=2e-05",
        "layers=3",
        "scheduler=cosine lr=3e-05",
    }


def test_embeddings_are_told_where_they_do_not_follow_the_layers():
    unfrozen = FROZEN | {"freeze.embeddings": False}
    report = report_of([trial(0.9), trial(0.89, 1, 1, FROZEN), trial(0.88, 1, 2, unfrozen)])
    assert {row.label for row in report.candidates} == {
        "layers=3 embeddings=true", "layers=3"
    }  # fmt: skip


def test_names_of_experiments_go_before_what_differs():
    from distilbench.identity import short_hash

    names = {short_hash(treatment()): "baseline", short_hash(FROZEN): "layer_freezing"}
    rows = label_rows(rows_from([trial(0.9), trial(0.89, 1, 1, FROZEN)], names), baseline=0)
    assert [row.label for row in rows] == ["baseline: layers=0", "layer_freezing: layers=3"]


def test_the_baseline_has_the_reports_choices_and_what_most_trials_share():
    long = treatment() | {"train.epochs": 5}
    rows = rows_from([trial(0.95, 1, 1, FROZEN), trial(0.94, 1, 2, long), trial(0.9, 1, 3)])
    assert rows[find_baseline(rows, USUAL)].treatment == treatment()
    assert find_baseline(rows[:1], USUAL) is None


def test_a_sweeps_own_baseline_and_one_that_is_named_go_first():
    rows = rows_from([trial(0.9), trial(0.89, 1, 1, FROZEN, role="baseline"), trial(0.91, 1, 2, COSINE, run_id="mine")])
    assert rows[find_baseline(rows, USUAL)].treatment == FROZEN
    assert rows[find_baseline(rows, USUAL, run_id="mine")].treatment == COSINE
    assert find_baseline(rows, USUAL, run_id="nobody") is None


def test_two_baselines_are_refused_with_the_remedy():
    rows = rows_from([trial(0.9, role="baseline"), trial(0.89, 1, 1, FROZEN, role="baseline")])
    with pytest.raises(SettingsError, match=r"^baseline must be one setting, got 2 .*; name one: baseline="):
        find_baseline(rows, USUAL)


def test_one_seed_is_mcnemars_exact_test_and_says_that_it_is_one_seed():
    report = report_of(
        [trial(right=right(range(100))), trial(right=right(range(40)), place=1, settings=FROZEN)], is_picked_here=False
    )
    (row,) = report.candidates
    assert row.difference.points == pytest.approx(100 * 60 / EXAMPLES)
    assert row.difference.p == mcnemar_exact(60, 0)
    assert (row.verdict, said(row)) == (Verdict.BETTER, "better with this seed (n = 1)")


def test_several_seeds_are_paired_over_seeds_and_examples():
    trials = [trial(0.90, seed) for seed in (1, 2, 3)] + [trial(0.88, seed, 1, FROZEN) for seed in (1, 2, 3)]
    (row,) = report_of(trials).candidates
    correct = [{t.seed: t.predictions.correct for t in trials if t.started_ms == n} for n in (1, 0)]
    found = compare_over_seeds(*correct)
    assert (row.difference.low, row.difference.high) == pytest.approx((100 * found.low, 100 * found.high))
    assert (row.difference.p, row.difference.n, row.difference.paired) == (found.p, 3, True)


def test_the_correction_counts_every_comparison():
    settings = [treatment(optim_lr=lr) for lr in (1e-4, 2e-4, 3e-4)]
    base = trial(right=right(range(100)))
    others = [trial(right=right(range(100 - gain)), place=i, settings=s)
              for i, (gain, s) in enumerate(zip((20, 6, 2), settings, strict=True), start=1)]  # fmt: skip
    report = report_of([base, *others], is_picked_here=False)
    p = [mcnemar_exact(gain, 0) for gain in (20, 6, 2)]
    assert [row.difference.p_holm for row in report.candidates] == pytest.approx([3 * p[0], 2 * p[1], p[2]])
    assert [row.verdict for row in report.candidates] == [Verdict.BETTER, Verdict.UNDECIDED, Verdict.UNDECIDED]


def test_rows_beyond_those_shown_are_counted_but_never_read():
    base = trial(right=right(range(100)))
    others = [trial(right=right(range(95 - i)), place=i + 1, settings=treatment(optim_lr=i + 1.0)) for i in range(30)]
    rows = rows_from([base, *others])
    baseline, read = find_baseline(rows, USUAL), []
    shown = against_baseline(
        rows, baseline, lambda t: read.append(t.run_id) or t.predictions, shown=2, is_picked_here=False
    )
    assert set(read) == {base.run_id, others[-1].run_id, others[-2].run_id}
    p = mcnemar_exact(34, 0)
    assert shown[0].difference.p_holm == pytest.approx(30 * p)
    assert (shown[2].verdict, said(shown[2])) == (None, "not tested: beyond the rows asked for")
    assert shown[2].points == pytest.approx(100 * 32 / EXAMPLES)


def test_the_correction_counts_what_was_pruned_or_failed_too():
    base = trial(right=right(range(100)))
    better = trial(right=right(range(80)), place=1, settings=FROZEN)
    stopped = [
        failed(status, n, treatment(optim_lr=float(n))) for n, status in enumerate((Status.PRUNED, Status.FAILED), 2)
    ]
    (row,) = report_of([base, better, *stopped], is_picked_here=False).candidates
    assert row.difference.p_holm == pytest.approx(3 * mcnemar_exact(20, 0))


def test_leads_on_a_split_that_also_chose_are_all_yet_to_be_confirmed():
    trials = [
        t for seed in (1, 2, 3) for t in (trial(0.85, seed), trial(0.95, seed, 1, FROZEN), trial(0.94, seed, 2, COSINE))
    ]
    picked = report_of(trials, is_picked_here=True)
    assert [row.verdict for row in picked.candidates] == [Verdict.AHEAD, Verdict.AHEAD]
    assert [said(row) for row in picked.candidates] == ["ahead, to be confirmed (n = 3)"] * 2
    elsewhere = report_of(trials, is_picked_here=False)
    assert [said(row) for row in elsewhere.candidates] == ["better (n = 3)"] * 2


def test_a_single_setting_beside_the_baseline_was_chosen_by_nobody():
    (row,) = report_of([trial(0.85), trial(0.95, 1, 1, FROZEN)], is_picked_here=True).candidates
    assert row.verdict is Verdict.BETTER


def test_worse_is_said_of_the_frozen_encoder():
    trials = [t for seed in (1, 2, 3) for t in (trial(0.95, seed), trial(0.85, seed, 1, FROZEN))]
    assert said(report_of(trials).candidates[0]) == "worse (n = 3)"


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
    assert (row.verdict, row.difference, said(row)) == (None, None, why)
    assert row.points == pytest.approx(5, abs=0.1)


def test_seeds_that_the_baseline_lacks_are_named():
    trials = [trial(0.9, 42), trial(0.95, 1, 1, FROZEN), trial(0.95, 2, 1, FROZEN)]
    assert said(report_of(trials).candidates[0]) == "not tested: the baseline lacks seeds 1, 2"


def test_with_a_baseline_that_failed_rows_are_shown_untested():
    report = report_of([failed(Status.DIVERGED, 0, treatment()), trial(0.9, 1, 1, FROZEN)])
    assert said(report.candidates[0]) == "not tested: the baseline did not finish"


def test_among_settings_that_do_not_differ_sweeps_that_call_one_better_stay_at_the_level():
    """600 sweeps of four equal settings with three seeds: at most 5 % and three standard errors may claim something.

    A trial errs on an example by the example's difficulty, so that trials agree as real ones do.
    """
    rng = np.random.default_rng(1)
    claims = 0
    for _ in range(600):
        difficulty = rng.beta(0.6, 4, size=200)
        trials = [
            trial(None, seed, n, treatment(optim_lr=1e-5 * (2 + n)), right=rng.random(200) > difficulty)
            for n in range(5)
            for seed in (1, 2, 3)
        ]
        report = report_of(trials, is_picked_here=False)
        claims += any(row.verdict is not Verdict.UNDECIDED for row in report.candidates)
    assert claims / 600 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 600)


def test_a_sweep_of_two_hundred_settings_keeps_every_trial():
    trials = sweep(200, seeds=2)
    report = report_of(trials)
    assert sum(len(row.all_trials) for row in report.rows) == len(trials)

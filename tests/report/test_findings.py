"""What many rows say together: the sentence on top, and the figures behind the charts."""

import pytest

from distilbench.report.findings import (
    Confirmed,
    by_depth,
    comparable_in_time,
    expected_best,
    headline,
    importance,
    pareto_front,
    saving,
)
from distilbench.report.rows import rows_from
from distilbench.report.statistics import expected_best_of_k
from distilbench.results import Status
from tests.report.made_trials import failed, report_of, sweep, treatment, trial

FROZEN, COSINE = treatment(freeze_layers=3), treatment(scheduler_name="cosine")


def three(best=0.90, seeds=(1, 2, 3), is_picked_here=False, **changes):
    trials = [
        made
        for seed in seeds
        for made in (
            trial(0.90, seed),
            trial(0.897, seed, 1, FROZEN, train_seconds=888.0),
            trial(best, seed, 2, COSINE),
        )
    ]
    return report_of(trials, is_picked_here, **changes)


def test_nothing_better_is_said_plainly_and_the_saving_with_its_price():
    report = three()
    assert headline(report) == "None of the 2 settings tried was shown to be better than the baseline."
    said = saving(report)
    assert said.startswith("Most time saved without a shown loss: layers=3, 35 % less (-0.34 points, 95 % ")


def test_something_better_is_named_with_size_and_interval():
    said = headline(three(best=0.95))
    assert said.startswith("scheduler=cosine is better: +4.93 points (95 % +3.")
    assert said.endswith(", of the 2 settings tried.")
    assert "ahead of the baseline, yet to be confirmed" in headline(three(best=0.95, is_picked_here=True))


def test_without_a_saving_nothing_is_said_of_one():
    assert saving(report_of([trial(0.9), trial(0.9, 1, 1, COSINE, train_seconds=1340.0)])) == ""


@pytest.mark.parametrize(
    ("trials", "said"),
    [
        ([failed(Status.DIVERGED, 1, FROZEN), failed(Status.OUT_OF_MEMORY, 2, COSINE)],
         "No trial finished: 1 DIVERGED, 1 OUT_OF_MEMORY."),
        ([failed(Status.DIVERGED, 0, treatment()), trial(0.9, 1, 1, FROZEN)],
         "1 setting finished, compared with nothing: there is no finished baseline."),
        ([trial(0.9)], "Only the baseline finished: there is nothing to compare it with."),
        ([trial(0.9, 42), trial(0.9, 1, 1, FROZEN), trial(0.9, 2, 1, FROZEN)],
         "Nothing could be tested against the baseline: the baseline lacks seeds 1, 2."),
    ],
)  # fmt: skip
def test_sweeps_that_answer_nothing_say_why(trials, said):
    assert headline(report_of(trials)) == said


def confirmed(first, again):
    """The report of a confirmation of ``scheduler=cosine`` with these accuracies in the sweep and anew."""
    before = next(row for row in three(first, seeds=(1,)).candidates if "cosine" in row.label)
    after = next(row for row in three(again).candidates if "cosine" in row.label)
    return three(again, confirmation=(Confirmed(after.label, before, after),))


def test_a_confirmation_tells_whether_the_advantage_survived_with_both_figures():
    said = headline(confirmed(0.95, 0.95))
    assert said.startswith("The advantage of scheduler=cosine survived fresh seeds: +4.93 points (95 % +2.76")
    assert ", n = 1) in the sweep; +4.93 points (" in said
    assert said.endswith(", n = 3) in the confirmation.")
    assert "did not survive fresh seeds: +4.93" in headline(confirmed(0.95, 0.90))
    assert "was none in the sweep either" in headline(confirmed(0.89, 0.89))


def test_the_pareto_front_holds_what_no_other_beats_in_both():
    rows = rows_from([
        trial(0.90, 1, 0, train_seconds=100.0),
        trial(0.88, 1, 1, FROZEN, train_seconds=50.0),
        trial(0.87, 1, 2, COSINE, train_seconds=60.0),
        trial(0.90, 1, 3, treatment(optim_lr=1.0), train_seconds=120.0),
    ])  # fmt: skip
    assert [row.seconds for row in pareto_front(rows)] == [50.0, 100.0]


def test_times_measured_elsewhere_stay_off_the_axis():
    report = report_of([trial(0.9), trial(0.9, 1, 1, FROZEN, measured_on="cuda"), trial(0.9, 1, 2, COSINE)])
    assert len(comparable_in_time(report)) == 2


def test_accuracies_by_depth_shallowest_first():
    rows = rows_from([trial(0.88, 1, 1, FROZEN), trial(0.90), trial(0.91, 1, 2, COSINE)])
    found = by_depth(rows)
    assert list(found) == [0, 3]
    assert found[0] == pytest.approx([0.91, 0.90], abs=0.001)


def test_expected_best_is_dodges_formula_up_to_all_settings():
    rows = rows_from([trial(0.90), trial(0.88, 1, 1, FROZEN), trial(0.91, 1, 2, COSINE)])
    values = [row.accuracy for row in rows]
    assert expected_best(rows) == [(k, pytest.approx(expected_best_of_k(values, k))) for k in (1, 2, 3)]


def test_importance_finds_the_parameter_that_moves_accuracy():
    rates = [10 ** (-5 + i / 20) for i in range(40)]
    rows = rows_from([
        trial(0.8 + 0.003 * i, 1, i, treatment(optim_lr=rate, scheduler_name=("linear", "cosine")[i % 2]))
        for i, rate in enumerate(rates)
    ])  # fmt: skip
    shares = importance(rows)
    assert list(shares) == ["optim.lr", "scheduler.name"]
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)


def test_importance_of_few_trials_is_not_told():
    assert importance(rows_from(sweep(6))) == {}

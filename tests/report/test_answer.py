"""The answer on top of a report: which setting, what it saves, what it costs, and how sure that is."""

import pytest

from distilbench.report.answer import answer
from distilbench.report.findings import Confirmed
from distilbench.results import Status
from tests.report.made_trials import failed, report_of, treatment, trial

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
    assert answer(report)[0] == "None of the 2 settings tried was shown to be better than the baseline."
    said = answer(report)[1]
    assert said.startswith("Most time saved without a shown loss: layers=3, 35 % less (-0.34 points, 95 % ")


def test_something_better_is_named_with_size_and_interval():
    said = answer(three(best=0.95))[0]
    assert said.startswith("scheduler=cosine is better: +4.93 points (95 % +3.")
    assert said.endswith(", of the 2 settings tried.")
    assert "ahead of the baseline, yet to be confirmed" in answer(three(best=0.95, is_picked_here=True))[0]


def test_without_a_saving_nothing_is_said_of_one():
    assert len(answer(report_of([trial(0.9), trial(0.9, 1, 1, COSINE, train_seconds=1340.0)]))) == 1


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
    assert answer(report_of(trials)) == [said]


def confirmed(first, again):
    """The report of a confirmation of ``scheduler=cosine`` with these accuracies in the sweep and anew."""
    before = next(row for row in three(first, seeds=(1,)).candidates if "cosine" in row.label)
    after = next(row for row in three(again).candidates if "cosine" in row.label)
    return three(again, confirmation=(Confirmed(after.label, before, after),))


def test_a_confirmation_tells_whether_the_advantage_survived_with_both_figures():
    said = answer(confirmed(0.95, 0.95))[0]
    assert said.startswith("The advantage of scheduler=cosine survived fresh seeds: +4.93 points (95 % +2.76")
    assert ", n = 1) in the sweep; +4.93 points (" in said
    assert said.endswith(", n = 3) in the confirmation.")
    assert "did not survive fresh seeds: +4.93" in answer(confirmed(0.95, 0.90))[0]
    assert "was none in the sweep either" in answer(confirmed(0.89, 0.89))[0]


def test_settings_that_were_pruned_or_failed_were_tried_and_are_counted():
    stopped = [failed(Status.PRUNED, n, treatment(optim_lr=n * 1e-3)) for n in (3, 4)]
    report = report_of(
        [trial(0.9), trial(0.9, 1, 1, FROZEN), *stopped, failed(Status.DIVERGED, 5, treatment(optim_lr=1.0))]
    )
    said = answer(report)[0]
    assert said == "None of the 4 settings tried (2 pruned, 1 diverged) was shown to be better than the baseline."

"""The answer on top of a report: the cheapest setting that is good enough, what it saves, what it costs at most."""

from dataclasses import replace

import pytest

from distilbench.report.columns import CSV, NARROW
from distilbench.report.findings import answer, trial_to_use
from distilbench.report.rows import rows_from
from distilbench.report.words import describe_verdict
from distilbench.results import Status, Verdict
from tests.report.made_trials import failed, report_of, treatment, trial

FROZEN, COSINE = treatment(freeze_layers=3), treatment(scheduler_name="cosine")
COSTS = {"train_flops": 690e12, "peak_memory_bytes": 2e9}
CHEAP = {"train_flops": 366e12, "train_seconds": 850.0, "peak_memory_bytes": 1.5e9}


def three(best=0.90, frozen=0.897, seeds=(1, 2, 3), selected_on_report_split=False, margin=5.0, **changes):
    """The baseline, three frozen layers at half of the cost, and a cosine, each with these seeds."""
    trials = [
        made
        for seed in seeds
        for made in (
            trial(0.90, seed, **COSTS),
            trial(frozen, seed, 1, FROZEN, **CHEAP),
            trial(best, seed, 2, COSINE, **COSTS),
        )
    ]
    return report_of(trials, selected_on_report_split, margin=margin, **changes)


def test_the_cheapest_good_enough_setting_is_named_with_what_it_saves_and_costs_at_most():
    (told,) = answer(three())
    row = next(row for row in three().candidates if row.label == "layers=3")
    assert told == (
        f"layers=3 is good enough: it loses at most {row.difference.loses_at_most:.2f} points, "
        "and takes 47 % fewer FLOPs, 38 % less time, 25 % less memory; "
        "the cheapest of 2 such settings, of the 2 settings tried."
    )


def test_a_verdict_of_one_seed_says_with_this_seed():
    first, second = answer(three(seeds=(1,), margin=5.0, best=0.95))
    assert first.startswith("layers=3 is good enough with this seed: it loses")
    assert second.startswith("Most accurate: scheduler=cosine is better with this seed, +")


def test_a_more_accurate_setting_is_named_second():
    report = three(best=0.95)
    first, second = answer(report)
    assert first.startswith("layers=3 is good enough")
    assert second.startswith("Most accurate: scheduler=cosine is better, +4.93 points (95 % +3.")
    assert [trial_to_use(report, best).treatment for best in ("answer", "accuracy")] == [FROZEN, COSINE]


def test_a_better_one_alone_tells_its_size_and_a_lead_that_it_is_to_be_confirmed():
    (told,) = answer(three(best=0.95, frozen=0.6))
    assert told.startswith("scheduler=cosine is better, +4.93 points (95 % +3.")
    assert told.endswith("; the only one of the 2 settings tried.")
    (told,) = answer(three(best=0.95, frozen=0.6, selected_on_report_split=True))
    assert told.startswith("scheduler=cosine is ahead, yet to be confirmed, +4.93 points (95 % +3.")


def test_where_nothing_is_good_enough_the_cheapest_open_one_tells_what_would_decide():
    first, second = answer(three(margin=1.0))
    assert (
        first == "None of the 2 settings tried was shown to be better than the baseline, or to lose less than 1 point."
    )
    assert second.startswith("Undecided: layers=3 (47 % fewer FLOPs, 38 % less time, 25 % less memory) may lose up to ")
    assert second.endswith(" points; 17 seeds would decide it.")


def test_of_what_is_open_a_setting_that_lost_less_than_the_margin_is_named_though_another_is_cheaper():
    first, second = answer(three(best=0.899, frozen=0.885, seeds=(1,), margin=1.0))
    assert first.startswith("None of the 2 settings tried")
    assert second.startswith("Undecided: scheduler=cosine may lose up to ")


def test_what_is_shown_to_lose_too_much_leaves_nothing_open():
    report = three(best=0.7, frozen=0.7)
    assert answer(report) == [
        "None of the 2 settings tried was shown to be better than the baseline, or to lose less than 5 points."
    ]
    assert trial_to_use(report, "answer").treatment == treatment(), "the baseline's model is the one to use"


@pytest.mark.parametrize(("elsewhere", "cheapest"), [({}, "layers=3"), ({"measured_on": "cuda"}, "scheduler=cosine")])
def test_without_flops_the_cheapest_takes_least_time_or_where_that_is_not_comparable_fewest_parameters(
    elsewhere, cheapest
):
    frozen = trial(0.9, 1, 1, FROZEN, train_seconds=850.0, **elsewhere)
    cosine = trial(0.9, 1, 2, COSINE, trainable_parameters=9)
    told = answer(report_of([trial(0.9), frozen, cosine], False, margin=5.0))
    assert told[0].startswith(f"{cheapest} is good enough")


def test_what_loses_little_without_having_learned_is_no_answer_and_the_sentence_says_why():
    report = report_of([trial(0.56), trial(0.51, 1, 1, FROZEN), trial(0.5, 1, 2, COSINE)], False, margin=20.0)
    assert [(row.final_verdict, row.has_learned, describe_verdict(row)) for row in report.candidates] == [
        (None, False, "has not learned")
    ] * 2
    assert answer(report)[0] == (
        "None of the 2 settings tried was shown to be better than the baseline, or to lose less than 20 points; "
        "2 settings have not learned."
    )


def test_beside_a_baseline_that_has_not_learned_nothing_is_praised():
    report = report_of([trial(0.5), trial(0.9, 1, 1, FROZEN), trial(0.5, 1, 2, COSINE)], False, margin=20.0)
    assert [describe_verdict(row) for row in report.candidates] == [
        "not judged: the baseline has not learned", "has not learned"
    ]  # fmt: skip
    assert answer(report) == [
        "The baseline has not learned: 50.00 %, while always predicting the most frequent label scores 50.00 %. "
        "No setting can be judged against it.",
        "Most accurate: layers=3, 90.02 %.",
    ]
    assert trial_to_use(report, "answer").treatment == FROZEN
    assert trial_to_use(report_of([failed(Status.DIVERGED, 1, FROZEN)]), "answer") is None


def test_a_saving_of_time_within_its_noise_is_not_told_of():
    base = [trial(0.9, seed, train_flops=1e15, train_seconds=s) for seed, s in ((1, 100.0), (2, 160.0))]
    frozen = [trial(0.9, seed, 1, FROZEN, train_flops=5e14, train_seconds=s) for seed, s in ((1, 70.0), (2, 110.0))]
    (told,) = answer(report_of([*base, *frozen], False, margin=5.0))
    assert told.endswith("and takes 50 % fewer FLOPs.")
    assert "time" not in told


def test_estimates_of_time_are_called_so():
    shared = {**CHEAP, "alone": False, "solo_seconds_estimate": 850.0}
    (told,) = answer(report_of([trial(0.9, **COSTS), trial(0.9, 1, 1, FROZEN, **shared)], False, margin=5.0))
    assert "47 % fewer FLOPs, about 38 % less time." in told


def test_a_saving_against_an_estimate_is_marked_as_an_estimate():
    shared = {**COSTS, "alone": False, "solo_seconds_estimate": 1371.0}
    report = report_of([trial(0.9, **shared), trial(0.9, 1, 1, FROZEN, **CHEAP)], False, margin=5.0)
    (told,), (row,) = answer(report), report.candidates
    assert "47 % fewer FLOPs, about 38 % less time." in told
    assert CSV["train_seconds"].text(row) == "14 min 10 s (about 38 % less)"
    (narrow,) = [column for column in NARROW if column.key == "time_gain_percent"]
    assert narrow.text(row) == "about -38 %"


@pytest.mark.parametrize(
    ("trials", "line"),
    [
        ([failed(Status.DIVERGED, 1, FROZEN), failed(Status.OUT_OF_MEMORY, 2, COSINE)],
         "No trial finished: 1 DIVERGED, 1 OUT_OF_MEMORY."),
        ([failed(Status.DIVERGED, 0, treatment()), trial(0.9, 1, 1, FROZEN)],
         "1 setting finished, but there is no finished baseline to compare with."),
        ([trial(0.9)], "Only the baseline finished: there is nothing to compare it with."),
        ([trial(0.9, 42), trial(0.9, 1, 1, FROZEN), trial(0.9, 2, 1, FROZEN)],
         "Nothing could be tested against the baseline: the baseline lacks seeds 1, 2."),
    ],
)  # fmt: skip
def test_sweeps_that_answer_nothing_say_why(trials, line):
    assert answer(report_of(trials)) == [line]


def confirmed(first, again):
    """A sweep's report whose ``scheduler=cosine``, with these accuracies in the sweep and anew, was confirmed."""
    before = three(first, frozen=0.6, seeds=(1,), selected_on_report_split=True)
    after = three(again, frozen=0.6).candidates[0]
    assert after.label == "scheduler=cosine"
    rows = tuple(replace(row, confirmation=after) if row.label == after.label else row for row in before.rows)
    first_row = next(row for row in before.rows if row.label == after.label)
    return replace(before, rows=rows, confirmation=(replace(first_row, confirmation=after),))


def test_a_confirmation_tells_whether_the_advantage_survived_with_both_figures():
    first, second = answer(confirmed(0.95, 0.95))
    assert first.startswith("scheduler=cosine is better, +4.93 points (95 % +3."), "by the fresh seeds"
    assert second.startswith("The advantage of scheduler=cosine survived fresh seeds: +4.93 points (95 % +2.76")
    assert ", n = 1) in the sweep; +4.93 points (" in second
    assert second.endswith(", n = 3) in the confirmation.")
    report = confirmed(0.95, 0.95)
    other = next(row for row in report.candidates if row.label == "layers=3")
    told = answer(replace(report, confirmation=(replace(other, confirmation=other), *report.confirmation)))
    assert told[1] == second, "of several that were confirmed, one that is good"
    assert "did not survive fresh seeds: +4.93" in answer(confirmed(0.95, 0.90))[1]
    assert "was not there in the sweep either" in answer(confirmed(0.89, 0.89))[1]
    assert "is not shown by fresh seeds: +4.93" in answer(confirmed(0.95, 0.901))[1]


def test_a_setting_whose_fresh_seeds_all_diverged_keeps_no_verdict_of_its_sweep():
    before = three(0.90, frozen=0.6, seeds=(1,))
    row = next(row for row in before.candidates if row.verdict)
    assert row.verdict is Verdict.GOOD_ENOUGH
    (fresh,) = rows_from([failed(Status.DIVERGED, 9, COSINE)])
    row = replace(row, confirmation=fresh)
    assert (row.final_verdict, describe_verdict(row)) == (None, "diverged with fresh seeds (n = 1)")
    assert (CSV["verdict"].value(row), CSV["verdict_of_fresh_seeds"].value(row)) == ("", True)


def test_settings_that_were_pruned_or_failed_were_tried_and_are_counted():
    stopped = [failed(Status.PRUNED, n, treatment(optim_lr=n * 1e-3)) for n in (3, 4)]
    diverged = failed(Status.DIVERGED, 5, treatment(optim_lr=1.0))
    told = answer(report_of([trial(0.9), trial(0.9, 1, 1, FROZEN), *stopped, diverged]))[0]
    assert told.startswith("None of the 4 settings tried (2 pruned, 1 diverged) was shown to be better")

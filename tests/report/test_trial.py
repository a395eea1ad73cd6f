"""What may be claimed of a trial beside its baseline, in words, tables and metrics."""

from dataclasses import replace

import numpy as np
import pytest

from distilbench.report import trial as report
from distilbench.report.formats import duration, flops, p_value, percent, points, saving
from distilbench.report.noninferiority import noninferiority_exact
from distilbench.report.statistics import paired_accuracy_interval
from distilbench.report.trial import comparison_markdown, comparison_metrics, sentence
from distilbench.results import Predictions, Status, StoredTrial


def compare(trial: StoredTrial, base: StoredTrial, margin: float = 1.0):
    """With the usual margin."""
    return report.compare(trial, base, margin)


def stored(right: str, *, run_id="t", seed=42, **changes) -> StoredTrial:
    """A trial of two labels that was right where ``right`` has a 1."""
    correct = np.array([c == "1" for c in right])
    labels = np.arange(len(right)) % 2
    predictions = Predictions(labels, np.eye(2)[np.where(correct, labels, 1 - labels)])
    trial = StoredTrial(
        run_id=run_id,
        name=f"freeze3-{run_id}",
        protocol_id="0123456789ab",
        treatment={"freeze.layers": run_id},
        seed=seed,
        status=Status.FINISHED,
        accuracy=float(correct.mean()),
        loss=0.333,
        train_seconds=888.0,
        trainable_parameters=10,
        measured_on="cpu; trainer",
        predictions=predictions,
    )
    return replace(trial, **changes)


def baseline(right: str, **changes) -> StoredTrial:
    return stored(right, **({"run_id": "b", "loss": 0.3255, "train_seconds": 1371.0} | changes))


SAME = "1" * 90 + "0" * 10
BETTER = "1" * 98 + "0" * 2


def test_comparison_counts_tests_and_times_the_same_examples():
    result = compare(stored("1" * 88 + "00" + "1" * 3 + "0" * 7), baseline(SAME))
    low, high = (100 * end for end in paired_accuracy_interval(3, 2, 100)[1:])
    assert comparison_metrics(result) == {
        "difference_points": pytest.approx(1.0),
        "difference_low_points": pytest.approx(low),
        "difference_high_points": pytest.approx(high),
        "mcnemar_p": 1.0,
        "loses_at_most_points": pytest.approx(100 * noninferiority_exact(3, 2, 100, 0.01).bound),
        "p_margin": noninferiority_exact(3, 2, 100, 0.01).p,
        "time_gain_percent": pytest.approx(35.23, abs=0.01),
    }
    assert result.row.time_note == ""
    assert sentence(result) == (
        f"Undecided on these 100 examples: it may lose up to {result.row.difference.loses_at_most:.2f} points, and the "
        "margin is 1 point; no number of seeds would decide it, because the 100 examples alone leave ± 3.4 points; "
        "about 3,212 examples with 5 seeds would. "
        "One seed each (42): this compares two trained models, not yet their settings."
    )


def test_better_and_worse_are_said_of_these_examples_only():
    better, worse = compare(stored(BETTER), baseline(SAME)), compare(stored(SAME), baseline(BETTER))
    assert sentence(better).startswith("Better than the baseline on these 100 examples")
    assert sentence(worse).startswith("Worse than the baseline on these 100 examples")


def test_a_loss_below_the_margin_is_good_enough_and_says_both_figures():
    large = "1" * 1000
    close = compare(stored("1" * 998 + "00"), baseline(large))
    assert sentence(close).startswith("Good enough on these 1,000 examples: it loses at most 0.7")
    lost = compare(stored("1" * 990 + "0" * 10), baseline(large), margin=3.0)
    assert sentence(lost).startswith("Good enough on these 1,000 examples: it loses 1.00 points, at most 1.8")


def test_different_seeds_are_named():
    assert "One seed each (42, baseline 7)" in sentence(compare(stored(SAME), baseline(SAME, seed=7)))


def test_the_baseline_itself_its_repeat_and_its_other_seed_are_named_as_such():
    base = baseline(SAME)
    assert sentence(compare(base, base)) == "This trial is the baseline."
    assert "this repeats it" in sentence(compare(replace(base, run_id="c"), base))
    assert "Only the seed differs (1, baseline 42)" in sentence(compare(replace(base, run_id="c", seed=1), base))


def test_untracked_trials_are_not_taken_for_one_another():
    result = compare(stored(BETTER, run_id=""), baseline(SAME, run_id=""))
    assert sentence(result).startswith("Better")


def test_predictions_of_other_examples_are_not_tested():
    result = compare(stored(SAME), baseline(SAME[:98]))
    assert sentence(result).endswith("points against the baseline, not tested: predictions are of other examples.")


@pytest.mark.parametrize("lacking", ["trial", "baseline"])
def test_without_predictions_there_is_no_test_and_the_sentence_says_so(lacking):
    trial, base = stored(BETTER), baseline(SAME)
    if lacking == "trial":
        trial = replace(trial, predictions=None)
    else:
        base = replace(base, predictions=None)
    result = compare(trial, base)
    assert result.row.difference is None
    assert sentence(result) == "+8.00 points against the baseline, not tested: predictions are missing."
    assert "McNemar" not in comparison_markdown(result)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"measured_on": "cuda; trainer"}, "different devices"),
        ({"alone": False}, "beside other trials"),
        ({"train_seconds": 0.0}, "none recorded"),
    ],
)
def test_times_that_cannot_be_compared_give_the_reason_instead(changes, reason):
    result = compare(stored(SAME), baseline(SAME, **changes))
    assert np.isnan(result.row.saving("seconds"))
    assert f"Times not compared: {result.row.time_note}." in comparison_markdown(result)
    assert reason in result.row.time_note


def test_markdown_holds_the_table_the_sentence_and_escaped_names():
    told = {"scheduler.name": "a|b<script> # *x*", "optim.lr": 1e-3}
    result = compare(replace(stored(SAME), treatment={**stored(SAME).treatment, **told}), baseline(SAME))
    text = comparison_markdown(result)
    assert text.replace("\N{NO-BREAK SPACE}", " ").splitlines()[:5] == [
        "|   | accuracy | difference (95 %) | loss | time |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| this trial | 90.00 % | 0.00 (-2.72 to +2.72) | 0.3330 | 14 min 48 s (35 % less) |",
        "| **baseline** | 90.00 % |  | 0.3255 | 22 min 51 s |",
        "",
    ]
    assert f"**{sentence(result)}**" in text
    assert "95 % interval -2.72 to +2.72 points, exact McNemar p 1.00." in text
    assert r"This trial: layers=t scheduler=a\|b&lt;script\> \# \*x\* lr=0.001. Baseline: layers=b " in text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (duration(8.44), "8.4 s"),
        (duration(59.97), "1 min 0 s"),
        (duration(1371), "22 min 51 s"),
        (duration(3599.8), "1 h 0 min"),
        (duration(8040), "2 h 14 min"),
        (percent(0.9071), "90.71 %"),
        (points(0.1234), "+0.12"),
        (points(-0.69), "-0.69"),
        (points(-0.001), "0.00"),
        (p_value(0.6321), "0.63"),
        (p_value(0.0432), "0.043"),
        (p_value(0.00099), "< 0.001"),
        (flops(689e12), "689 T"),
        (flops(999.7e12), "1 P"),
        (saving(35.2), "35 % less"),
        (saving(-12.0), "12 % more"),
        (saving(-0.2), "as much"),
        (saving(99.7, is_count=True), "99 % fewer"),
    ],
)
def test_figures_are_formatted_for_people(text, expected):
    assert text == expected


def test_a_comparison_with_a_baseline_that_has_not_learned_says_that_first():
    half = "10" * 50
    assert sentence(compare(stored(BETTER), baseline(half))).startswith(
        "The baseline has not learned: 50.00 %, while always predicting the most frequent label scores 50.00 %. "
        "Not judged on"
    )


def test_a_trial_of_a_sweep_whose_split_chose_it_says_what_the_sweep_says():
    told = sentence(report.compare(stored(BETTER, number="3"), baseline(SAME), 1.0, selected_on_report_split=True))
    assert told.startswith("Ahead of the baseline on these 100 examples, to be confirmed: ")
    assert told.endswith("not yet their settings; the sweep's report corrects for all that was tried.")

"""One row per setting: how seeds come together, who is the baseline, what may be claimed and when it may not."""

from dataclasses import replace

import numpy as np
import pytest

from distilbench.report.rows import find_baseline, label_rows, rows_from
from distilbench.results import Status
from tests.report.made_trials import USUAL, failed, report_of, sweep, treatment, trial

FROZEN = treatment(freeze_layers=3)
COSINE = treatment(scheduler_name="cosine", optim_lr=3e-5)


def test_seeds_of_a_setting_are_one_row_with_mean_and_deviation():
    rows = rows_from([trial(0.90, 1), trial(0.92, 2), trial(0.91, 3, train_seconds=1000.0), trial(0.8, 1, 9, FROZEN)])
    assert [row.num_seeds for row in rows] == [3, 1]
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
    assert (row.num_seeds, row.status) == (1, "1 FINISHED, 1 OUT_OF_MEMORY")
    (row,) = rows_from([replace(failed(Status.PRUNED, 1, treatment()), accuracy=0.6)])
    assert (row.num_seeds, row.accuracy_so_far) == (0, 0.6)
    (row,) = rows_from([trial(0.9), replace(trial(0.9, 2), accuracy=float("nan"))])
    assert row.seeds == (1,)


def test_all_right_in_a_few_examples_is_no_certainty():
    (row,) = rows_from([trial(1.0)])
    assert replace(row, examples=64).accuracy_half_width == pytest.approx(1.96 * (66 * 2 / 68**3) ** 0.5, rel=1e-4)
    row = replace(row, accuracy=0.9, examples=872)
    assert row.accuracy_half_width == pytest.approx(0.0199, abs=2e-4)
    several = replace(row, trials=row.trials * 4, accuracy_deviation=0.02)  # a standard error of 0.01 over seeds
    assert several.accuracy_half_width == pytest.approx(0.03657, abs=1e-5), "t of 3 degrees of freedom for the seeds"
    assert replace(several, examples=0).accuracy_half_width == pytest.approx(0.01 * 3.182, rel=1e-3)


def test_of_a_seed_trained_twice_the_newest_counts():
    (row,) = rows_from([trial(0.95, 1, 7), trial(0.90, 1, 3)])
    assert (row.num_seeds, len(row.other_trials), row.trials[0].started_ms) == (1, 1, 7)


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
    typed = [{"experiment": None, "freeze": "none"}, {"experiment": "layer_freezing", "freeze": "layers3"}]
    made = [trial(0.9, choices=typed[0]), trial(0.89, 1, 1, FROZEN, choices=typed[1])]
    rows = label_rows(rows_from(made, names), baseline=0)
    assert [row.label for row in rows] == ["baseline: freeze=none", "layer_freezing: freeze=layers3"]


def test_the_baseline_has_the_reports_choices_and_what_most_trials_share():
    long = treatment() | {"train.epochs": 5}
    rows = rows_from([trial(0.95, 1, 1, FROZEN), trial(0.94, 1, 2, long), trial(0.9, 1, 3)])
    assert rows[find_baseline(rows, USUAL)].treatment == treatment()
    assert find_baseline(rows[:1], USUAL) is None
    text = {"data.max_train_examples": 500}
    assert find_baseline(rows, USUAL | text) is None, "of other text"
    assert find_baseline(rows_from([trial(0.9, settings=long | text)]), USUAL | text) == 0, "epochs may differ"


def test_a_sweeps_own_baseline_and_one_that_is_named_go_first():
    rows = rows_from([trial(0.9), trial(0.89, 1, 1, FROZEN, role="baseline"), trial(0.91, 1, 2, COSINE, run_id="mine")])
    assert rows[find_baseline(rows, USUAL)].treatment == FROZEN
    assert rows[find_baseline(rows, USUAL, run_id="mine")].treatment == COSINE
    assert find_baseline(rows, USUAL, run_id="nobody") is None
    labels = [row.label for row in label_rows(rows, find_baseline(rows, USUAL, run_id="mine"))]
    assert [label.startswith("baseline") for label in labels].count(True) == 1, "not the sweep's own, too"


def test_of_several_baselines_as_in_a_sweep_of_the_amount_of_text_the_one_with_most_work_counts():
    amounts = [(500, 1e12), (None, 9e12), (2000, 4e12)]
    rows = rows_from([
        trial(0.8 + i / 50, 1, i, treatment() | {"data.max_train_examples": n}, role="baseline", train_flops=flops)
        for i, (n, flops) in enumerate(amounts)
    ])  # fmt: skip
    assert rows[find_baseline(rows, USUAL)].treatment["data.max_train_examples"] is None
    unfinished = rows_from([trial(0.8, role="baseline"), replace(failed(Status.DIVERGED, 1, COSINE), role="baseline")])
    assert unfinished[find_baseline(unfinished, USUAL)].treatment == treatment()


def test_a_sweep_of_two_hundred_settings_keeps_every_trial():
    trials = sweep(200, seeds=2)
    report = report_of(trials)
    assert sum(len(row.all_trials) for row in report.rows) == len(trials)


def test_rows_are_called_by_their_number_and_by_their_sweep_too_where_two_have_the_same():
    def made(number: str, sweep: str, rate: float):
        return trial(0.9, 1, int(rate * 1e5), treatment(optim_lr=rate), number=number, sweep=sweep)

    rows = label_rows(rows_from([trial(0.95), made("3", "a", 1e-3), made("3", "b", 1e-2), made("4", "b", 1e-1)]), 0)
    assert sorted(row.name for row in rows[1:]) == ["4 lr=0.1", "a/3 lr=0.001", "b/3 lr=0.01"]
    assert rows[0].name == "baseline: lr=2e-05", "trained outside of a sweep"

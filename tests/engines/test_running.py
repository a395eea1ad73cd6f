"""Laps of wall and CPU time."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from distilbench.engines.running import Lap, Stopwatch, evaluate_logits, expected_calibration_error


def test_laps_follow_each_other_and_leave_out_what_they_are_told(monkeypatch):
    wall, cpu = iter([12.0, 20.0, 31.0]), iter([100.0, 101.0, 103.0, 106.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(cpu))
    stopwatch = Stopwatch(began=10.0)
    assert stopwatch.lap() == Lap(2.0, 1.0)
    assert stopwatch.lap() == Lap(8.0, 2.0)
    stopwatch.exclude(5.0)
    assert stopwatch.lap() == Lap(6.0, 3.0)


def test_more_than_two_labels_have_a_macro_f1():
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] * 9
    evaluation = evaluate_logits("validation", logits, np.array([0, 1, 2, 2]), step=4, epoch=1.0)
    assert evaluation.accuracy == 0.75
    assert evaluation.f1 == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert evaluation.loss == pytest.approx((4 * math.log(1 + 2 * math.exp(-9)) + 9) / 4)


def test_a_label_that_the_split_lacks_is_none_of_those_that_macro_f1_is_the_mean_of():
    labels, predicted = np.array([0, 0, 1, 1]), [0, 2, 1, 1]
    evaluation = evaluate_logits("validation", np.eye(3, dtype=np.float32)[predicted], labels, step=4, epoch=1.0)
    assert evaluation.f1 == pytest.approx((2 / 3 + 1) / 2)


def test_huge_logits_have_a_finite_loss():
    logits = np.array([[3e38, -3e38], [-3e38, 3e38]], dtype=np.float32)
    assert evaluate_logits("validation", logits, np.array([0, 1]), 1, 1.0).loss == 0.0


def test_the_brier_score_of_two_labels_is_that_of_the_second():
    logits = np.log([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]]).astype(np.float32)
    evaluation = evaluate_logits("validation", logits, np.array([0, 0, 1]), 1, 1.0)
    assert evaluation.brier == pytest.approx((0.2**2 + 0.7**2 + 0.5**2) / 3)


def test_the_brier_score_of_more_labels_sums_over_them_though_one_never_occurs():
    logits = np.log([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]]).astype(np.float32)
    evaluation = evaluate_logits("validation", logits, np.array([0, 0]), 1, 1.0)
    assert evaluation.brier == pytest.approx((0.3**2 + 0.2**2 + 0.1**2 + 0.9**2 + 0.8**2 + 0.1**2) / 2)


def test_the_calibration_error_weighs_bins_of_equally_many_examples():
    confidence = np.linspace(0.51, 0.99, 60)
    correct = np.arange(60) % 4 != 0  # three of the four in each bin
    probabilities = np.stack([1 - confidence, confidence], axis=1)
    gaps = [abs(confidence[start : start + 4].mean() - 0.75) for start in range(0, 60, 4)]
    shuffled = np.random.default_rng(0).permutation(60)
    measured = expected_calibration_error(probabilities[shuffled], correct[shuffled].astype(int))
    assert measured == pytest.approx(np.mean(gaps))


def test_confidence_that_comes_true_has_no_calibration_error():
    sure = np.array([[1.0, 0.0], [0.0, 1.0]] * 30)
    assert expected_calibration_error(sure, np.array([0, 1] * 30)) == 0.0
    assert expected_calibration_error(sure, np.array([1, 0] * 30)) == 1.0
    assert expected_calibration_error(sure[:3], np.array([0, 1, 1])) == pytest.approx(1 / 3)


def test_logits_that_are_no_numbers_leave_the_loss_to_say_so():
    evaluation = evaluate_logits(
        "validation", np.array([[math.nan, 0.0], [0.0, 1.0]], np.float32), np.array([0, 1]), 1, 1.0
    )
    assert all(math.isnan(value) for value in (evaluation.loss, evaluation.brier, evaluation.ece))

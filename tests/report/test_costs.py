"""What settings take and save: only what can be compared is, and what is estimated says so."""

import math

import numpy as np
import pytest

from distilbench.report.rows import average, noise_of_time
from tests.report.made_trials import report_of, treatment, trial

FROZEN = treatment(freeze_layers=3)


def row_of(base=None, **changes):
    (row,) = report_of(
        [trial(0.9, **{"train_flops": 690e12} | (base or {})), trial(0.9, 1, 1, FROZEN, **changes)]
    ).candidates
    return row


def test_time_is_told_only_between_trials_measured_alike():
    assert row_of(train_seconds=888.0).saving("seconds") == pytest.approx(35.2, abs=0.05)
    elsewhere = row_of(train_seconds=888.0, measured_on="cuda; trainer")
    assert math.isnan(elsewhere.saving("seconds"))
    assert elsewhere.time_note == "measured on different devices, engines, precisions or library versions"


def test_flops_compare_on_any_machine_fused_or_alone():
    row = row_of(train_flops=345e12, measured_on="cuda; fused", alone=False)
    assert row.saving("flops") == pytest.approx(50)


def test_a_trial_that_shared_the_device_has_no_seconds_of_its_own_but_an_estimate():
    shared = row_of(alone=False)
    assert math.isnan(shared.cost.seconds)
    assert shared.time_note == "trained beside other trials, or partly elsewhere"
    estimated = row_of(alone=False, solo_seconds_estimate=685.5)
    assert (estimated.cost.seconds, estimated.cost.is_estimate) == (685.5, True)
    assert (estimated.saving("seconds"), estimated.time_note) == (pytest.approx(50), "")


def test_memory_and_cpu_time_are_compared_where_both_trained_alone():
    base = {"train_cpu_seconds": 2000.0, "peak_memory_bytes": 2**31}
    row = row_of(base, train_cpu_seconds=1500.0, peak_memory_bytes=2**30)
    assert (row.saving("cpu_seconds"), row.saving("memory")) == (pytest.approx(25), pytest.approx(50))
    shared = row_of(base, train_cpu_seconds=1500.0, peak_memory_bytes=2**30, alone=False)
    assert np.isnan([shared.saving("cpu_seconds"), shared.saving("memory")]).all()


def test_the_noise_of_time_comes_from_equal_work_done_more_than_once():
    one = [trial(0.9, seed, train_flops=1e15, train_seconds=s) for seed, s in ((1, 100.0), (2, 110.0), (3, 121.0))]
    found = noise_of_time([*one, trial(0.9, 1, 1, FROZEN, train_flops=5e14, train_seconds=10.0)])
    assert found == (pytest.approx(10.0), 3)
    assert noise_of_time([trial(0.9), trial(0.9, 1, 1, FROZEN)]) == (0.0, 0)
    estimates = [trial(0.9, s, train_flops=1e15, alone=False, solo_seconds_estimate=121.0) for s in (4, 5)]
    assert noise_of_time([one[0], *estimates]) == (pytest.approx(100 * (1.21**0.5**0.5 - 1)), 2)
    apart = [trial(0.9, 1, train_flops=1e15, alone=False), trial(0.9, 2, train_flops=1e15, measured_on="cuda")]
    assert noise_of_time(apart) == (0.0, 0)


def test_an_average_has_the_deviation_of_a_sample_where_there_are_several():
    assert average([90.71, 90.02, 90.60]) == pytest.approx((90.4433, 0.3707), abs=1e-4)
    assert average([0.9, 0.8]) == pytest.approx((0.85, 0.005**0.5))
    assert average([0.9]) == (0.9, None)
    assert math.isnan(average([])[0])

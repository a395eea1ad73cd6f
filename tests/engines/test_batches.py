"""How often each example has been trained on after so many steps."""

from __future__ import annotations

import numpy as np
import pytest

from distilbench.engines.batches import BatchSchedule


@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 14, 15])
def test_examples_count_as_often_as_the_batches_so_far_hold_them(step):
    schedule = BatchSchedule(examples=37, batch_size=8, epochs=3)
    batches = [schedule.batch(7, number) for number in range(step)]
    expected = np.bincount(np.concatenate([np.empty(0, int), *batches]), minlength=37)
    np.testing.assert_array_equal(schedule.example_counts(7, step), expected)
    assert schedule.example_counts(7, step).sum() == schedule.num_examples_seen(step)

"""How many levels each policy that moves freezes, part by part, of a model of three layers: its head is level 4."""

from __future__ import annotations

import pytest

from distilbench.engines.batches import BatchSchedule
from distilbench.engines.moving_freeze import auto_levels, planned_levels, require_parts
from distilbench.settings import SettingsError

TOP = 4


def test_gradual_thaws_a_level_a_part_from_the_top_down_to_the_embeddings(settings):
    levels = planned_levels(settings("freeze=gradual").freeze, BatchSchedule(10, 2, epochs=7), TOP)
    assert levels == {0: 4, 5: 3, 10: 2, 15: 1, 20: 0, 25: 0, 30: 0}
    uneven = BatchSchedule(10, 2, epochs=2, eval_steps=4)
    assert planned_levels(settings("freeze=gradual").freeze, uneven, TOP) == {
        0: 4,
        4: 3,
        8: 2,
    }


@pytest.mark.parametrize(
    ("parts", "layers", "levels"), [(3, 1, [0, 1, 2]), (3, 3, [0, 2, 4]), (2, 2, [0, 3]), (5, 3, [0, 1, 2, 3, 4])]
)
def test_scheduled_freezes_from_nothing_to_its_layers_and_the_embeddings(settings, parts, layers, levels):
    trial = settings("freeze=scheduled", f"freeze.layers={layers}").freeze
    planned = planned_levels(trial, BatchSchedule(10, 2, epochs=parts), TOP)
    assert planned == dict(zip(range(0, 5 * parts, 5), levels, strict=True))


@pytest.mark.parametrize(("choice", "most"), [("gradual", 14), ("scheduled freeze.layers=1", 14), ("auto", 7)])
def test_evaluations_too_few_for_anything_to_move_are_refused(settings, choice, most):
    """``auto`` compares the gradients of two parts before it freezes in a third."""
    freeze = settings(*f"freeze={choice}".split()).freeze
    require_parts(freeze, BatchSchedule(10, 2, epochs=3))
    require_parts(freeze, BatchSchedule(10, 2, epochs=3, eval_steps=most))
    require_parts(settings().freeze, BatchSchedule(10, 2, epochs=3, eval_steps=99))
    with pytest.raises(
        SettingsError, match=f"^train.eval_steps must be at most {most} for 15 steps with freeze.policy"
    ):
        require_parts(freeze, BatchSchedule(10, 2, epochs=3, eval_steps=most + 1))


@pytest.mark.parametrize("choice", ["freeze=auto", "freeze.layers=2", "freeze=bias"])
def test_fixed_freezing_policies_plan_no_change(settings, choice):
    assert planned_levels(settings(choice).freeze, BatchSchedule(10, 2, epochs=3), TOP) == {0: 0}


def test_auto_freezes_from_the_bottom_what_changes_less_than_the_median():
    first = [1.0, 1.0, 1.0, 1.0, 9.0]
    second = [1.1, 0.9, 1.5, 3.0, 1.0]  # changes 0.1, 0.1, 0.5, 2.0; the head counts for nothing
    third = [0.0, 0.0, 1.8, 9.0, 5.0]  # of the two that are left 0.2 and 2.0
    assert [auto_levels([first, second, third][:part], TOP) for part in range(4)] == [0, 0, 2, 3]


def test_auto_never_freezes_the_last_layer_nor_anything_above_one_that_still_changes():
    falling = [[9.0 / 2**part] * 5 for part in range(6)]
    assert auto_levels(falling, TOP) == 0
    lively_bottom = [[1.0, 1.0, 1.0, 1.0, 1.0], [5.0, 1.0, 1.0, 1.0, 1.0]]
    assert auto_levels(lively_bottom, TOP) == 0

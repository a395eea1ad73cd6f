"""How many levels each policy that moves freezes, part by part, of a model of three layers: its head is level 4."""

from __future__ import annotations

import pytest

from distilbench.engines.moving_freeze import auto_levels, gradual_levels, scheduled_levels

TOP = 4


def test_gradual_thaws_a_level_a_part_from_the_top_down_to_the_embeddings():
    assert [gradual_levels(part, TOP) for part in range(7)] == [4, 3, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("parts", "layers", "levels"), [(3, 1, [0, 1, 2]), (3, 3, [0, 2, 4]), (2, 2, [0, 3]), (5, 3, [0, 1, 2, 3, 4])]
)
def test_scheduled_freezes_from_nothing_to_its_layers_and_the_embeddings(parts, layers, levels):
    assert [scheduled_levels(part, parts, layers) for part in range(parts)] == levels


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

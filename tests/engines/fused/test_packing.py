"""Batches without padding: every token has one slot, and nobody sees a neighbour."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distilbench.data.tokens import EncodedSplit
from distilbench.engines.batches import BatchSchedule, epoch_order
from distilbench.engines.fused.packing import MASKED_SCORE, PAD_MULTIPLE, pack, round_up, stack_batches

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(3, 40), min_size=1, max_size=20)


def split_of(lengths):
    tokens = np.arange(sum(lengths), dtype=np.int32) + 100
    return EncodedSplit(tokens, np.cumsum([0, *lengths]), np.arange(len(lengths)) % 2)


@given(LENGTHS, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_tokens_come_in_the_order_asked_for(lengths, random):
    split = split_of(lengths)
    chosen = np.array(random.sample(range(len(lengths)), len(lengths)))
    packed = pack(split, chosen)
    np.testing.assert_array_equal(packed.ids, np.concatenate([split.row(i) for i in chosen]))
    np.testing.assert_array_equal(packed.positions, np.concatenate([np.arange(lengths[i]) for i in chosen]))
    np.testing.assert_array_equal(packed.ids[packed.first], [split.row(i)[0] for i in chosen])
    np.testing.assert_array_equal(packed.labels, split.labels[chosen])


@given(LENGTHS)
@settings(max_examples=50)
def test_every_token_has_a_slot_of_its_own_within_the_width(lengths):
    packed = pack(split_of(lengths), np.arange(len(lengths)))
    columns = packed.column[packed.sentence] + packed.positions
    slots = set(zip(packed.bin[packed.sentence].tolist(), columns.tolist(), strict=True))
    assert len(slots) == sum(lengths)
    assert columns.max() < packed.width < max(lengths) + PAD_MULTIPLE
    assert packed.bins * packed.width < 2 * sum(lengths) + packed.width + PAD_MULTIPLE * packed.bins


@given(st.lists(LENGTHS, min_size=1, max_size=3).filter(lambda orders: len({len(o) for o in orders}) == 1))
@settings(max_examples=50)
def test_moving_to_the_slots_and_back_changes_nothing_forward_or_backward(orders):
    batch = stack_batches([pack(split_of(o), np.arange(len(o))) for o in orders], CPU)
    trials, tokens, heads = len(orders), batch.ids.shape[1], 2
    rows = torch.rand(trials, tokens, heads * 4, requires_grad=True)
    [there] = batch.packed.to_slots(rows, 1, heads)
    back = batch.packed.to_rows(there)
    real = torch.zeros(trials, tokens, dtype=torch.bool)
    for place, order in zip(real, orders, strict=True):
        place[: sum(order)] = True
    torch.testing.assert_close(back[real], rows[real], rtol=0, atol=0)
    [gradient] = torch.autograd.grad((back[real] * 3).sum(), rows)
    torch.testing.assert_close(gradient, 3.0 * real[:, :, None].expand_as(gradient), rtol=0, atol=0)


def test_a_token_attends_to_its_own_sentence_and_to_nothing_else():
    lengths = [5, 3, 9, 4, 8]
    batch = stack_batches([pack(split_of(lengths), np.arange(5))], CPU)
    allowed = batch.token_mask[0, :, 0] == 0
    assert set(batch.token_mask.unique().tolist()) == {0.0, float(torch.tensor(MASKED_SCORE))}
    place = batch.packed
    for token in range(sum(lengths)):
        seen = allowed.flatten(0, 1)[place.slot[0, token]].sum()
        assert seen == lengths[int(batch.packs[0].sentence[token])]


def test_batches_are_filled_up_to_few_different_sizes():
    sizes = {stack_batches([pack(split_of([n]), np.arange(1))], CPU).ids.shape[1] for n in range(3, 100)}
    assert sizes == set(range(PAD_MULTIPLE, 100 + PAD_MULTIPLE, PAD_MULTIPLE))
    for n in range(1, 5000):
        size = round_up(n, PAD_MULTIPLE)
        assert n <= size < n + max(PAD_MULTIPLE, n / 16 + 1)
    assert len({round_up(n, PAD_MULTIPLE) for n in range(1000, 2001)}) <= 32


def test_the_order_of_an_epoch_is_that_of_accelerates_sampler():
    from accelerate.data_loader import SeedableRandomSampler

    sampler = SeedableRandomSampler(range(50), generator=torch.Generator(), data_seed=7)
    for epoch in range(3):
        assert list(sampler) == epoch_order(50, 7, epoch).tolist()


@pytest.mark.parametrize(("step", "seen"), [(0, 0), (4, 32), (5, 37), (6, 45), (10, 74)])
def test_a_schedule_counts_the_smaller_last_batch(step, seen):
    schedule = BatchSchedule(examples=37, batch_size=8, epochs=2)
    assert (schedule.steps_per_epoch, schedule.steps) == (5, 10)
    assert schedule.num_examples_seen(step) == seen
    assert seen == sum(len(schedule.batch(1, s)) for s in range(step))


def test_an_epoch_of_a_course_holds_every_example_once():
    schedule = BatchSchedule(examples=37, batch_size=8, epochs=2)
    first = np.concatenate([schedule.batch(1, step) for step in range(5)])
    second = np.concatenate([schedule.batch(1, step) for step in range(5, 10)])
    assert sorted(first) == sorted(second) == list(range(37))
    assert first.tolist() != second.tolist()
